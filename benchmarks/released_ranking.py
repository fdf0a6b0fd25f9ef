"""The released ranking arithmetic, written out plainly: every pair is computed on its own, from pixels to score.

It shares no code with vlabs. It reads the weights of a vlabs model and computes what the released code computes for a
batch of image-caption pairs: both passes over the image for each of them, whole top-down tokens through every decoder,
q, k and v of the top-down signal (v alone is used), the reconstruction loss, explicit softmax(q kᵀ) v, and every token
of the last fusion layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.models.vlm import VisionLanguageModel

PAD, EOS = 1, 2
MASKED = -10_000.0
VIT_EPS, ROBERTA_EPS, FUSION_EPS = 1e-6, 1e-5, 1e-12


class ReleasedRanking:
    """Scores of image-caption pairs by the released arithmetic. The model's head is a ranking head.

    Args:
        model: whose weights are read; only its state dict and its sizes, none of its code.
        alpha: the factor of the top-down signal.
        topdown: `absvit_released` or `absvit`, the modulation of the released code or the paper's.
        prior_token: the text state that becomes ξ: `eos`, `cls` or `mean`.
        caption_length: captions are padded to this many tokens.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        alpha: float,
        topdown: str = "absvit_released",
        prior_token: str = "eos",
        caption_length: int = 40,
    ) -> None:
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.alpha = alpha
        self.topdown = topdown
        self.prior_token = prior_token
        self.caption_length = caption_length
        self.patch = self.weights["vision.vit.patch_embed.proj.weight"].shape[-1]
        self.vision_heads = int(model.vision.vit.blocks[0].attn.num_heads)
        self.text_heads = int(model.text.spec["num_attention_heads"])
        first = model.fusion.text_layers[0]
        self.fusion_heads = int(first.self_attention.num_heads)  # type: ignore[arg-type, union-attr]
        self.vision_depth = len(model.vision.vit.blocks)
        self.text_depth = int(model.text.spec["num_hidden_layers"])
        self.fusion_depth = len(model.fusion.text_layers)
        self.reconstruction = torch.zeros(())

    @torch.inference_mode()
    def scores(self, image: Tensor, captions: list[list[int]], batch_size: int = 32) -> Tensor:
        """Rank one image (1, 3, H, W) with M captions, given as token ids: (M,)."""
        parts = []
        for start in range(0, len(captions), batch_size):
            part = captions[start : start + batch_size]
            parts.append(self.pairs(image.repeat(len(part), 1, 1, 1), *self.pad(part)))
        return torch.cat(parts)

    def pad(self, captions: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (n, caption_length)."""
        ids = torch.tensor([row + [PAD] * (self.caption_length - len(row)) for row in captions])
        ids = ids.to(self.weights["fusion.text_map.weight"].device)
        return ids, ids != PAD

    def pairs(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The scores (n,) of n images with n captions."""
        text = self.encode_text(ids, mask)
        z = self.bottom_up(images)
        signals = self.feedback(z, self.prior(text, ids))
        tokens = self.second_pass(images, signals)
        pooled = self.fuse(text, mask, tokens)
        return self.linear(pooled, "head.rank")[:, 0]

    # Text encoder

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """RoBERTa's last state, (n, T, D)."""
        prefix = "text.roberta.embeddings."
        positions = mask.long().cumsum(dim=1) * mask + PAD
        x = self.weights[prefix + "word_embeddings.weight"][ids]
        x = x + self.weights[prefix + "token_type_embeddings.weight"][0]
        x = x + self.weights[prefix + "position_embeddings.weight"][positions]
        x = self.norm(x, prefix + "LayerNorm", ROBERTA_EPS)
        added = self.added_mask(mask, x)
        for index in range(self.text_depth):
            layer = f"text.roberta.encoder.layer.{index}."
            q, k, v = (
                self.split_heads(self.linear(x, f"{layer}attention.self.{name}"), self.text_heads)
                for name in ("query", "key", "value")
            )
            mixed = self.linear(self.attention(q, k, v, added), layer + "attention.output.dense")
            x = self.norm(x + mixed, layer + "attention.output.LayerNorm", ROBERTA_EPS)
            update = F.gelu(self.linear(x, layer + "intermediate.dense"))
            update = self.linear(update, layer + "output.dense")
            x = self.norm(x + update, layer + "output.LayerNorm", ROBERTA_EPS)
        return x

    def prior(self, text: Tensor, ids: Tensor) -> Tensor:
        """ξ, (n, D)."""
        if self.prior_token == "cls":
            state = text[:, 0]
        elif self.prior_token == "mean":
            state = text.mean(dim=1)
        else:
            first = [row.index(EOS) for row in ids.tolist()]
            state = torch.stack([states[position] for states, position in zip(text, first, strict=True)])
        return self.linear(state, "prior.project")

    # Image encoder

    def embed(self, images: Tensor) -> Tensor:
        """Patches, [cls] and positions, (n, N, D)."""
        prefix = "vision.vit."
        weight, bias = (self.weights[f"{prefix}patch_embed.proj.{name}"] for name in ("weight", "bias"))
        patches = F.conv2d(images, weight, bias, stride=self.patch).flatten(2).transpose(1, 2)
        cls = self.weights[prefix + "cls_token"].expand(len(images), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.weights[prefix + "pos_embed"]

    def block(self, x: Tensor, index: int, top_down: Tensor | None = None) -> Tensor:
        """One pre-norm block; the top-down signal (n, N, D) goes through the whole qkv map and is added to v."""
        prefix = f"vision.vit.blocks.{index}."
        q, k, v = self.qkv(self.norm(x, prefix + "norm1", VIT_EPS), prefix)
        if top_down is not None:
            v = v + self.top_down_value(top_down, prefix)
        x = x + self.linear(self.attention(q, k, v), prefix + "attn.proj")
        update = F.gelu(self.linear(self.norm(x, prefix + "norm2", VIT_EPS), prefix + "mlp.fc1"))
        return x + self.linear(update, prefix + "mlp.fc2")

    def top_down_value(self, top_down: Tensor, prefix: str) -> Tensor:
        """v of the top-down signal; its q and k are computed and dropped."""
        return self.qkv(top_down, prefix)[2]

    def qkv(self, x: Tensor, prefix: str) -> list[Tensor]:
        """Queries, keys and values, each (n, heads, N, d)."""
        n, length, width = x.shape
        qkv = self.linear(x, prefix + "attn.qkv").reshape(n, length, 3, self.vision_heads, width // self.vision_heads)
        return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def bottom_up(self, images: Tensor) -> Tensor:
        """The first pass: z, (n, N, D)."""
        x = self.embed(images)
        for index in range(self.vision_depth):
            x = self.block(x, index)
        return self.norm(x, "vision.vit.norm", VIT_EPS)

    def feedback(self, z: Tensor, prior: Tensor) -> list[Tensor]:
        """Modulate the tokens by ξ, and decode them from the last block down: the signals of all blocks, (n, N, D)."""
        xi = prior[:, None]
        similarity = (F.normalize(z, dim=-1) * F.normalize(xi, dim=-1)).sum(-1, keepdim=True).clamp(0, 1)
        if self.topdown == "absvit":
            t = self.alpha * similarity * z
        else:
            t = self.alpha * similarity * (z * xi).sum(-1, keepdim=True) * xi
        signals = []
        for index in reversed(range(self.vision_depth)):
            t = self.linear(t, f"vision.decoders.{index}.linear")
            signals.append(self.linear(t, f"vision.decoders.{index}.linear2"))
        return signals[::-1]

    def second_pass(self, images: Tensor, signals: list[Tensor]) -> Tensor:
        """The second pass, (n, N, D), with the reconstruction loss that the released code computes here."""
        x = self.embed(images)
        outputs = []
        for index, signal in enumerate(signals):
            output = self.block(x, index, signal)
            outputs.append((x, output))
            x = output
        self.reconstruction = self.reconstruct(outputs)
        return self.norm(x, "vision.vit.norm", VIT_EPS)

    def reconstruct(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Σ_l mse(A_l · output of block l, input of block l). The decoder's second map runs too, and is not read."""
        total = torch.zeros((), device=outputs[0][0].device)
        for index, (x, output) in enumerate(outputs):
            decoded = self.linear(output.detach(), f"vision.decoders.{index}.linear")
            self.linear(decoded, f"vision.decoders.{index}.linear2")
            total = total + F.mse_loss(decoded, x.detach())
        return total

    # Fusion

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """METER's co-attention over all tokens of both streams, and the two poolers: (n, 2D)."""
        types = self.weights["fusion.token_type.weight"]
        text = self.linear(text, "fusion.text_map") + types[0]
        image = self.linear(image, "fusion.image_map") + types[1]
        added = self.added_mask(mask, text)
        for index in range(self.fusion_depth):
            text, image = (
                self.fusion_layer(f"fusion.text_layers.{index}.", text, image, added, None),
                self.fusion_layer(f"fusion.image_layers.{index}.", image, text, None, added),
            )
        pooled = [self.linear(text[:, 0], "fusion.text_pooler"), self.linear(image[:, 0], "fusion.image_pooler")]
        return torch.cat(pooled, dim=-1).tanh()

    def fusion_layer(
        self, prefix: str, x: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None
    ) -> Tensor:
        """Self-attention, cross-attention and feed-forward, each with residual and post-norm."""
        for name, context, added in (("self_attention", x, mask), ("cross_attention", other, other_mask)):
            part = f"{prefix}{name}."
            q = self.split_heads(self.linear(x, part + "query"), self.fusion_heads)
            k = self.split_heads(self.linear(context, part + "key"), self.fusion_heads)
            v = self.split_heads(self.linear(context, part + "value"), self.fusion_heads)
            mixed = self.linear(self.attention(q, k, v, added), part + "out")
            x = self.norm(x + mixed, part + "norm", FUSION_EPS)
        update = self.linear(F.gelu(self.linear(x, prefix + "expand")), prefix + "contract")
        return self.norm(x + update, prefix + "norm", FUSION_EPS)

    # What all three are made of

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        """(n, S, D) to (n, heads, S, d)."""
        return x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    def added_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """What is added to the scores of attention, (n, 1, 1, T)."""
        return (1 - mask[:, None, None].to(x.dtype)) * MASKED

    def attention(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ / √d) v, (n, S, D)."""
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if added is not None:
            scores = scores + added
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
