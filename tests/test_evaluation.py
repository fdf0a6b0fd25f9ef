"""Evaluations: one writer of what they find, and models measured by what they can do, whatever their task."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error
from omegaconf import OmegaConf
from test_classify import TINY, objects  # noqa: F401  (a fixture)

import vlabs
from data_prep.scenes.objects import make_several
from vlabs.checkpoints.abilities import Ability, check_able
from vlabs.checkpoints.checkpoint import Checkpoint, load_checkpoint
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results, Setting
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.utils.table import table


def test_a_table_lines_up_and_no_cell_breaks_it():
    lines = table(["map", "energy"], [["norm", "1.5 [1.0, 2.0]"], ["a|b\n", "–"]]).splitlines()
    assert lines == [
        "| map    |         energy |",
        "| ------ | -------------: |",
        "| norm   | 1.5 [1.0, 2.0] |",
        r"| a\|b\n |              – |",
    ]


def test_rows_means_and_tables_are_written_and_printed_in_one_place(tmp_path, capsys):
    trainer = OmegaConf.create({"accelerator": "cpu", "enable_progress_bar": False})
    results = Results("mine", SimpleNamespace(path=Path("run")), Setting("val", tmp_path, trainer))
    for batch in results.batches([torch.tensor([0.0, 3.0]), torch.tensor([6.0])]):
        results.add(id=[f"q{value:g}" for value in batch.tolist()], error=batch)
    errors = results.frame["error"]
    results.means({"mean_error": errors}, "pixels")
    assert results.mean("of_one", errors[:1]) == "0.00"
    assert results.mean("of_none", errors[:0]) == "–"
    results.write()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    mean, low, high = bootstrap_interval([0.0, 3.0, 6.0])
    assert metrics == {
        "checkpoint": "run", "split": "val", "mean_error": mean, "mean_error_interval": [low, high], "of_one": 0.0,
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert lines == [{"id": "q0", "error": 0.0}, {"id": "q3", "error": 3.0}, {"id": "q6", "error": 6.0}]
    page = (tmp_path / "mine.md").read_text()
    assert f"| mean error | {mean:.2f} [{low:.2f}, {high:.2f}] |" in page
    files = [str(tmp_path / name) for name in ("mine.md", "mine.jsonl", "metrics.json")]
    assert capsys.readouterr().out == f"\n{page}\n" + "".join(f"{file}\n" for file in files)


def test_an_evaluation_runs_under_the_precision_that_is_asked_for(tmp_path):
    class Product(Evaluation):
        name = "product"

        def measure(self, checkpoint, data, results):
            results.metrics["dtype"] = str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    def dtype(precision):
        options = {"accelerator": "cpu", "precision": precision, "enable_progress_bar": False, "devices": 2}
        trainer = OmegaConf.create({"_target_": "pytorch_lightning.Trainer"} | options)
        checkpoint = SimpleNamespace(path=Path("run"), keep=0.25)
        found = Product().run(checkpoint, SimpleNamespace(blind=False), Setting("val", tmp_path, trainer))
        assert found["keep"] == 0.25
        return found["dtype"]

    assert dtype("32-true") == dtype(32) == "torch.float32"
    assert dtype("bf16-mixed") == "torch.bfloat16"
    for refused in ("bf16-true", "64-true"):
        with pytest.raises(UserError, match=f"trainer.precision={refused}: .* 32-true, bf16-mixed and 16-mixed"):
            dtype(refused)


def test_a_network_of_your_own_has_no_share_of_patches():
    checkpoint = Checkpoint(torch.nn.Linear(1, 1), Preprocessing(8, ""), "mine", {}, Path("run"))
    checkpoint.use_share(None)
    assert checkpoint.keep == 1
    with pytest.raises(UserError, match="keep=0.5: a Linear has no second pass"):
        checkpoint.use_share(0.5)


OWN = '''
import torch
import torch.nn.functional as F

from vlabs.models.registry import register
from vlabs.tasks.classify import ClassifyTask
from vlabs.tasks.vqa import VQATask


@register
class OneLayer(torch.nn.Module):
    """Says how probable every answer is, as a head does whose model can be asked."""

    def __init__(self, in_features: int, num_answers: int, softmax: bool = False) -> None:
        super().__init__()
        self.answers = torch.nn.Linear(in_features, num_answers)

    def forward(self, pooled):
        return self.answers(pooled)

    def probabilities(self, logits):
        return logits.float().softmax(dim=-1)


class MarginTask(VQATask):
    name = "margin"

    def answer_loss(self, logits, targets):
        return F.multilabel_soft_margin_loss(logits, targets)


class BreedTask(ClassifyTask):
    name = "breed"
'''
CONFIGS = {
    "margin": "- vqa\ntask: {_target_: own_tasks.MarginTask}\nmodel: {head: {_target_: own_tasks.OneLayer}}\n",
    "breed": "- classify\ntask: {_target_: own_tasks.BreedTask}\n",
}


@pytest.fixture
def trained(tmp_path, in_process):
    """Train a task of a user's own for one step; its run is called as the task."""
    (tmp_path / "own_tasks.py").write_text(OWN)
    (tmp_path / "conf/task").mkdir(parents=True)
    for name, text in CONFIGS.items():
        (tmp_path / f"conf/task/{name}.yaml").write_text(f"# @package _global_\ndefaults:\n{text}")

    def train(task, options):
        steps = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "logger=csv", f"hydra.run.dir={task}"]
        result = in_process("vlabs.train", ["--config-dir", "conf", *options, f"task={task}", *steps], tmp_path)
        assert result.returncode == 0, result.stderr

    def evaluate(task, of, *options):
        given = [f"task={task}", f"ckpt={of}", "import=own_tasks", "split=val", "data.num_workers=0"]
        return in_process("vlabs.evaluate", [*given, *options, f"hydra.run.dir={of}-{task}"], tmp_path)

    return train, evaluate


def test_what_a_model_lacks_is_said_and_an_image_encoder_alone_reads_no_texts(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    check_able(model, "vqa", ("texts", "answers", "one image"), Path("x.ckpt"))
    for task, need, message in (
        ("vqa", "two images", "reads a text with one image, not two"),
        ("vqa", Ability(lambda network: False, "sees nothing"), "sees nothing$"),
        ("naming", "texts", "has only a trained image encoder: start from it with init="),
    ):
        with pytest.raises(UserError, match=f"^x.ckpt was trained for the task '{task}': the model {message}"):
            check_able(model, task, (need,), Path("x.ckpt"))


def found(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_task_of_your_own_with_answers_is_grounded_steered_scored_and_predicted(
    trained, tiny_options, tiny_data, tmp_path
):
    train, evaluate = trained
    train("margin", [option for option in tiny_options if option != "task=vqa"])
    half = "trainer.precision=bf16-mixed"
    for task, options in (
        ("grounding", ["task.maps=[norm,weights]", half]), ("steering", ["task.alphas=[]", half]), ("vqa", []),
    ):  # fmt: skip
        result = evaluate(task, "margin", *options)
        assert result.returncode == 0, result.stderr
    assert 0 < found(tmp_path / "margin-grounding")["weights/energy"] < 100
    assert "answers_other" in (tmp_path / "margin-steering/steering.md").read_text()
    results = json.loads((tmp_path / "margin-vqa/results.json").read_text())
    given = {one["question_id"]: one["answer"] for one in results}
    row = load_split(tiny_data, "val")[0]
    (tmp_path / "picture.jpg").write_bytes(row["image"])
    answer = vlabs.load(tmp_path / "margin").answer(tmp_path / "picture.jpg", row["question"][:1], top=1000)[0]
    assert answer.answers[0][0] == given[row["question_id"][0]]
    assert sum(share for _, share in answer.answers) == pytest.approx(1, abs=1e-4)
    for task, lacking in (("control", "does not classify images"), ("retrieval", "no head with a `score`")):
        assert_one_line_error(evaluate(task, "margin"), "was trained for the task 'margin': the model", lacking)


def test_a_task_of_your_own_on_classes_is_asked_for_them(trained, objects, tmp_path):  # noqa: F811
    train, evaluate = trained
    make_several("tiny", tmp_path / "several", 4)
    train("breed", [*TINY, f"data.dir={objects}"])
    result = evaluate("control", "breed", "task.several=several", "task.num_images=4", "trainer.precision=bf16-mixed")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "breed-control/control.jsonl").read_text().splitlines()]
    chosen = [line["chosen/after"] for line in lines if line["layout"] == "several"]
    assert found(tmp_path / "breed-control")["several/chosen/after"] == pytest.approx(np.mean(chosen))
    assert_one_line_error(evaluate("grounding", "breed"), "was trained for the task 'breed'", "does not read texts")
