"""FiLM: ξ scales and shifts the outputs of the norms of a plain ViT."""

from __future__ import annotations

from torch import Tensor, nn

from vlabs.models.backbones import Backbone
from vlabs.models.registry import register
from vlabs.models.topdown import Feedback, Signal, TopDown, per_block, similarity


class FiLMSignal(Signal):
    """Scales and shifts of n priors.

    Args:
        modulations: for each block (n, 1, 4D): γ and β of its first norm, then of its second.
        weights: (n, N), the similarity of ξ and the tokens.
    """

    def __init__(self, modulations: list[Tensor], weights: Tensor) -> None:
        self.modulations = modulations
        self.similarity = weights

    def norm(self, block: int, place: int, x: Tensor) -> Tensor:
        """See `Signal`."""
        scale, shift = self.modulations[block].chunk(4, dim=-1)[2 * place : 2 * place + 2]
        return x * (1 + scale) + shift


@register
class FiLM(TopDown):
    """Perez et al. (2018) inside a ViT: `norm(x) → norm(x) · (1 + α γ_l(ξ)) + α β_l(ξ)` for both norms of a block.

    γ and β are linear in ξ and start at zero, so the second pass starts as the first. The similarity of ξ and the
    patches is its map, and changes nothing.

    Args:
        alpha: scale α.
    """

    needs_decoders = False
    by_similarity = False
    takes_several = False
    plain = True
    changes_first = True
    begins_at_zero = r"modulations\..+"

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def build(self, backbone: Backbone, start: int) -> None:
        """See `TopDown`."""
        self.first = start - 1
        self.modulations = per_block(backbone, start, lambda width: _zero(nn.Linear(backbone.width, 4 * width)))

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> FiLMSignal:
        """See `TopDown`."""
        alpha = self.alpha if alpha is None else alpha
        scaled = [alpha * layer(prior).unsqueeze(1) for layer in self.modulations[self.first :]]
        return FiLMSignal(scaled, similarity(prior, tokens))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
