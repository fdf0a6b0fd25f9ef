"""Evaluate a checkpoint: `python -m vlabs.evaluate ckpt=RUN split=val`.

A split with answers gives the official accuracy (metrics.json, and results.json in the official form); one whose
answers are kept back gives the EvalAI submission.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.callbacks import TQDMProgressBar

from vlabs.checkpoint import Checkpoint
from vlabs.config import make_trainer, run_hydra, save_config
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.logging import quiet_lightning
from vlabs.metrics.vqa import vqa_accuracy
from vlabs.predictor import load_any
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import Prediction, VQATask
from vlabs.vqa_eval import format_table


def run(config: DictConfig) -> None:
    """Answer every question of a split, and score or submit the answers."""
    out_dir = Path(HydraConfig.get().runtime.output_dir)
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    checkpoint = load_any(config.ckpt, answers=config.data.dir, tokenizer=config.tokenizer)
    data = VQADataModule(
        _data_dir(config, checkpoint),
        eval_batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        minival_images=config.data.minival_images,
        preprocessing=checkpoint.preprocessing,
    )
    rows = data.rows(config.split)
    trainer = make_trainer(
        config.trainer,
        logger=False,
        callbacks=[TQDMProgressBar()] if config.trainer.enable_progress_bar else None,
        enable_checkpointing=False,
    )
    if trainer.world_size > 1:
        raise UserError("evaluate runs on one device: pass trainer.devices=1")
    task = VQATask(checkpoint.model, checkpoint.preprocessing, data={}, recipe=Recipe())
    batches = trainer.predict(task, data.eval_dataloader(config.split, with_targets=False))
    predictions = [prediction for batch in batches or [] for prediction in batch]  # type: ignore[union-attr]
    save_config(config, out_dir / "config.yaml")
    for path in report(predictions, rows, out_dir, str(config.split), str(checkpoint.path)):
        print(path)


def report(
    predictions: list[Prediction], rows: datasets.Dataset, out_dir: Path, split: str, checkpoint: str
) -> list[Path]:
    """Print and write what the predictions of a whole split are worth; returns the files written.

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
        return [_write_json(out_dir / f"vqa_{split}_submission.json", results)]
    accuracy = vqa_accuracy({"annotations": annotations}, results)
    others = [accuracy["per_question"][a["question_id"]] for a in annotations if a["answer_type"] != "yes/no"]
    not_yes_no = sum(others) / len(others) if others else None
    print(format_table(accuracy))
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
    return [_write_json(out_dir / "metrics.json", metrics), _write_json(out_dir / "results.json", results)]


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


def _data_dir(config: DictConfig, checkpoint: Checkpoint) -> str:
    if config.data.dir is not None:
        return str(config.data.dir)
    directory = str(checkpoint.data["dir"])
    if not Path(directory).is_dir():
        raise UserError(f"the data that {checkpoint.path} was trained on is not at {directory}: pass data.dir=FOLDER")
    return directory


def _write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return partial.replace(path)


def main() -> None:
    """Entry point of `python -m vlabs.evaluate`."""
    run_hydra(run, "evaluate")


if __name__ == "__main__":
    main()
