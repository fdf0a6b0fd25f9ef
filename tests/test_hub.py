"""Models as folders and on the hub: what goes there, comes back as it was, and nothing in it is executed."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import assert_one_line_error, clean_environment, command
from hub_server import hub_server
from PIL import Image

import vlabs
from vlabs.checkpoints.card import model_card
from vlabs.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from vlabs.errors import UserError


@pytest.fixture(scope="module")
def hub():
    with hub_server() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """The model of a run as a folder, with metrics in its card."""
    cwd = tmp_path_factory.mktemp("folder")
    (cwd / "metrics.json").write_text(json.dumps({"overall": 31.25, "split": "val", "data": "scenes", "images": 12}))
    Image.new("RGB", (9, 7), "red").save(cwd / "figure.jpg", comment=b"private")
    result = command("vlabs.export", "--ckpt", tiny_run[0], "--out", "model", "--licence", "cc-by-4.0",
                     "--metrics", "metrics.json", "--picture", "figure.jpg", cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cwd / "model"


def answers_of(path):
    return vlabs.load(path).answer(Image.new("RGB", (40, 30), "blue"), ["What color is it?"])[0].answers


def test_a_folder_answers_as_the_run_does_and_can_be_evaluated_and_started_from(
    folder, tiny_run, tiny_options, tmp_path
):
    assert answers_of(folder) == answers_of(tiny_run[0])
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "picture.png", "preprocessing.json", "tokenizer.json",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] != ["model.partial"]
    started = command("vlabs.train", *tiny_options, "logger=csv", f"init={folder}", "hydra.run.dir=run", cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    assert "  new (" not in started.stdout
    again = command("vlabs.export", "--ckpt", folder, "--out", "one.safetensors", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert answers_of(tmp_path / "one.safetensors") == answers_of(folder)


def test_the_card_is_filled_from_the_run(folder, tiny_run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "visual-question-answering"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results == {"overall": 31.25}
    summary = json.loads((tiny_run[0] / "summary.json").read_text())
    assert summary["command"] in card.text
    assert f"{summary['best/val/vqa_accuracy']:.2f}" in card.text
    assert "vqa on scenes (320 questions, 40 images)" in card.text
    assert "![An example](picture.png)" in card.text
    assert Image.open(folder / "picture.png").size == (9, 7)
    assert b"private" not in (folder / "picture.png").read_bytes()
    assert "## Limits\n\nIts training: vqa on scenes" in card.text
    # Where the data lay on the machine that trained it is nobody's business.
    everything = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    assert str(tiny_run[0].parent.parent) not in everything.replace(summary["command"], "")


def test_the_card_names_the_weights_that_training_started_from(tmp_path):
    checkpoint = load_checkpoint("scenes")
    parts = "{vision: {weights: /mine/vit.pth}, text: {name_or_path: user/text}}"
    for config, base, said in (
        (f"model: {parts}", ["user/text"], ["vision started from: `vit.pth`", "text started from: `user/text`"]),
        (f"{{init: user/model, model: {parts}}}", ["user/model"], ["model started from: `user/model`"]),
        ("{init: null, model: {vision: {weights: null}}}", None, []),
        ("[damaged", None, []),
    ):
        (tmp_path / "config.yaml").write_text(config)
        card = model_card(checkpoint, tmp_path, "x")
        assert card.data.base_model == base
        assert all(f"- {one}" in card.text for one in said)
        assert card.text.count("started from") == len(said)


def test_a_model_goes_to_the_hub_and_comes_back(hub, tiny_run, tmp_path):
    environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "right", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    pushed = command(
        "vlabs.export", "--ckpt", tiny_run[0], "--to-hub", "user/tiny", "--private", cwd=tmp_path, **environment
    )
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().startswith(f"{hub.address}/user/tiny/commit/")
    assert hub.private == {"user/tiny": True}
    assert {"README.md", "config.json", "model.safetensors", "preprocessing.json", "tokenizer.json"} <= set(
        hub.files["user/tiny"]
    )
    program = """
import vlabs
from PIL import Image
picture = Image.new("RGB", (40, 30), "blue")
for name in ("user/tiny", "user/tiny@main"):
    print(vlabs.load(name).answer(picture, ["What color is it?"])[0].answers)
model = vlabs.VisionLanguageModel.from_pretrained("user/tiny")
model.push_to_hub("user/again")
print(vlabs.load("user/again").answer(picture, ["What color is it?"])[0].answers)
try:
    vlabs.load("user/nobody")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=clean_environment(tmp_path) | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.strip().splitlines()
    assert lines == [str(answers_of(tiny_run[0]))] * 3
    assert last.startswith("UserError user/nobody is not a local file or folder")
    assert "hf download user/nobody --local-dir DIR" in last
    refused = command("vlabs.export", "--ckpt", tiny_run[0], "--to-hub", "user/tiny", cwd=tmp_path,
                      **environment | {"HF_TOKEN": "wrong"})  # fmt: skip
    assert_one_line_error(refused, "--to-hub user/tiny", "hf auth login")


def test_from_pretrained_gives_the_same_model_for_tensors(folder, tiny_run, tmp_path):
    model = vlabs.VisionLanguageModel.from_pretrained(folder)
    whole = load_checkpoint(tiny_run[0]).model
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(5, 50, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            model(images, ids, torch.ones_like(ids)).logits, whole(images, ids, torch.ones_like(ids)).logits
        )
    # A model that nothing is known of but its architecture has no preprocessing to be asked with.
    del model.about
    model.save_pretrained(tmp_path / "bare")
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = vlabs.VisionLanguageModel.from_pretrained(tmp_path / "bare")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="without its task"):
        vlabs.load(tmp_path / "bare")


@pytest.mark.parametrize("damage", ["config", "class", "weights", "shape", "preprocessing"])
def test_a_damaged_folder_is_one_line_and_runs_nothing(damage, folder, tmp_path):
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    config = json.loads((bad / "config.json").read_text())
    if damage == "config":
        (bad / "config.json").write_text("{")
    elif damage == "class":
        config["architecture"]["head"] = {"class": "subprocess.Popen", "args": "true"}
        (bad / "config.json").write_text(json.dumps(config))
    elif damage == "weights":
        (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:5000])
    elif damage == "shape":
        state = safetensors.torch.load_file(bad / "model.safetensors")
        state["prior.project.weight"] = state["prior.project.weight"][:3].contiguous()
        safetensors.torch.save_file(state, bad / "model.safetensors")
    else:
        (bad / "preprocessing.json").write_text('{"image_size": "large", "file": "/etc/passwd"}')
    with pytest.raises(UserError, match="bad"):
        vlabs.load(bad)


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import vlabs.checkpoints.checkpoint as module

    monkeypatch.setattr(module, "download", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="outputs/runn does not exist"):
        find_checkpoint("outputs/runn")
    for name in ("run.ckpt", "a/b/c", "scenes_", "../up/down"):
        with pytest.raises(UserError, match="does not exist"):
            find_checkpoint(name)


def test_wrong_options_of_the_export_are_one_line(tiny_run, folder, tmp_path):
    for arguments, parts in (
        (["--out", "model.ckpt"], ["--out model.ckpt", ".safetensors"]),
        (["--out", folder], ["already exists"]),
        (["--out", "x", "--metrics", "nowhere"], ["--metrics", "nowhere"]),
        (["--out", "x", "--picture", "nowhere.png"], ["image nowhere.png", "No such file"]),
        (["--to-hub", "name"], ["--to-hub name", "user/name"]),
        (["--out", "x.safetensors", "--format", "onnx"], ["--out FOLDER"]),
        (["--out", "x.safetensors", "--license", "mit"], ["--license", "--out FOLDER"]),
        (["--out", "x", "--format", "onnx", "--metrics", "m"], ["--metrics", "without --format"]),
    ):
        assert_one_line_error(command("vlabs.export", "--ckpt", tiny_run[0], *arguments, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())
