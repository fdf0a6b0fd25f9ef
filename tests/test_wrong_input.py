"""Wrong input: one line that names it, a non-zero exit, nothing half-written."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line_error, command
from PIL import Image

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.images import ImageReader
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.prediction.predictor import load
from vlabs.training.callbacks.checkpoints import WholeCheckpointIO


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (40, 32), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model/topdown=absvitt", ["model/topdown=absvitt", "absvit, absvit_qkv, absvit_released, codebook"]),
        ("model/topdown=absvit_released task=classify", ["absvit_released", "task=classify does not have", "absvit"]),
        ("data=vqa2", ["vqa2", "scenes", "vqav2"]),
        ("trainer.max_epoch=3", ["trainer.max_epoch", "max_epochs"]),
        ("optimiser=sgd", ["optimiser", "seed"]),
        ("task.recipe.warmup=2", ["task.recipe.warmup=2"]),
        ("data.train_split=val", ["data.train_split", "train+val"]),
        ("task.prior_loss.directions=up", ["task.prior_loss.directions=up", "both, text, image"]),
        ("model.prior_token=sep", ["prior_token 'sep'", "cls, mean, eos"]),
        ("model.vision.architecture=beit_base_patch16_224", ["beit_base_patch16_224", "pre-norm"]),
        ("data.batch_size=0", ["data.batch_size=0", "at least 1"]),
        ("data.questions_per_image=-1", ["data.questions_per_image=-1"]),
        ("data.num_workers=many", ["data.num_workers=many"]),
        ("model.vision.patch_size=9", ["patch size 9"]),
        ("model.vision.topdown.alpha=big", ["big"]),
        ("model.fusion.num_heads=5", ["5 heads"]),
        ("task.prior_loss.temperature=0", ["task.prior_loss.temperature=0", "above 0"]),
        ("task.recipe.lr.vision=fast", ["task.recipe.lr.vision=fast"]),
        ("trainer.max_epochs=abc", ["trainer.max_epochs=abc"]),
        ("trainer.precision=12", ["Precision", "bf16-mixed"]),
        ("trainer.profiler=fast", ["trainer.profiler=fast", "simple, advanced"]),
        ("data=scenes data.size=huge", ["data.size=huge", "tiny, small, medium, large"]),
        ("task.freeze=[visio]", ["visio", "vision"]),
        ("init=nowhere.ckpt", ["nowhere.ckpt"]),
        ("model=base", ["vit_base_patch16_224", "weights=DIR", "FacebookAI/roberta-base", "name_or_path=DIR"]),
        ("model/vision=base +model.vision.embed_dim=24", ["vit_base_patch16_224", "model.vision.weights=DIR"]),
        ("model/text=roberta_base", ["FacebookAI/roberta-base", "model.text.name_or_path=DIR"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_override_is_answered_with_the_choices(override, parts, tiny_data, tmp_path, in_process):
    result = in_process(
        "vlabs.train",
        ["data=vqav2", f"data.dir={tiny_data}", "data.num_workers=0", "logger=csv", *override.split()],
        tmp_path,
    )
    assert_one_line_error(result, *parts)
    assert not list(tmp_path.glob("outputs/**/*.ckpt"))


def test_options_of_embedded_data_are_checked_before_it_is_made(tmp_path, in_process):
    result = in_process("vlabs.train", ["task=vqa", "data.size=tiny", "data.batch_size=-3", "logger=csv"], tmp_path)
    assert_one_line_error(result, "data.batch_size=-3", "at least 1")
    assert not (tmp_path / "data").exists()


def test_a_wrong_option_leaves_no_folder(tmp_path, in_process):
    result = in_process("vlabs.train", ["task.label_smoothing=abc", "logger=csv", "hydra.run.dir=bad"], tmp_path)
    assert_one_line_error(result, "task.label_smoothing=abc")
    assert not (tmp_path / "bad").exists()


def test_data_that_is_not_there_is_named(tmp_path, in_process):
    result = in_process("vlabs.train", ["data=vqav2", "logger=csv"], tmp_path)
    assert_one_line_error(result, "data/vqav2", "vlabs prepare vqav2")


def test_evaluation_without_a_checkpoint_asks_for_one(tmp_path, in_process):
    assert_one_line_error(in_process("vlabs.evaluate", [], tmp_path), "pass ckpt=")


def test_unknown_split_is_answered_with_the_splits(tiny_run, tmp_path, in_process):
    result = in_process("vlabs.evaluate", [f"ckpt={tiny_run[0]}", "split=vall"], tmp_path)
    assert_one_line_error(result, "vall", "distractors", "test", "val")


@pytest.mark.parametrize("name", ["text.ckpt", "text.safetensors", "half.ckpt", "half.safetensors", "list.ckpt"])
def test_a_file_that_is_no_checkpoint_is_named(name, tiny_run, tmp_path):
    from vlabs.checkpoints.checkpoint import export_safetensors

    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("this is not a checkpoint")
    elif name == "list.ckpt":
        torch.save([1, 2], path)
    else:
        whole = tiny_run[0] / "checkpoints/best.ckpt"
        if path.suffix == ".safetensors":
            whole = export_safetensors(whole, tmp_path / "whole.safetensors")
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=name):
        load(path)


def test_an_index_of_shards_is_no_weights(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match="is JSON, not weights: name the weights, or the folder"):
        load(path)


def test_a_checkpoint_of_another_task_is_named():
    with pytest.raises(UserError, match="trained for the task 'retrieval': the model has no head with `probabilities`"):
        load("scenes_search")


def test_a_checkpoint_of_another_size_is_named(tiny_run, tmp_path):
    content = torch.load(tiny_run[0] / "checkpoints/best.ckpt", weights_only=True)
    content["vlabs"]["architecture"]["fusion"]["width"] = 8
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="does not fit the architecture"):
        load(tmp_path / "other.ckpt")


def test_a_checkpoint_cannot_name_code(tiny_run, tmp_path):
    content = torch.load(tiny_run[0] / "checkpoints/best.ckpt", weights_only=True)
    content["vlabs"]["architecture"]["head"] = {"class": "subprocess.Popen", "args": "true"}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="subprocess.Popen"):
        load_checkpoint(tmp_path / "evil.ckpt")


def test_an_image_that_is_none_is_named_and_no_figure_is_left(tiny_run, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    arguments = ["--ckpt", tiny_run[0], "--image", "notes.png", "--question", "What?", "--out", "out.png"]
    assert_one_line_error(command("vlabs.predict", *arguments, cwd=tmp_path), "notes.png")
    assert not (tmp_path / "out.png").exists()


def test_a_missing_image_and_an_empty_question_are_named(tiny_run, picture):
    predictor = load(tiny_run[0])
    with pytest.raises(UserError, match="nowhere.png"):
        predictor.answer("nowhere.png", ["What?"])
    with pytest.raises(UserError, match="empty"):
        predictor.answer(picture, ["What?", "  "])


def test_an_image_that_rots_after_preparation_stops_training_or_is_counted(tiny_data, tiny_options, tmp_path, capfd):
    import datasets

    from vlabs.data.features import VQA_FEATURES
    from vlabs.data.vqa import VQADataModule

    rows = datasets.load_from_disk(str(tiny_data / "train")).to_list()
    rows[3]["image"] = rows[3]["image"][:200]
    data = VQADataModule(tiny_data, image_size=32, num_workers=0)
    data.rows = lambda split: datasets.Dataset.from_list(rows, features=VQA_FEATURES)
    with pytest.raises(UserError, match=f"image {rows[3]['image_id']}"):
        list(data.train_dataloader())
    data.on_bad = "skip"
    batches = list(data.train_dataloader())
    assert {i for batch in batches for i in batch.skipped} == {rows[3]["image_id"]}
    answered = {i for batch in batches for i in batch.question_ids}
    assert answered.isdisjoint(rows[3]["question_id"])
    assert f"left out: image {rows[3]['image_id']}" in capfd.readouterr().err


def test_a_rotten_image_in_a_loader_process_is_one_line_that_names_it(tiny_data, tiny_options, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    (shard,) = (tmp_path / "data/train").glob("*.arrow")
    content = bytearray(shard.read_bytes())
    start = content.index(b"\xff\xd8\xff")  # of the first JPEG
    content[start : start + 100] = bytes(100)
    shard.write_bytes(content)
    first = load_split(tiny_data, "train")[0]["image_id"]
    options = [*tiny_options, f"data.dir={tmp_path / 'data'}", "data.num_workers=1", "trainer.limit_train_batches=1.0"]
    result = command("vlabs.train", *options, "logger=csv", "hydra.run.dir=run", cwd=tmp_path)
    assert_one_line_error(result, f"image {first} is not a whole image", "data.on_bad=skip")
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"
    skipping = command("vlabs.train", *options, "logger=csv", "data.on_bad=skip", "hydra.run.dir=again", cwd=tmp_path)
    assert skipping.returncode == 0, skipping.stderr
    assert f"left out: image {first}" in skipping.stderr
    # What measures maps leaves no image out, and does not say that it would.
    reader = ImageReader(load_split(tmp_path / "data", "train"), Preprocessing(32, ""))
    with pytest.raises(UserError, match=f"image {first} .*; prepare the data again$"):
        reader.read(0, 0)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    path = tmp_path / "run/checkpoints/last.ckpt"
    writer = WholeCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # what is written ends as on a full disk
    try:
        with pytest.raises(
            UserError, match=r"last\.ckpt cannot be written: the disk is full.*continue with resume=.*/run$"
        ):
            writer.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
