"""`task.freeze` names the same parts in every task, and what it names stays as it is: weights and dropout."""

from typing import ClassVar

import pytest
from hydra import compose, initialize_config_dir
from pytorch_lightning import Callback
from test_classify import make_task as classify_task
from test_models import make_model
from test_segment import make_segmenter
from torch import nn

from vlabs.checkpoints.pretrained import is_pretrained
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.lora import LoRA
from vlabs.models.topdown import AbSTopDown, PerceiverIO
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.film import FiLM
from vlabs.models.variants.qa_vit import QAViT
from vlabs.models.variants.sentence_attention import SentenceAttention
from vlabs.runs.groups import config_dir
from vlabs.tasks.optim import Recipe
from vlabs.tasks.segment import SegmentTask
from vlabs.tasks.vqa import VQATask


def vqa_task(**options):
    return VQATask(make_model(AbSTopDown(bias_again=False)), *common(), **options)


def segment_task(**options):
    return SegmentTask(make_segmenter(), *common(), **options)


def common():
    return Preprocessing(16, "", names=("a", "b", "c")), {}, Recipe()


TASKS = {
    "vqa": (vqa_task, "vision.vit", ["vision.decoders", "prior", "prior_loss"]),
    "segment": (segment_task, "vision.vit", ["vision.decoders", "prompt"]),
    "classify": (lambda **o: classify_task(AbSTopDown(), **o), "encoder.vit.blocks", ["encoder.decoders", "prompt"]),
}


def trained(task, part):
    names = [name.removeprefix("model.") for name, value in task.named_parameters() if value.requires_grad]
    return any(f"{name}.".startswith(f"{part}.") for name in names)


@pytest.mark.parametrize("name", TASKS)
def test_vision_is_the_pre_trained_encoder_and_a_linear_probe_freezes_feedback_too(name):
    make, encoder, feedback = TASKS[name]
    task = make(freeze=["vision"])
    assert not trained(task, encoder)
    assert all(trained(task, part) for part in feedback)
    for path, module in task.model.named_modules():
        if isinstance(module, nn.Dropout):  # the one of a classifier's head stands in the encoder
            assert module.training == (".vit." not in path or path == "encoder.vit.head_drop"), path
    probe = make(freeze=["vision", "feedback"])
    assert not any(trained(probe, part) for part in (encoder, *feedback))
    assert {probe.lr_group(name) for name, value in probe.named_parameters() if value.requires_grad} <= {
        "head", "fusion", "text",
    }  # fmt: skip


class Modes(Callback):
    """Notes whether a frozen text encoder would drop out, and another part would not, in a step."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((any(one.training for one in pl_module.model.text.modules()), pl_module.model.fusion.training))


def test_what_is_frozen_drops_nothing_out_in_a_real_training_also_after_a_validation(
    tiny_options, in_process, tmp_path
):
    options = ["task.freeze=[text]", "+callbacks.modes._target_=test_freeze.Modes", "logger=csv"]
    options += ["trainer.max_epochs=2", "trainer.limit_train_batches=1", "callbacks.grounding=null"]
    result = in_process("vlabs.train", [*tiny_options, *options], tmp_path)
    assert result.returncode == 0, result.stderr
    assert Modes.seen == [(False, True)] * 2
    assert "eval mode" not in result.stdout + result.stderr


def test_what_is_no_part_is_the_start_of_a_name():
    task = vqa_task(freeze=["vision.vit.blocks.0", "prior", "text.roberta.embeddings"])
    for part in ("vision.vit.blocks.0", "prior", "text.roberta.embeddings"):
        assert not trained(task, part)
        assert not task.model.get_submodule(part).training
    assert trained(task, "vision.vit.blocks.1")
    assert task.model.vision.vit.blocks[1].training
    with pytest.raises(UserError, match="'visio', which the model does not have: start with one of vision, text"):
        vqa_task(freeze=["visio"])


def test_without_feedback_there_is_none_to_freeze(capsys):
    task = VQATask(make_model(None), *common(), freeze=["feedback"])
    task.on_fit_start()
    assert trained(task, "vision.vit")
    assert not "".join(capsys.readouterr())


def test_adapters_and_frozen_parts_are_of_different_encoders():
    task = vqa_task(freeze=["vision"], lora=LoRA(rank=2, parts=("text",)))
    assert not trained(task, "vision.vit")
    assert trained(task, "vision.decoders")
    names = [name for name, value in task.named_parameters() if value.requires_grad and ".text." in name]
    assert names
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize(
    ("topdown", "begins_at_zero"),
    [
        (AbSTopDown(bias_again=False), True), (AbSTopDown(), False), (FiLM(), True), (CrossAttention(), True),
        (SentenceAttention(), True), (QAViT(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_feedback_that_is_frozen_at_nothing_is_said(topdown, begins_at_zero, capsys):
    for freeze, learned in ((["feedback"], False), (["vision"], False), (["feedback"], True)):
        task = VQATask(make_model(topdown, fresh=not learned), *common(), freeze=freeze)
        if learned:
            for one in task.model.vision.zero_parameters()[:1]:
                nn.init.ones_(one)
        task.on_fit_start()
        said = "begins at zero" in "".join(capsys.readouterr())
        assert said == (begins_at_zero and freeze == ["feedback"] and not learned)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_head_that_points_and_that_nothing_trains_is_said(weight, capsys):
    task = VQATask(make_model(CrossAttention(points="head"), fresh=True), *common(), region_prior_weight=weight)
    for said in (not weight, False):
        task.on_fit_start()
        assert ("points=head: the head is new and nothing trains it" in "".join(capsys.readouterr())) == said
        nn.init.ones_(task.model.vision.topdown.head.weight)  # as of a run that it starts from


def test_a_start_of_no_second_pass_is_said(capsys):
    for topdown, said in ((None, True), (PerceiverIO(), True), (AbSTopDown(), False)):
        VQATask(make_model(topdown, start=2), *common()).on_fit_start()
        assert ("model.vision.start=2 has no effect" in "".join(capsys.readouterr())) == said


def test_pools_of_patches_are_new_and_trained_beside_a_frozen_encoder():
    pools = [f"vision.vit.blocks.{block}.norm1.pool" for block in range(2)]
    for options in ({"freeze": ["vision"]}, {"lora": LoRA(rank=2)}):
        task = VQATask(make_model(None, tap=2), *common(), **options)
        assert all(value.requires_grad for pool in pools for value in task.model.get_submodule(pool).parameters())
        names = [name for name, value in task.named_parameters() if value.requires_grad and ".lora_" not in name]
        assert {task.lr_group(name) for name in names if ".vit." in name} == {"head"}
    assert not is_pretrained(task.model, f"{pools[0]}.choose.0.weight")


def test_the_recipe_of_photographs_keeps_its_encoders_and_stores_what_they_see():
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", ["experiment=photo_vqa"])
    assert config.model.vision.architecture == "vit_small_patch14_dinov2"
    assert list(config.task.freeze) == ["vision", "text"]
    assert config.task.store
    assert config.data.rand_augment is None
