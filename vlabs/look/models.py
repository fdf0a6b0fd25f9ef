"""Models of transformers as something to look into: tensors in, scores, answers and maps out.

All weights and computations are those of transformers' classes. What they attend to and their tokens are recorded by
hooks, in one pass over one text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.attention.gradients import Read, attention_of, inputs_of, normgrad, relevances
from vlabs.errors import UserError

Inputs = Mapping[str, Tensor]
"""Tensors by the names of the arguments of a model of transformers."""
Decode = Callable[[Tensor], str]
_LONGEST_ANSWER = 20  # tokens


class Said(NamedTuple):
    """What a model says of B images and one text.

    Attributes:
        score: (B,), what maps explain, in the graph of the images and the text.
        answers: for each image, the best answers with their probabilities; where there are no answers, the name of the
            score with its value.
        answer: of the first image, the ids of the tokens of the best answer (1, L), or its number (1,); None where
            there are no answers.
        rows: (L,) bool, the positions of the answer's tokens, where it is generated.
    """

    score: Tensor
    answers: list[list[tuple[str, float]]]
    answer: Tensor | None = None
    rows: Tensor | None = None


class Seen(NamedTuple):
    """Where a model looks for one text in one image.

    Attributes:
        said: what it says.
        maps: (rows, columns) by name, non-negative, on the CPU.
    """

    said: Said
    maps: dict[str, Tensor]


class Lookable(ABC):
    """A model of transformers, and where its parts are.

    Args:
        model: in eval mode, with `attn_implementation="eager"`.
        decode: turns token ids (L,) into a text.

    Attributes:
        maps: the maps that there are.
        answers: whether it answers questions; otherwise it scores how well a text fits.
        meaning: what a percentage is.
        blocks: the layers that the patches go through.
        attention: the modules whose attention is recorded, in the order that `layers` needs.
        patch: side of a patch in pixels.
        pads: whether texts are padded to the longest that it can read.
        text_inputs: what it takes of a tokenizer.
        image_size: side of its input in pixels; None if it takes several sizes.
        positions: the largest number of tokens in a text.

    Raises:
        UserError: its parts are others.
    """

    maps: ClassVar[tuple[str, ...]] = ("relevance", "normgrad")
    answers: ClassVar[bool] = False
    meaning: ClassVar[str]
    pads: ClassVar[bool] = False
    text_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    blocks: list[nn.Module]
    attention: list[nn.Module]

    def __init__(self, model: Any, decode: Decode) -> None:
        self.model, self.decode = model, decode
        config = getattr(model.config, "vision_config", model.config)
        self.patch: int = config.patch_size
        self.image_size: int | None = getattr(config, "image_size", None)
        if not isinstance(self.patch, int) or not isinstance(self.image_size, int | None):
            raise UserError("its images or patches are not square by its config, which vlabs does not support")
        self.positions = int(getattr(model.config, "text_config", model.config).max_position_embeddings)

    @abstractmethod
    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """Score, or answer, B images with one text (1, T).

        Args:
            pixels, text: as the image processor and the tokenizer give them.
            answer: score this `Said.answer` instead of the best one.
        """

    @abstractmethod
    def layers(self, attention: Sequence[Tensor]) -> list[list[Read]]:
        """The reads of all layers, from what was recorded of `attention`."""

    @abstractmethod
    def counted(self, found: Mapping[tuple[str, str], Tensor], said: Said, text: Inputs) -> Tensor:
        """From the relevances of all tokens, those of the patches (N,) for the score."""

    def grid(self, pixels: Inputs) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = pixels["pixel_values"].shape[-2:]
        return height // self.patch, width // self.patch

    def look(self, pixels: Inputs, text: Inputs, names: Sequence[str]) -> Seen:
        """Run on one image and one text, and compute maps.

        Args:
            pixels: of one image.
            text: of one text, (1, T).
            names: names in `maps`.
        """
        pixels = {**pixels, "pixel_values": pixels["pixel_values"].detach().clone().requires_grad_()}
        with torch.enable_grad(), inputs_of(self.blocks) as states, self.recording() as attention:
            said = self.run(pixels, text)
        maps: dict[str, Tensor] = {}
        if "relevance" in names:
            maps["relevance"] = self.counted(relevances(said.score, self.layers(attention)), said, text)
        if "normgrad" in names:
            rows, columns = self.grid(pixels)
            places = slice(states[0].shape[1] - rows * columns, None)
            maps["normgrad"] = normgrad(said.score, states, places)[0]
        if "similarity" in names:
            maps["similarity"] = self.similarity(pixels, text)
        grids = {name: maps[name].detach().reshape(self.grid(pixels)).cpu() for name in names}
        return Seen(said, grids)

    @torch.no_grad()
    def missed(self, pixels: Inputs, text: Inputs, others: Sequence[Inputs]) -> np.ndarray:
        """How far the score of the best answer for one image and text falls with each of some other texts, (texts,)."""
        said = self.run(pixels, text)
        falls = [float(said.score - self.run(pixels, other, said.answer).score) for other in others]
        return np.array(falls)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Context manager: the attention of all modules in `attention`, (B, heads, queries, keys)."""
        with attention_of(self.attention) as found:
            yield found

    def similarity(self, pixels: Inputs, text: Inputs) -> Tensor:
        """How similar each patch is to the text, (N,), above the least similar one."""
        raise NotImplementedError

    def without(self, pixels: Inputs, taken: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Copies of one image, each with the mean color instead of some patches.

        Args:
            pixels: of one image.
            taken: for each copy, the numbers of the patches, row by row.
        """
        rows, columns = self.grid(pixels)
        kept = torch.ones(len(taken), rows * columns)
        for copy, places in zip(kept, taken, strict=True):
            copy[torch.from_numpy(places.copy())] = 0
        given = {name: value.expand(len(taken), *value.shape[1:]) for name, value in pixels.items()}
        mask = self._on_pixels(kept.unflatten(1, (rows, columns)), pixels["pixel_values"])
        return given | {"pixel_values": pixels["pixel_values"] * mask.to(pixels["pixel_values"])}

    def _on_pixels(self, kept: Tensor, pixels: Tensor) -> Tensor:
        """(n, rows, columns) as something to multiply the image by; what lies beyond the last patch stays."""
        spread = kept.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)[:, None]
        height, width = (there - here for there, here in zip(pixels.shape[-2:], spread.shape[-2:], strict=True))
        return F.pad(spread, (0, width, 0, height), value=1.0)


def _self(stream: str, attention: Sequence[Tensor]) -> list[list[Read]]:
    return [[Read(stream, stream, one)] for one in attention]


class _Dual(Lookable):
    """An encoder of images and one of texts, whose outputs are compared."""

    maps = ("relevance", "normgrad", "similarity")

    def __init__(self, model: Any, decode: Decode) -> None:
        super().__init__(model, decode)
        self.blocks = list(model.vision_model.encoder.layers)
        layers = [*self.blocks, *model.text_model.encoder.layers]
        self.attention = [layer.self_attn for layer in layers]  # type: ignore[misc]

    def layers(self, attention: Sequence[Tensor]) -> list[list[Read]]:
        """See `Lookable`."""
        depth = len(self.blocks)
        return [*_self("image", attention[:depth]), *_self("text", attention[depth : len(self.attention)])]

    def similarity(self, pixels: Inputs, text: Inputs) -> Tensor:
        """See `Lookable`: cosines of the text and of what the image would be if its last attention read one patch only
        (as in MaskCLIP, Zhou et al., ECCV 2022)."""
        with torch.no_grad():
            with inputs_of(self.blocks[-1:]) as states:
                output = self.model(**pixels, **text)
            alone = self._alone(states[0][0], output.vision_model_output.last_hidden_state[0])
            cosines = F.normalize(alone, dim=-1) @ output.text_embeds[0]
            return cosines - cosines.min()  # type: ignore[no-any-return]

    @abstractmethod
    def _alone(self, before: Tensor, after: Tensor) -> Tensor:
        """The embedding (N, D) of every patch alone, from the tokens before and after the last layer."""


class CLIP(_Dual):
    """CLIP, `CLIPModel`."""

    meaning = "the cosine similarity of image and text"

    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """See `Lookable`."""
        output = self.model(**pixels, **text)
        cosines = (output.image_embeds * output.text_embeds).sum(dim=1)
        return Said(cosines, [[("similarity", value)] for value in cosines.tolist()])

    def counted(self, found: Mapping[tuple[str, str], Tensor], said: Said, text: Inputs) -> Tensor:
        """See `Lookable`: the row of the image's [cls]."""
        return found["image", "image"][0, 0, 1:]

    def _alone(self, before: Tensor, after: Tensor) -> Tensor:
        vision = self.model.vision_model
        # A token that is given alone reads itself.
        tokens = self.blocks[-1](before[1:, None], None)[:, 0]
        return self.model.visual_projection(vision.post_layernorm(tokens))  # type: ignore[no-any-return]


class SigLIP(_Dual):
    """SigLIP, `SiglipModel`; also SigLIP 2 of a fixed resolution."""

    meaning = "how probable it is that image and text belong together (sigmoid)"
    pads = True

    def __init__(self, model: Any, decode: Decode) -> None:
        super().__init__(model, decode)
        if not model.vision_model.use_head:
            raise UserError("it has no head that pools the image, so it cannot compare image and text")

    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """See `Lookable`."""
        logits = self.model(**pixels, **text).logits_per_image[:, 0]
        return Said(logits, [[("match", value)] for value in logits.sigmoid().tolist()])

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """See `Lookable`; the last is the attention of the token that pools the image."""
        with super().recording() as found, _written_out(self.model.vision_model.head.attention) as pooled:
            found.append(pooled)  # type: ignore[arg-type]
            yield found

    def layers(self, attention: Sequence[Tensor]) -> list[list[Read]]:
        """See `Lookable`."""
        return [*super().layers(attention), [Read("pooled", "image", attention[-1][0])]]

    def counted(self, found: Mapping[tuple[str, str], Tensor], said: Said, text: Inputs) -> Tensor:
        """See `Lookable`: the row of the token that pools the image."""
        return found["pooled", "image"][0, 0]

    def _alone(self, before: Tensor, after: Tensor) -> Tensor:
        return self.model.vision_model.head(after[:, None])  # type: ignore[no-any-return]


class SigLIP2(SigLIP):
    """SigLIP 2 of any resolution (NaFlex), `Siglip2Model`: the patches come cut out and in a row."""

    def grid(self, pixels: Inputs) -> tuple[int, int]:
        """See `Lookable`."""
        rows, columns = pixels["spatial_shapes"][0].tolist()
        return rows, columns

    def _on_pixels(self, kept: Tensor, pixels: Tensor) -> Tensor:
        return kept.flatten(1)[..., None]


@contextmanager
def _written_out(attention: nn.MultiheadAttention) -> Iterator[list[Tensor]]:
    """Context manager: compute torch's attention, without a mask, so that its weights are in the graph."""
    found: list[Tensor] = []

    def again(module: Any, given: tuple[Tensor, ...], output: Any) -> tuple[Tensor, Tensor]:
        parts = zip(given, module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
        query, key, value = (F.linear(*part).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in parts)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        found.append(weights)
        return module.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights

    hook = attention.register_forward_hook(again)
    try:
        yield found
    finally:
        hook.remove()


class _BLIP(Lookable):
    """A ViT, and a text encoder that reads its tokens in every layer."""

    def __init__(self, model: Any, decode: Decode) -> None:
        super().__init__(model, decode)
        self.blocks = list(model.vision_model.encoder.layers)
        self.attention = [layer.self_attn for layer in self.blocks]  # type: ignore[misc]
        self.attention += self._readers(model.text_encoder)

    @staticmethod
    def _readers(encoder: Any) -> list[nn.Module]:
        """Two modules per layer, which read the stream itself, and the other one."""
        return [part.self for layer in encoder.encoder.layer for part in (layer.attention, layer.crossattention)]

    def states(self, pixels: Inputs, text: Inputs) -> Tensor:
        """The text's states (B, T, D), after reading the images."""
        image = self.model.vision_model(pixel_values=pixels["pixel_values"]).last_hidden_state
        given = {name: value.expand(len(image), -1) for name, value in text.items()}
        encoded = self.model.text_encoder(**given, encoder_hidden_states=image)
        return encoded.last_hidden_state  # type: ignore[no-any-return]

    def layers(self, attention: Sequence[Tensor]) -> list[list[Read]]:
        """See `Lookable`."""
        depth = len(self.blocks)
        end = depth + 2 * len(self.model.text_encoder.encoder.layer)
        return [*_self("image", attention[:depth]), *self._reading("text", "image", attention[depth:end])]

    @staticmethod
    def _reading(reader: str, read: str, attention: Sequence[Tensor]) -> list[list[Read]]:
        pairs = zip(attention[::2], attention[1::2], strict=True)
        return [[Read(reader, reader, own), Read(reader, read, other)] for own, other in pairs]


class BLIPMatcher(_BLIP):
    """BLIP that matches images and texts, `BlipForImageTextRetrieval`, with its matching head."""

    meaning = "how probable it is that image and text belong together (softmax)"

    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """See `Lookable`."""
        logits = self.model.itm_head(self.states(pixels, text)[:, 0])
        score = logits[:, 1] - logits[:, 0]
        return Said(score, [[("match", value)] for value in score.sigmoid().tolist()])

    def counted(self, found: Mapping[tuple[str, str], Tensor], said: Said, text: Inputs) -> Tensor:
        """See `Lookable`: the row of the text's first token."""
        return found["text", "image"][0, 0, 1:]


class BLIPAnswerer(_BLIP):
    """BLIP that answers questions, `BlipForQuestionAnswering`, with the answer that it generates greedily.

    The score is the log-probability of that answer.
    """

    answers = True
    meaning = "how probable the generated answer is, all of its tokens together"

    def __init__(self, model: Any, decode: Decode) -> None:
        super().__init__(model, decode)
        self.attention += self._readers(model.text_decoder.bert)

    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """See `Lookable`."""
        states = self.states(pixels, text)
        config, decoder = self.model.config.text_config, self.model.text_decoder
        ids = self._generated(states) if answer is None else answer.expand(len(states), -1)
        logits = decoder(input_ids=ids[:, :-1], encoder_hidden_states=states).logits
        chances = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        own = (ids[:, 1:] != config.sep_token_id) & (ids[:, 1:] != config.pad_token_id)
        own[:, 0] = True  # an empty answer is its end
        score = (chances * own).sum(dim=1)
        texts = [self.decode(one[1:]) for one in ids]
        answers = [[pair] for pair in zip(texts, score.exp().tolist(), strict=True)]
        return Said(score, answers, ids[:1], own[0])

    @torch.no_grad()
    def _generated(self, states: Tensor) -> Tensor:
        """The ids of the answers (B, L), from the token that starts them to the one that ends them, and padding."""
        config = self.model.config.text_config
        ids: Tensor = self.model.text_decoder.generate(
            input_ids=torch.full((len(states), 1), self.model.decoder_start_token_id, device=states.device),
            encoder_hidden_states=states, encoder_attention_mask=torch.ones_like(states[..., 0]),
            eos_token_id=config.sep_token_id, pad_token_id=config.pad_token_id, do_sample=False, num_beams=1,
            max_new_tokens=min(_LONGEST_ANSWER, self.positions - 1),
        )  # fmt: skip
        return ids

    def layers(self, attention: Sequence[Tensor]) -> list[list[Read]]:
        """See `Lookable`."""
        begin = len(attention) - 2 * len(self.model.text_decoder.bert.encoder.layer)
        return [*super().layers(attention), *self._reading("answer", "text", attention[begin:])]

    def counted(self, found: Mapping[tuple[str, str], Tensor], said: Said, text: Inputs) -> Tensor:
        """See `Lookable`: the mean over the rows of the answer's tokens."""
        return found["answer", "image"][0, said.rows].mean(dim=0)[1:]


class _ViLT(Lookable):
    """ViLT: one transformer over the tokens of the text and the image."""

    text_inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, model: Any, decode: Decode) -> None:
        super().__init__(model, decode)
        self.image_size = None
        self.blocks = list(model.vilt.encoder.layer)
        self.attention = [layer.attention.attention for layer in self.blocks]  # type: ignore[union-attr,misc]

    def logits(self, pixels: Inputs, text: Inputs) -> Tensor:
        """The logits of its head for B images."""
        # transformers would shuffle the patches, and not say how; so they are embedded and put in order before.
        embedded, mask, (places, (_, columns)) = self.model.vilt.embeddings.visual_embed(
            pixels["pixel_values"], pixels["pixel_mask"], max_image_length=-1
        )
        order = (places[..., 0] * columns + places[..., 1]).argsort(dim=1) + 1
        order = torch.cat([torch.zeros_like(order[:, :1]), order], dim=1)
        embedded = embedded.take_along_dim(order[..., None], dim=1)
        given = {name: value.expand(len(embedded), -1) for name, value in text.items()}
        output = self.model(**given, image_embeds=embedded, pixel_mask=mask, output_attentions=True)
        return output.logits  # type: ignore[no-any-return]

    def layers(self, attention: Sequence[Tensor]) -> list[list[Read]]:
        """See `Lookable`."""
        return _self("both", attention)

    def counted(self, found: Mapping[tuple[str, str], Tensor], said: Said, text: Inputs) -> Tensor:
        """See `Lookable`: the row of the text's [cls]."""
        words = text["input_ids"].shape[1]
        return found["both", "both"][0, 0, words + 1 :]


class ViLTAnswerer(_ViLT):
    """ViLT that answers questions, `ViltForQuestionAnswering`. The score is the logit of the best answer."""

    answers = True
    meaning = "how probable an answer is on its own: several may be right (sigmoid)"

    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """See `Lookable`."""
        logits = self.logits(pixels, text)
        best, ids = logits.topk(min(5, logits.shape[1]), dim=1)
        names = self.model.config.id2label
        answers = [
            [(str(names[i]), value) for i, value in zip(*row, strict=True)]
            for row in zip(ids.tolist(), best.sigmoid().tolist(), strict=True)
        ]
        scored = ids[:1, 0] if answer is None else answer
        return Said(best[:, 0] if answer is None else logits[:, scored[0]], answers, scored)


class ViLTMatcher(_ViLT):
    """ViLT that ranks images and texts, `ViltForImageAndTextRetrieval`."""

    meaning = "the ranking score (its sigmoid): only its order means something"

    def run(self, pixels: Inputs, text: Inputs, answer: Tensor | None = None) -> Said:
        """See `Lookable`."""
        score = self.logits(pixels, text)[:, 0]
        return Said(score, [[("score", value)] for value in score.sigmoid().tolist()])


KINDS: dict[str, type[Lookable]] = {
    "CLIPModel": CLIP,
    "SiglipModel": SigLIP,
    "Siglip2Model": SigLIP2,
    "BlipForQuestionAnswering": BLIPAnswerer,
    "BlipForImageTextRetrieval": BLIPMatcher,
    "ViltForQuestionAnswering": ViLTAnswerer,
    "ViltForImageAndTextRetrieval": ViLTMatcher,
}
"""The classes of transformers that can be looked into."""
