"""Every way to steer the encoder, with everything that reads its bottom-up [cls]."""

import pytest
import torch
from conftest import TINY_MODEL
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.captions import CaptionBatch
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError
from vlabs.evaluation.retrieval import RetrievalEvaluation
from vlabs.prediction.search import Search
from vlabs.runs.groups import choices, config_dir
from vlabs.tasks.optim import Recipe
from vlabs.tasks.retrieval import RetrievalTask

VARIANTS = sorted(set(choices("model/topdown")) - {"prompt_merge"})  # which is of a Swin


@pytest.fixture(params=VARIANTS)
def checkpoint(request, tiny_data, tmp_path):
    """A checkpoint of a new model of every variant, for 32 px."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose(
            "train", ["task=retrieval", f"model/topdown={request.param}", "data.image_size=32", *TINY_MODEL]
        )
    preprocessing = Preprocessing(image_size=32, tokenizer=read_tokenizer(None, tiny_data), max_length=20)
    config.model.text.vocab_size = preprocessing.vocab_size
    torch.manual_seed(0)
    model = instantiate(config.model).eval()
    for name, parameter in model.named_parameters():  # far from zero, so that the images differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"any")
    return Checkpoint(model, preprocessing, "retrieval", {}, path)


@torch.no_grad()
def test_the_bottom_up_cls_says_what_is_in_the_image(checkpoint):
    bottom_up = checkpoint.model.vision.encode(torch.randn(2, 3, 32, 32))
    assert (bottom_up.cls[0] - bottom_up.cls[1]).abs().max() > 1e-2


def test_the_tasks_losses_and_hard_negatives_read_it_only_where_it_is(checkpoint):
    model = checkpoint.model
    batch = CaptionBatch(
        torch.randn(3, 3, 32, 32), torch.randint(5, 50, (3, 6)), torch.ones(3, 6, dtype=torch.int64), torch.arange(3),
        torch.arange(3), [1, 2, 3], None, None, None, None, 0, 0, [],
    )  # fmt: skip
    options = {"num_false": 2, "prior_weight": 0.1, "prior_bottom_up_weight": 0.1}
    task = RetrievalTask(model, checkpoint.preprocessing, {}, Recipe(), negatives="batch", **options)
    found = task.losses(batch).others
    assert ("prior_bottom_up" in found) == (model.prior is not None)
    assert ("prior" in found) == model.vision.needs_prior

    def hard():
        return RetrievalTask(model, checkpoint.preprocessing, {}, Recipe(), negatives="hard", **options)

    if model.prior is not None:
        assert hard().losses(batch).task["ranking"] > 0
    else:
        with pytest.raises(UserError, match="negatives=hard"):
            hard()


def test_a_shortlist_needs_it(checkpoint):
    evaluation = RetrievalEvaluation({"name": "shortlist", "k": 1, "batch_size": 1, "captions_in_memory": 1})
    if checkpoint.model.prior is not None:
        evaluation.check_model(checkpoint.model)
    else:
        with pytest.raises(UserError, match="ranker=shortlist"):
            evaluation.check_model(checkpoint.model)


def test_search_goes_around_it(checkpoint, tmp_path):
    pictures = []
    for n, color in enumerate(("red", "green", "blue", "white")):
        pictures.append(tmp_path / f"{n}.png")
        Image.new("RGB", (32, 32), color).save(pictures[-1])
    search = Search(checkpoint, pictures, tmp_path / "index")
    shortlisted = checkpoint.model.prior is not None
    assert len(search.find("a red circle", k=2)) == (2 if shortlisted else 4)
