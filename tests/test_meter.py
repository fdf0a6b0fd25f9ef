"""METER's own checkpoints: every encoder and every head, as a start at another resolution, and by command."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import command
from hydra import compose, initialize_config_dir
from meter import Meter
from torch.nn import functional as F

from data_prep.engine.pipeline import Options, prepare
from data_prep.readers.nlvr2 import NLVR2
from data_prep.scenes.corpus import make_scenes
from vlabs.checkpoints.initialize import initialize
from vlabs.checkpoints.released import load_released
from vlabs.errors import UserError
from vlabs.prediction.predictor import load_any
from vlabs.runs.groups import config_dir
from vlabs.training.build import build_task

TASKS = {"vqa": "vqa", "nlvr2": "nlvr2", "snli": "snli_ve", "irtr": "retrieval", "pretrain": "pretrain"}


def make(*options, **more):
    torch.manual_seed(0)
    network = Meter(*options, **more).eval()
    for parameter in network.parameters():  # far from their start, so that all that there is matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def write(network, path):
    """As Lightning wrote it, with what it says of the run."""
    torch.save({"state_dict": network.checkpoint(), "hyper_parameters": {"config": {"lr": 1e-5}}, "epoch": 9}, path)
    return path


@pytest.mark.parametrize(
    ("vision", "text", "task"),
    [
        *(("clip", "roberta", task) for task in TASKS),
        *(("swin", "roberta", task) for task in ("nlvr2", "pretrain")),
        ("clip", "bert", "vqa"),
        ("swin", "bert", "snli"),
    ],
)
@torch.no_grad()
def test_the_outputs_are_meters(vision, text, task, tmp_path):
    network = make(vision, text, task)
    released = load_released(write(network, tmp_path / "meter.ckpt"), task=TASKS[task])
    pair = (2,) if task == "nlvr2" else ()
    images, ids = torch.randn(3, *pair, 3, 32, 32), torch.randint(4, 50, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2])
    ids[mask == 0] = 1
    expected = network(images, ids, mask)
    index = torch.arange(6).view(3, 2) if task == "nlvr2" else None
    out = released(images.flatten(0, 1) if task == "nlvr2" else images, ids, mask, index)
    close = {"rtol": 0, "atol": 5e-6}
    if task == "pretrain":
        torch.testing.assert_close(out.matching_logits, expected[0], **close)
        tokens = released.model.head.token_logits(out.text_features)
        torch.testing.assert_close(tokens[mask.bool()], expected[1][mask.bool()], **close)
    else:
        torch.testing.assert_close(out.logits, expected, **close)
    if task == "irtr":
        torch.testing.assert_close(out.matching_logits, network.itm_score.fc(out.pooled_features), **close)


@pytest.mark.parametrize(("vision", "mean"), [("clip", 0.48145466), ("swin", 0.485)])
def test_images_are_seen_at_the_size_and_with_the_mean_that_meter_trained_with(vision, mean, pairs, tmp_path):
    path = write(make(vision, task="nlvr2", vocabulary=pairs[1], size=64), tmp_path / "meter.ckpt")
    checkpoint = load_any(path, tokenizer=str(pairs[0] / "tokenizer"), needs=("answers", "two images"))
    assert (checkpoint.preprocessing.image_size, checkpoint.preprocessing.mean[0]) == (64, mean)
    assert checkpoint.preprocessing.names == ("False", "True")


def test_a_file_of_another_task_is_named(tmp_path):
    path = write(make("clip", "roberta", "nlvr2"), tmp_path / "meter.ckpt")
    with pytest.raises(UserError, match=r"meter.ckpt was trained for the task 'nlvr2': .* two images, not one"):
        load_any(path, needs=("answers", "one image"))
    with pytest.raises(UserError, match=r"'vqa_classifier.3.weight' is missing"):
        load_released(path, task="vqa")
    state = {
        key: value for key, value in torch.load(path)["state_dict"].items() if "nlvr2" not in key and "mlm" not in key
    }
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=r"meter.ckpt has none of METER's heads"):
        load_any(path)


MODEL = {
    "clip": ["model/vision=clip_vit_b16", "model.vision.weights=null", "+model.vision.embed_dim=64",
             "model.vision.depth=2", "+model.vision.num_heads=1"],
    "swin": ["model/vision=swin_b", "model.vision.weights=null", "+model.vision.embed_dim=16",
             "+model.vision.depths=[1,2]", "+model.vision.num_heads=[1,2]", "+model.vision.window_size=8"],
}  # fmt: skip
REST = [
    "model.text.hidden_size=64", "model.text.num_hidden_layers=2", "model.text.num_attention_heads=1",
    "model.text.intermediate_size=96", "model.text.max_position_embeddings=20", "model.fusion.width=64",
    "model.fusion.depth=2", "model.fusion.num_heads=1", "data.max_length=18", "data.num_workers=0", "data.size=tiny",
    "trainer.enable_progress_bar=false", "logger=csv",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Prepared pairs of scenes, and how many tokens their texts have."""
    folder = tmp_path_factory.mktemp("pairs")
    make_scenes("tiny", folder / "raw", num_workers=1, layout="nlvr2")
    prepare(NLVR2(folder / "raw"), folder / "nlvr2", Options(vocab_size=300))
    tokens = json.loads((folder / "nlvr2/tokenizer/tokenizer.json").read_text())
    return folder / "nlvr2", len(tokens["model"]["vocab"])


@pytest.mark.parametrize("vision", MODEL)
def test_pre_training_is_a_start_at_another_resolution(vision, pairs, tmp_path):
    folder, vocabulary = pairs
    network = make(vision, vocabulary=vocabulary)
    path = write(network, tmp_path / "pretrain.ckpt")
    options = ["task=nlvr2", "model/topdown=none", f"data.dir={folder}", "data.image_size=64", *MODEL[vision], *REST]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        task, _ = build_task(compose("train", options))
    found = initialize(task.model, path)
    assert sorted(found.new) == sorted(name for name in task.model.state_dict() if name.startswith("head."))
    fusion = task.model.fusion
    types = network.token_type_embeddings.weight
    torch.testing.assert_close(fusion.token_type.weight, torch.cat([types, types[1:]]))
    torch.testing.assert_close(
        fusion.text_layers[1].expand.weight, network.cross_modal_text_layers[1].intermediate.dense.weight
    )
    assert fusion.image_pool == ("first" if vision == "clip" else "mean")
    if vision == "clip":  # METER's: the grid of positions by bicubic interpolation, [cls] as it is
        positions = network.vit_model.visual.positional_embedding
        grid = positions[1:].unflatten(0, (2, 2)).permute(2, 0, 1)[None]
        resized = torch.cat([positions[:1], F.interpolate(grid, size=(4, 4), mode="bicubic")[0].flatten(1).T])
        torch.testing.assert_close(task.model.vision.vit.pos_embed[0], resized)
    else:  # the table of offsets by bicubic interpolation
        table = network.vit_model.layers[0].blocks[0].attn.relative_position_bias_table
        resized = F.interpolate(table.T.unflatten(1, (7, 7))[None], size=(15, 15), mode="bicubic")[0].flatten(1).T
        torch.testing.assert_close(task.model.vision.vit.layers[0].blocks[0].attn.relative_position_bias_table, resized)


def test_fine_tuning_from_meter_and_measuring_meter_from_the_command_line(pairs, tmp_path):
    folder, vocabulary = pairs
    write(make(vocabulary=vocabulary), tmp_path / "pretrain.ckpt")
    options = ["task=nlvr2", f"data.dir={folder}", "data.image_size=32", *MODEL["clip"], *REST, "init=pretrain.ckpt"]
    steps = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "hydra.run.dir=run"]
    result = command("vlabs.train", *options, *steps, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "parameters loaded from pretrain.ckpt" in result.stderr + result.stdout
    tuned = write(make(task="nlvr2", vocabulary=vocabulary), tmp_path / "meter_nlvr2.ckpt")
    evaluate = [f"ckpt={tuned}", f"tokenizer={folder / 'tokenizer'}", f"data.dir={folder}", "data.num_workers=0"]
    result = command("vlabs.evaluate", "task=nlvr2", "split=dev", *evaluate, "hydra.run.dir=ev", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "ev/metrics.json").read_text())["statements"] == 48


def documented_commands():
    """What docs/encoders.md says of fine-tuning from METER, by experiment."""
    page = (Path(__file__).parent.parent / "docs/encoders.md").read_text()
    block = next(block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "METER=" in block)
    lines = block.replace("\\\n", " ").splitlines()
    common = shlex.split(lines[0].removeprefix("METER="))[0].split()
    trained = [shlex.split(line.partition("$METER")[2]) for line in lines if "vlabs train" in line]
    return {options[0].removeprefix("experiment="): [*common, *options] for options in trained}


@pytest.mark.parametrize(
    ("experiment", "size", "batch", "epochs", "rate", "head", "fusion"),
    [
        ("vqav2_absvit_base", 576, 512, 10, 5e-6, 50, 5),
        ("nlvr2_absvit_base", 288, 256, 10, 1e-5, 10, 5),
        ("snli_ve_absvit_base", 384, 64, 5, 2e-6, 10, 5),
        ("flickr30k_absvit_base", 384, 512, 10, 5e-6, 5, 5),
    ],
)
def test_the_documented_commands_are_meters_recipes(experiment, size, batch, epochs, rate, head, fusion):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", documented_commands()[experiment])
    assert (config.data.image_size, config.trainer.max_epochs) == (size, epochs)
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == batch
    lr = config.task.recipe.lr
    assert (lr.vision, lr.text, lr.head, lr.fusion) == pytest.approx((rate, rate, head * rate, fusion * rate))
    assert (config.model.vision.depth, config.model.vision.topdown) == (11, None)
    assert config.init == "meter_clip16_288_roberta_pretrain.ckpt"
    assert (config.task.recipe.weight_decay, config.task.recipe.warmup, config.data.rand_augment) == (
        0.01,
        0.1,
        "rand-m9-n2",
    )
