"""A trained model that answers questions about images, or labels statements about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlabs.attention.maps import DEAD, MAPS, default_map, look_by
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
from vlabs.utils.archives import read_regular
from vlabs.utils.device import find_device

AnyImage = str | Path | Image.Image
ANSWERS = ("texts", "answers")
"""What a model has to be able to do to be asked."""

# Of the text encoders that METER was trained with.
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
        map_name: the name of that map: `fusion` if ξ is similar to no patch, so that all its weights are 0.
        steers: whether ξ is similar to any patch of the images; None if no ξ steers.
        new_words: words of the question that no training text had; empty if the checkpoint does not know.
    """

    question: str
    answers: list[tuple[str, float]]
    maps: list[np.ndarray]
    map_name: str
    steers: bool | None = None
    new_words: list[str] = field(default_factory=list)

    @property
    def map(self) -> np.ndarray:
        """The map of the first image, which is usually the only one."""
        return self.maps[0]

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
            raise UserError(f"{checkpoint.path} does not name what its model tells apart, so it has nothing to answer")
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
        return str(getattr(self.model.head, "meaning", "what its head makes of its logits"))

    @torch.inference_mode()
    def prior(self, text: str) -> Tensor:
        """ξ of a text, (1, D_vision).

        Raises:
            UserError: the model has no ξ or is not steered by it, or the text is empty.
        """
        if self.model.prior is None:
            raise UserError("there is no ξ to be replaced: this model has none")
        if self.model.vision.reads_words:
            raise UserError("there is no ξ to be replaced: all words steer this model")
        check_text("the text of the other ξ", text)
        input_ids, mask = (t.to(self.device) for t in self.preprocessing.pad(self.preprocessing.token_ids([text])))
        return self.model.prior(self.model.text(input_ids, mask), input_ids)  # type: ignore[no-any-return]

    def answer(
        self,
        image: AnyImage | Sequence[AnyImage],
        questions: Sequence[str],
        top: int = 5,
        map_name: str | None = None,
        alpha: float | None = None,
        prior_of: str | None = None,
    ) -> list[Answer]:
        """Answer questions about one image; they share its bottom-up pass.

        Args:
            image: a file, or a Pillow image; two of them for a model of pairs (nlvr2), left before right.
            questions: any texts; they are cut at the model's limit.
            top: number of answers per question.
            map_name: the map to show (see `attention_map`); None for `default_map`.
            alpha: strength of the top-down signal instead of the model's own.
            prior_of: a text whose ξ steers the encoder instead of the questions' own.

        Raises:
            UserError: a file is missing or not an image, there are too many or too few images, a question is empty, the
                map does not exist, α is not a number or too large, or the model has no α or no ξ to replace.
        """
        if isinstance(questions, str):
            raise TypeError("questions is a list of texts")
        for question in questions:
            check_text("a question", question)
        map_name = map_name or default_map(self.model)
        if map_name not in MAPS:
            raise UserError(f"there is no map {map_name!r}: choose one of {', '.join(MAPS)}")
        if alpha is not None:
            self._check_alpha(alpha)
        given = [image] if isinstance(image, str | Path | Image.Image) else list(image)
        if len(given) != self.pictures:
            raise UserError(f"the model is about {self.pictures} pictures at a time, and {len(given)} are given")
        pictures = [as_shown(one) if isinstance(one, Image.Image) else open_image(one) for one in given]
        images = torch.stack([self.preprocessing.image(picture) for picture in pictures]).to(self.device)
        input_ids, attention_mask = self.preprocessing.pad(self.preprocessing.token_ids(questions))
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        prior = None if prior_of is None else self.prior(prior_of).expand(len(questions), -1)
        look = look_by(self.model, images, input_ids, attention_mask, map_name, prior, alpha)
        answers = self.preprocessing.names
        logits = look.output.logits.detach().float()
        if not logits.isfinite().all():
            if alpha is not None:
                raise UserError(f"alpha {alpha:g} is more than this model's numbers can hold: choose a smaller one")
            raise UserError(
                f"{self.checkpoint.path} answers with no finite numbers: it, or its preprocessing, is damaged"
            )
        probabilities = self.model.head.probabilities(logits)  # type: ignore[operator]
        best, ids = probabilities.topk(min(top, len(answers)), dim=1)
        return [
            Answer(
                question,
                [(answers[i], p) for i, p in zip(ids[n].tolist(), best[n].tolist(), strict=True)],
                list(look.maps[n]),
                look.names[n],
                look.steers[n],
                self.checkpoint.new_words(question),
            )
            for n, question in enumerate(questions)
        ]

    def _check_alpha(self, alpha: float) -> None:
        if self.alpha is None:
            raise UserError("alpha is the strength of the top-down signal, and this model has none")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e38:
            raise UserError(f"alpha must be a number, not {alpha!r}")


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
        checkpoint = rebuild(content["vlabs"], content["state_dict"], file)
        check_able(checkpoint.network, checkpoint.task, needs, file)
        return checkpoint
    if not any("vit_model." in key for key in content.get("state_dict", content)):
        raise UserError(f"{file} is neither a vlabs checkpoint nor one of the released METER code")
    state = find_state(content, str(file))
    task = task_of(state)
    if task is None:
        raise UserError(f"{file} has none of METER's heads: it is no whole checkpoint of the released code")
    module = load_released(state, task=task)
    assert isinstance(module, ReleasedVLM)
    check_able(module.model, task, needs, file)
    if task != "vqa":
        return _released_checkpoint(module, file, tokenizer, LABELS.get(task, ()), answers, task)
    if answers is None:
        raise UserError(
            f"{file} is a released checkpoint, which holds no answers: pass --answers FOLDER of the prepared data "
            "(evaluate: data.dir=FOLDER)"
        )
    vocabulary = read_answers(answers)
    assert isinstance(module.model.head, VQAHead)
    head_size = module.model.head.num_answers
    if len(vocabulary) != head_size:
        raise UserError(f"{file} has {head_size} answers and {answers} has {len(vocabulary)}: it is not its data")
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
    return Checkpoint(module.model, preprocessing, task, {} if data_dir is None else {"dir": str(data_dir)}, file)


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
        UserError: the file is not a checkpoint of a model that answers or labels, or the model cannot use this share.
    """
    device = find_device(device)
    checkpoint = load_any(path, answers=answers, tokenizer=tokenizer)
    if keep is not None:
        checkpoint.vision.keep = keep
    return Predictor(checkpoint, device)
