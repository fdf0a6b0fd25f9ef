"""Evaluation of question answering: the official accuracy, or the EvalAI submission where answers are kept back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError, show
from vlabs.evaluation.base import Evaluation, Setting
from vlabs.metrics.vqa import format_table, vqa_accuracy
from vlabs.runs.trainer import make_trainer
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import Prediction, VQATask
from vlabs.utils.files import write_json


class VQAEvaluation(Evaluation):
    """Answers every question of a split, and scores the answers, or writes them as a submission."""

    trained_for = ("vqa",)
    reads = VQADataModule

    def run(self, checkpoint: Checkpoint, data: VQADataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`."""
        rows = data.rows(setting.split)
        trainer = make_trainer(setting.trainer, logger=False, callbacks=setting.callbacks, enable_checkpointing=False)
        if trainer.world_size > 1:
            raise UserError("evaluate task=vqa runs on one device: pass trainer.devices=1")
        task = VQATask(checkpoint.model, checkpoint.preprocessing, data={}, recipe=Recipe())
        batches = trainer.predict(task, data.eval_dataloader(setting.split, with_targets=False))
        predictions = [prediction for batch in batches or [] for prediction in batch]  # type: ignore[union-attr]
        paths, metrics = report(predictions, rows, setting.out_dir, setting.split, str(checkpoint.path))
        for path in paths:
            print(path)
        return metrics


def report(
    predictions: list[Prediction], rows: datasets.Dataset, out_dir: Path, split: str, checkpoint: str
) -> tuple[list[Path], dict[str, Any]]:
    """Print and write what the predictions of a whole split are worth; returns the files written, and the metrics.

    Raises:
        UserError: a question was answered twice or not at all.
    """
    results = [{"question_id": p.question_id, "answer": p.answer} for p in predictions]
    questions = rows.select_columns(["question_id", "answers", "answer_type", "question_type"])
    asked = [question_id for row in questions for question_id in row["question_id"]]
    if sorted(asked) != sorted(p.question_id for p in predictions):
        raise UserError(f"split {split}: {len(asked)} questions, {len(predictions)} answers, not one for each")
    annotations = _annotations(questions)
    if annotations is None:
        return [write_json(out_dir / f"vqa_{split}_submission.json", results)], {}
    accuracy = vqa_accuracy({"annotations": annotations}, results)
    others = [accuracy["per_question"][a["question_id"]] for a in annotations if a["answer_type"] != "yes/no"]
    not_yes_no = sum(others) / len(others) if others else None
    show(format_table(accuracy))
    if not_yes_no is not None:
        print(f"\nall that are not yes/no: {not_yes_no:.2f}")
    metrics = {
        "checkpoint": checkpoint,
        "split": split,
        "overall": accuracy["overall"],
        "not_yes_no": not_yes_no,
        "per_answer_type": accuracy["per_answer_type"],
        "per_question_type": accuracy["per_question_type"],
    }
    per_question = {str(question_id): value for question_id, value in accuracy["per_question"].items()}
    paths = [
        write_json(out_dir / "metrics.json", metrics),
        write_json(out_dir / "results.json", results),
        write_json(out_dir / "per_question.json", per_question),
    ]
    return paths, metrics


def _annotations(rows: datasets.Dataset) -> list[dict[str, Any]] | None:
    """The official annotations of prepared rows; None where the answers are kept back."""
    annotations = []
    for row in rows:
        for n, question_id in enumerate(row["question_id"]):
            if not row["answers"][n]:
                return None
            annotations.append(
                {
                    "question_id": question_id,
                    "answer_type": row["answer_type"][n],
                    "question_type": row["question_type"][n],
                    "answers": [{"answer": answer} for answer in row["answers"][n]],
                }
            )
    return annotations
