"""The command `vlabs`: it starts at once, takes an option in either spelling, and knows classes of the user's own."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_one_line_error, clean_environment

from vlabs import cli
from vlabs.errors import UserError
from vlabs.models.registry import build
from vlabs.runs.config import _without_dashes
from vlabs.utils import plugins
from vlabs.utils.arguments import Parser

HELP = """
import sys
from vlabs import cli
image = sys.argv[1]
for name in cli.COMMANDS:
    sys.argv = ["vlabs", name, "--help"]
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code, name
sys.argv = ["vlabs", "train", "model=base"]  # without network
try:
    cli.main()
except SystemExit as left:
    assert left.code
print("@@", *sys.modules)
sys.argv = ["vlabs", "predict", "--ckpt", "scenes", "--image", image, "--question", "What is red?"]
cli.main()
print("@@", *sys.modules)
import wandb  # still there for others
"""


def test_a_command_imports_only_what_it_uses(tmp_path):
    image = next(Path(cli.__file__).parent.glob("page/pictures/*.jpg"))
    ran = subprocess.run(
        [sys.executable, "-c", HELP, image], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=clean_environment(tmp_path) | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told, of_help, of_predict = ran.stdout.split("@@ ")
    assert (tmp_path / "prediction.png").is_file()
    vit, text = "timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "FacebookAI/roberta-base"
    assert f"(HF_HUB_OFFLINE is set): {vit}, {text}. " in ran.stderr
    assert "pass model.vision.weights=DIR model.text.name_or_path=DIR\n" in ran.stderr
    assert "usage: vlabs predict" in told
    assert "vlabs train" in told
    prediction = {"torch", "torchvision", "timm", "matplotlib", "huggingface_hub", "numpy"}
    others = {"pandas", "datasets", "pyarrow", "gradio", "pytorch_lightning", "torchmetrics", "peft", "onnx"}
    others |= {"transformers", "scipy", "wandb", "torch._dynamo"}
    assert not {*of_help.split()} & ((prediction | others) - {"huggingface_hub"})
    assert not {*of_predict.split()} & others


def test_an_option_is_understood_in_either_spelling(monkeypatch, capsys):
    parser = Parser("x", "")
    parser.add_argument("--ckpt")
    parser.add_argument("--question")
    parser.add_argument("rest", nargs="*")
    monkeypatch.setattr(sys, "argv", ["x", "ckpt=a=b", "--question", "ckpt=c", "trainer.max_epochs=1"])
    read = parser.read()
    assert (read.ckpt, read.question, read.rest) == ("a=b", "ckpt=c", ["trainer.max_epochs=1"])
    given = ["--ckpt", "a b", "--split=val", "-m", "--config-dir", "conf", "task=vqa", "--multirun"]
    assert _without_dashes(given) == ["ckpt=a b", "split=val", *given[3:]]
    with pytest.raises(UserError, match="--ckpt has no value"):
        _without_dashes(["--ckpt"])
    monkeypatch.setattr(sys, "argv", ["vlabs", "--version"])
    cli.main()
    assert capsys.readouterr().out.startswith("vlabs 0.")


OWN = """
from torch import nn
from vlabs.models.registry import register

@register
class {}(nn.Module):
    def __init__(self) -> None:
        super().__init__()
"""


def test_classes_of_the_users_own_are_known(monkeypatch, tmp_path, in_process):
    (tmp_path / "plugged.py").write_text(OWN.format("Plugged"))
    (tmp_path / "named.py").write_text(OWN.format("Named"))
    (tmp_path / "broken.py").write_text("1 / 0")
    package = tmp_path / "plugged-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[vlabs.plugins]\nplugged = plugged\n")
    with pytest.raises(UserError, match="'Plugged'.*import=MODULE"):
        build({"class": "Plugged"})
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_plugins.cache_clear()
    assert type(build({"class": "Plugged"})).__name__ == "Plugged"
    plugins.import_modules(["named"])
    assert type(build({"class": "Named"})).__name__ == "Named"
    for module in ("nowhere", "broken"):
        for arguments in (["ckpt=scenes", f"import={module}"], ["--ckpt", "scenes", "--import", module]):
            refused = in_process("vlabs.evaluate", [*arguments, "hydra.run.dir=out"], tmp_path)
            assert_one_line_error(refused, f"import={module} cannot be imported")
