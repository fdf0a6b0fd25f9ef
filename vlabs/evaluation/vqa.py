"""Evaluation of question answering: the official accuracy, or a submission to EvalAI if answers are not public."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Literal

import datasets
import torch
from lightning_fabric.utilities import move_data_to_device

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.preprocessing import decode_image
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.vqa import types_table, vqa_accuracy, yes_no
from vlabs.prediction.predictor import Predictor, load_any
from vlabs.runs.trainer import make_trainer
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import VQATask
from vlabs.utils.options import Distinct


class VQAEvaluation(Evaluation):
    """Answers all questions of a split, and scores the answers or writes them as a submission.

    Args:
        view: answer after a second look at the image (see `vlabs.prediction.second_look`); None for a single look.
        ensemble: other runs or checkpoints: the probabilities that they and `ckpt` give to an answer are averaged. Each
            reads images and texts as in its own training; an answer that a model does not know has probability 0.

    Raises:
        UserError: an ensemble is to look twice.
    """

    name = "vqa"
    needs = ("texts", "one image", "answers")
    reads = VQADataModule
    may_be_blind = True

    def __init__(self, view: Literal["crop", "masked"] | None = None, ensemble: Distinct[str] = ()) -> None:
        if view is not None and ensemble:
            raise UserError(f"task.view={view}: an ensemble looks once: leave task.view or task.ensemble out")
        self.view, self.ensemble = view, list(ensemble)
        self.in_trainer = view is None and not ensemble

    def measure(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> None:
        """See `Evaluation`; in percent."""
        split = results.split
        look = self._look_together if self.ensemble else self._look_once if self.view is None else self._look_twice
        answers = look(checkpoint, data, results)
        questions = data.rows(split).select_columns(["question_id", "answers", "answer_type", "question_type"])
        asked = [question_id for row in questions for question_id in row["question_id"]]
        if sorted(asked) != sorted(answer["question_id"] for answer in answers):
            raise UserError(f"split {split}: {len(asked)} questions have {len(answers)} answers, not one each")
        annotations = _annotations(questions)
        if annotations is None:
            results.json(f"vqa_{split}_submission.json", answers)
            return
        accuracy = vqa_accuracy({"annotations": annotations}, answers)
        of = accuracy["per_question"]
        given = {answer["question_id"]: answer["answer"] for answer in answers}
        for one in annotations:
            question_id = one["question_id"]
            row = {"question_id": question_id, "answer": given[question_id], "accuracy": of[question_id]}
            results.rows.append(row | {name: one[name] for name in ("answer_type", "question_type")})
        others = [row["accuracy"] for row in results.rows if row["answer_type"] != "yes/no"]
        means = [
            ["overall", results.mean("overall", list(of.values()))],
            ["all but yes/no", results.mean("not_yes_no", others)],
        ]
        results.table([f"{len(of):,} questions, {split}", "percent"], [*means, *types_table(accuracy)])
        results.metrics |= {
            "overall": accuracy["overall"],
            "not_yes_no": sum(others) / len(others) if others else None,
            "per_answer_type": accuracy["per_answer_type"],
            "per_question_type": accuracy["per_question_type"],
        }
        if all(one["answer_type"] == "yes/no" for one in annotations):
            truths = [Counter(item["answer"] for item in one["answers"]).most_common(1)[0][0] for one in annotations]
            found = yes_no([given[one["question_id"]] for one in annotations], truths)
            results.metrics |= found
            results.table(["of yes", "percent"], [[name, f"{value:.2f}"] for name, value in found.items()])
        results.json("results.json", answers)
        results.json("per_question.json", {str(question_id): value for question_id, value in of.items()})

    def _look_once(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> list[dict[str, Any]]:
        """The answers, in batches by Lightning."""
        setting = results.setting
        trainer = make_trainer(setting.trainer, logger=False, callbacks=setting.callbacks, enable_checkpointing=False)
        if trainer.world_size > 1:
            raise UserError("evaluate task=vqa runs on one device: pass trainer.devices=1")
        task = VQATask(checkpoint.model, checkpoint.preprocessing, data={}, recipe=Recipe())
        batches = trainer.predict(task, data.eval_dataloader(results.split, with_targets=False))
        predictions = [prediction for batch in batches or [] for prediction in batch]  # type: ignore[union-attr]
        return [{"question_id": one.question_id, "answer": one.answer} for one in predictions]

    @torch.inference_mode()
    def _look_together(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> list[dict[str, Any]]:
        """The answers of several models, batch by batch."""
        members = [checkpoint, *(load_any(path, answers=data.dir, needs=self.needs) for path in self.ensemble)]
        names = list(dict.fromkeys(name for member in members for name in member.preprocessing.names))
        place = {name: n for n, name in enumerate(names)}
        places, loaders = [], []
        for member in members:
            if member is not checkpoint:  # keep= is of all members
                member.use_share(results.setting.keep)
            member.model.to(results.device).eval()
            places.append(torch.tensor([place[name] for name in member.preprocessing.names], device=results.device))
            own = copy.copy(data)
            own.preprocessing = member.preprocessing
            loaders.append(own.eval_dataloader(results.split, with_targets=False))
        answers = []
        for batches in results.each(zip(*loaders, strict=True), "batch", len(loaders[0])):
            ids: list[Any] = batches[0].question_ids
            total = torch.zeros(len(ids), len(names), device=results.device)
            for member, to, batch in zip(members, places, batches, strict=True):
                task = VQATask(member.model, member.preprocessing, data={}, recipe=Recipe())
                logits = task.eval()(move_data_to_device(batch, results.device)).logits
                total[:, to] += member.model.head.probabilities(logits.float())  # type: ignore[operator]
            best = total.argmax(dim=1).tolist()
            answers += [{"question_id": n, "answer": names[one]} for n, one in zip(ids, best, strict=True)]
        results.metrics["ensemble"] = [str(member.path) for member in members[1:]]
        return answers

    def _look_twice(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> list[dict[str, Any]]:
        """The answers after a second look, an image at a time."""
        if data.blind:
            raise UserError("data.blind=true: there is nothing to look at again: leave task.view out")
        predictor = Predictor(checkpoint, results.device)
        answers = []
        for row in results.each(data.rows(results.split), "image"):
            image = decode_image(row["image"], f"image {row['image_id']}")
            found = predictor.answer(image, row["question"], top=1, second_look=self.view)
            answers += [
                {"question_id": question_id, "answer": answer.answers[0][0]}
                for question_id, answer in zip(row["question_id"], found, strict=True)
            ]
        results.metrics["view"] = self.view
        return answers


def _annotations(rows: datasets.Dataset) -> list[dict[str, Any]] | None:
    """The official annotations of prepared rows; None if the answers are not public."""
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
