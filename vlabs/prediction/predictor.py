"""A trained model that answers questions about images, or labels statements about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlabs.attention import VIEWS
from vlabs.attention.maps import DEAD, MAPS, default_map, look_by, words_missed
from vlabs.checkpoints.abilities import Ability, check_able, pictures_per_text
from vlabs.checkpoints.checkpoint import Checkpoint, find_checkpoint, read_tensors, rebuild
from vlabs.checkpoints.released import ReleasedVLM, find_state, load_released, pictures_of, task_of
from vlabs.data.decoding import as_shown
from vlabs.data.prepared import LABELS, read_answers
from vlabs.data.preprocessing import Preprocessing, check_text, decode_image
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError
from vlabs.models.heads import VQAHead
from vlabs.models.text import OtherEncoder, RobertaEncoder
from vlabs.prediction.second_look import join, view_of
from vlabs.utils.archives import read_regular
from vlabs.utils.device import find_device

AnyImage = str | Path | Image.Image
ANSWERS = ("texts", "answers")
"""The abilities that a predictor needs."""

# Tokenizers of the text encoders that METER was trained with.
_TOKENIZERS: dict[type, str] = {
    RobertaEncoder: "FacebookAI/roberta-base",
    OtherEncoder: "google-bert/bert-base-uncased",
}


@dataclass
class Answer:
    """The answer to one question, or the label of one statement.

    Attributes:
        question: the question.
        answers: the best answers with their probabilities, best first: sigmoid for answers, of which several may be
            right; softmax for labels.
        maps: where the model looked: one map (rows, columns) per image over its patch grid, non-negative, in
            `Preprocessing.box`.
        map_name: the name of that map: `normgrad` if ξ is similar to no patch, so that all its weights are 0.
        steers: whether ξ is similar to any patch of the images; None if no ξ steers.
        new_words: words of the question that no training text had; empty if the checkpoint does not know.
        words: the words of the question, each with its share of how far the best score falls without it (`as_shares`);
            None unless the map is `relevance`.
        before: the best answers of the first look; None without a second one. After it, `answers` has those alone that
            were joined.
    """

    question: str
    answers: list[tuple[str, float]]
    maps: list[np.ndarray]
    map_name: str
    steers: bool | None = None
    new_words: list[str] = field(default_factory=list)
    words: list[tuple[str, float]] | None = None
    before: list[tuple[str, float]] | None = None

    @property
    def map(self) -> np.ndarray:
        """The map of the first image, which is usually the only one."""
        return self.maps[0]

    @property
    def counted(self) -> str:
        """The five words that counted most, in words, of those with at least half a percent; empty where that is not
        known, or without any of them the best score does not fall."""
        best = [word for word in sorted(self.words or [], key=lambda word: -word[1])[:5] if word[1] >= 0.005]
        return f"words that counted: {', '.join(f'{word} {share:.0%}' for word, share in best)}" if best else ""

    @property
    def warnings(self) -> list[str]:
        """Warnings about the answer, in words."""
        said = [f"its training never had: {', '.join(self.new_words)}"] if self.new_words else []
        if self.steers is False:
            said.append(DEAD.format(self.map_name))
        return said


class Predictor:
    """Answers questions or labels statements, with any model whose head gives probabilities.

    Args:
        checkpoint: the model and its preprocessing.
        device: where to run, `cpu` or `cuda`.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        if not checkpoint.preprocessing.names:
            raise UserError(f"{checkpoint.path} has no names of answers or labels, so it cannot answer")
        self.model = checkpoint.model.to(device)
        self.preprocessing = checkpoint.preprocessing
        self.device = device
        self.pictures = pictures_per_text(checkpoint.model)

    @property
    def alpha(self) -> float | None:
        """The strength of the top-down signal; None if the model has none."""
        return getattr(self.model.vision.topdown, "alpha", None)

    @property
    def meaning(self) -> str:
        """The meaning of the percentages, from the head's `meaning`."""
        return str(getattr(self.model.head, "meaning", "what the head computes from its logits"))

    @torch.inference_mode()
    def prior(self, text: str) -> Tensor:
        """ξ of a text, (1, D_vision).

        Raises:
            UserError: the model has no ξ or is not steered by it, or the text is empty.
        """
        if self.model.prior is None:
            raise UserError("this model has no ξ that could be replaced")
        if self.model.vision.reads_words:
            raise UserError("all words steer this model: there is no ξ that could be replaced")
        check_text("the text of the other ξ", text)
        input_ids, mask = (t.to(self.device) for t in self.preprocessing.pad(self.preprocessing.token_ids([text])))
        return self.model.prior(self.model.text(input_ids, mask), input_ids, mask)  # type: ignore[no-any-return]

    def answer(
        self,
        image: AnyImage | Sequence[AnyImage],
        questions: Sequence[str],
        top: int = 5,
        map_name: str | None = None,
        alpha: float | None = None,
        prior_of: str | None = None,
        second_look: str | None = None,
    ) -> list[Answer]:
        """Answer questions about one image; they share its bottom-up pass.

        Args:
            image: a file, or a Pillow image; two of them for a model of pairs (nlvr2), left before right.
            questions: any texts; they are cut at the model's limit.
            top: number of answers per question.
            map_name: the map to show (see `attention_map`); None for `default_map`.
            alpha: strength of the top-down signal instead of the model's own.
            prior_of: a text whose ξ steers the encoder instead of the questions' own.
            second_look: answer again from a view that the map gives (`vlabs.prediction.second_look`), and join both.

        Raises:
            UserError: a file is missing or not an image, there are too many or too few images, a question is empty, the
                map or the view does not exist, α is not a number or too large, or the model has no α or no ξ to
                replace.
        """
        if isinstance(questions, str):
            raise TypeError("questions is a list of texts")
        for question in questions:
            check_text("a question", question)
        map_name = map_name or default_map(self.model)
        if map_name not in MAPS:
            raise UserError(f"there is no map {map_name!r}: choose one of {', '.join(MAPS)}")
        if second_look is not None and second_look not in VIEWS:
            raise UserError(f"a second look is one of {', '.join(VIEWS)}, not {second_look!r}")
        if second_look is not None and self.pictures > 1:
            raise UserError(
                f"a second look is at one image, and this model reads {self.pictures} at a time: leave it out"
            )
        if alpha is not None:
            self._check_alpha(alpha)
        given = [image] if isinstance(image, str | Path | Image.Image) else list(image)
        if len(given) != self.pictures:
            raise UserError(f"the model needs {self.pictures} images at a time, but {len(given)} are given")
        pictures = [as_shown(one) if isinstance(one, Image.Image) else open_image(one) for one in given]
        images = torch.stack([self.preprocessing.image(picture) for picture in pictures]).to(self.device)
        input_ids, attention_mask = self.preprocessing.pad(self.preprocessing.token_ids(questions))
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        prior = None if prior_of is None else self.prior(prior_of).repeat_interleave(len(questions), dim=0)
        look = look_by(self.model, images, input_ids, attention_mask, map_name, prior, alpha)
        logits = look.output.logits.detach().float()
        if not logits.isfinite().all():
            if alpha is not None:
                raise UserError(f"alpha {alpha:g} makes this model's numbers overflow: choose a smaller one")
            raise UserError(
                f"{self.checkpoint.path} gives numbers that are not finite: it, or its preprocessing, is damaged"
            )
        head: Any = self.model.head
        probabilities = head.probabilities(logits)
        before = self._best(probabilities, top)
        best = before
        if second_look is not None:
            color = tuple(round(255 * value) for value in self.preprocessing.mean)
            box = self.preprocessing.box(pictures[0].size)
            views = [view_of(pictures[0], box, of_text[0], second_look, color) for of_text in look.maps]
            again = torch.stack([self.preprocessing.image(view) for view in views]).to(images)
            with torch.inference_mode():
                second = self.model(again, input_ids, attention_mask, prior=prior, alpha=alpha).logits.float()
            joined = join(logits, second, probabilities)
            kept = joined.isfinite().sum(dim=1).tolist()
            ranked = self._best(head.probabilities(joined), top)
            best = [of_row[:count] for of_row, count in zip(ranked, kept, strict=True)]
        words = [
            self._words(question, images, input_ids[n : n + 1], attention_mask[n : n + 1], prior, alpha)
            if map_name == "relevance"
            else None
            for n, question in enumerate(questions)
        ]
        return [
            Answer(
                question,
                best[n],
                list(look.maps[n]),
                look.names[n],
                look.steers[n],
                self.checkpoint.new_words(question),
                words[n],
                before[n] if second_look is not None else None,
            )
            for n, question in enumerate(questions)
        ]

    def _best(self, probabilities: Tensor, top: int) -> list[list[tuple[str, float]]]:
        """The best answers of each row (n, K), with their probabilities."""
        names = self.preprocessing.names
        best, ids = probabilities.topk(min(top, len(names)), dim=1)
        return [
            [(names[i], p) for i, p in zip(row, of_row, strict=True)]
            for row, of_row in zip(ids.tolist(), best.tolist(), strict=True)
        ]

    def _words(
        self, question: str, images: Tensor, ids: Tensor, mask: Tensor, prior: Tensor | None, alpha: float | None
    ) -> list[tuple[str, float]]:
        words = self.preprocessing.words(question)
        own = None if prior is None else prior[:1]  # all questions have the same other ξ
        falls = words_missed(self.model, images, ids, mask, [places for _, places in words], own, alpha)
        return as_shares([word for word, _ in words], falls)

    def _check_alpha(self, alpha: float) -> None:
        if self.alpha is None:
            raise UserError("alpha is the strength of the top-down signal, which this model does not have")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e38:
            raise UserError(f"alpha must be a number, not {alpha!r}")


def as_shares(words: Sequence[str], falls: Sequence[float] | np.ndarray) -> list[tuple[str, float]]:
    """Words with their shares of how far a score falls without each; 0 for words without which it does not fall."""
    lost = np.maximum(falls, 0.0)
    return [(word, float(one)) for word, one in zip(words, lost / (lost.sum() or 1.0), strict=True)]


def open_image(path: str | Path) -> Image.Image:
    """Read an image file to RGB.

    Raises:
        UserError: there is no such file, or it is not an image.
    """
    try:
        data = read_regular(Path(path))
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from None
    return decode_image(data, str(path))


def load_any(
    path: str | Path,
    *,
    answers: str | Path | None = None,
    tokenizer: str | None = None,
    needs: Sequence[str | Ability] = ANSWERS,
) -> Checkpoint:
    """Load a vlabs checkpoint, export or run folder, or a file of the released METER code.

    Args:
        answers: for a released VQA file, the prepared folder whose vocabulary it was trained on.
        needs: required abilities of the model, among `vlabs.checkpoints.abilities.ABILITIES`.
        tokenizer: for a released file, the RoBERTa it was trained with, by hub name or local folder.

    Raises:
        UserError: the checkpoint does not exist, its model lacks an ability, or a released file has no vocabulary.
    """
    file = find_checkpoint(path)
    content = read_tensors(file)
    if "vlabs" in content:
        if tokenizer is not None:
            raise UserError(f"{file} has its own tokenizer, and {tokenizer} is not read: leave it out")
        checkpoint = rebuild(content["vlabs"], content["state_dict"], file)
        check_able(checkpoint.network, checkpoint.task, needs, file)
        return checkpoint
    if not any("vit_model." in key for key in content.get("state_dict", content)):
        raise UserError(f"{file} is neither a vlabs checkpoint nor one of the released METER code")
    state = find_state(content, str(file))
    task = task_of(state)
    if task is None:
        raise UserError(f"{file} has none of METER's heads: it is not a complete checkpoint of the released code")
    module = load_released(state, task=task)
    assert isinstance(module, ReleasedVLM)
    check_able(module.model, task, needs, file)
    if task != "vqa":
        return _released_checkpoint(module, file, tokenizer, LABELS.get(task, ()), answers, task)
    if answers is None:
        raise UserError(
            f"{file} is a released checkpoint, which has no answers: pass --answers FOLDER of the prepared data "
            "(evaluate: data.dir=FOLDER)"
        )
    vocabulary = read_answers(answers)
    assert isinstance(module.model.head, VQAHead)
    head_size = module.model.head.num_answers
    if len(vocabulary) != head_size:
        raise UserError(f"{file} has {head_size} answers, but {answers} has {len(vocabulary)}: name its own data")
    return _released_checkpoint(module, file, tokenizer, tuple(vocabulary), answers, task)


def _released_checkpoint(
    module: ReleasedVLM,
    file: Path,
    tokenizer: str | None,
    vocabulary: tuple[str, ...],
    data_dir: str | Path | None,
    task: str,
) -> Checkpoint:
    name = tokenizer or _TOKENIZERS[type(module.model.text)]
    preprocessing = Preprocessing(
        image_size=module.model.vision.vit.patch_embed.img_size[0],
        tokenizer=read_tokenizer(name, Path(data_dir or "."), "--tokenizer DIR (evaluate: tokenizer=DIR)"),
        max_length=min(50, module.model.text.max_length),
        pad_to_max_length=module.model.pads_to_fixed_length,
        names=vocabulary,
        **pictures_of(module),
    )
    if preprocessing.vocab_size > module.model.text.vocab_size:
        raise UserError(f"the tokenizer {tokenizer} has more tokens than the text encoder in {file}: pass its own")
    data = {} if data_dir is None else {"dir": str(data_dir)}
    return Checkpoint(module.model, preprocessing, task, data, file, released=True)


def load(
    path: str | Path,
    *,
    device: str | None = None,
    answers: str | Path | None = None,
    tokenizer: str | None = None,
    keep: float | None = None,
) -> Predictor:
    """Load a model for prediction.

    Args:
        path: run folder, `.ckpt`, exported `.safetensors`, or a VQA checkpoint of the released METER code.
        device: `cpu` or `cuda`; the GPU if there is one.
        answers, tokenizer: for a released file; see `load_any`.
        keep: share of the patches in the second pass (see `AbSViT`), instead of the model's own.

    Raises:
        UserError: the file is not a checkpoint of a model that answers or labels, `answers` or `tokenizer` is given for
            one that has its own, or the model cannot use this share.
    """
    device = find_device(device)
    checkpoint = load_any(path, answers=answers, tokenizer=tokenizer)
    if answers is not None and not checkpoint.released:
        raise UserError(f"{checkpoint.path} has answers of its own, and {answers} is not read: leave it out")
    checkpoint.use_share(keep)
    return Predictor(checkpoint, device)
