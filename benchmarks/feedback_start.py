"""By how much new feedback changes a pre-trained ViT before anything is learned: ‖second pass − first‖ / ‖first‖.

    python benchmarks/feedback_start.py --weights FILE --architecture vit_small_patch14_dinov2 --patch-size 14

ξ is random, and so are the images unless some are named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vlabs.checkpoints.pretrained import vit_from_timm
from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.models.absvit import AbSViT
from vlabs.models.topdown import AbSTopDown


def change(encoder: AbSViT, images: Tensor, prior: Tensor, alpha: float) -> float:
    """The mean over tokens, in percent."""
    bottom_up = encoder.encode(images)
    seen = encoder.attend(bottom_up, prior, alpha=alpha)
    return 100 * float(((seen.tokens - bottom_up.tokens).norm(dim=-1) / bottom_up.tokens.norm(dim=-1)).mean())


@torch.no_grad()
def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="of timm, or a file; none: random ones, whose b_v is 0")
    parser.add_argument("--architecture", default="vit_small_patch16_224")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--image", action="append", default=[], type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    read = Preprocessing(given.pixels, "", mean=mean, std=deviation).image
    pictures = [decode_image(path.read_bytes(), str(path)) for path in given.image]
    images = torch.stack([read(picture) for picture in pictures]) if pictures else None
    print("| | α = 0 | α = 1 | α = 10 | α = 10, B = 0 |\n| --- | --- | --- | --- | --- |")
    for again in (True, False):
        topdown = AbSTopDown(bias_again=again)
        encoder = vit_from_timm(given.weights, given.architecture, given.pixels, given.patch_size, topdown).eval()
        if images is None:
            images = torch.randn(4, 3, given.pixels, given.pixels)
        prior = torch.randn(len(images), encoder.width)
        cells = [change(encoder, images, prior, alpha) for alpha in (0.0, 1.0, 10.0)]
        for decoder in encoder.decoders:
            torch.nn.init.zeros_(decoder.linear2.weight)  # type: ignore[union-attr,arg-type]
        cells.append(change(encoder, images, prior, 10.0))
        name = "b_v twice, decoders at random" if again else "b_v once, decoders from zero"
        print(f"| {name} | {' | '.join(f'{cell:.1f}%' for cell in cells)} |")


if __name__ == "__main__":
    main()
