"""What each way to steer costs in training: parameters, arithmetic, time against the plain ViT.

    python benchmarks/variants.py                    base size, k = 1 and 4; the last line is JSON with the ratios
    python benchmarks/variants.py --size mini
    python benchmarks/variants.py --encoders         what feedback adds to every encoder, beside the paper's Table 2

One variant is in memory at a time, so the plain ViT is timed again after every other one, and a ratio is of the two
that ran side by side. k is `data.questions_per_image`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

import torch
import train_step
from common import SIZES, VARIANTS, gmac

from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.topdown import AbSTopDown, TopDown
from vlabs.utils.flops import flop_counter

PLAIN = "none"
# Encoders at 224 px with their patch, and of the paper's Table 2: parameters and GMAC, plain and with AbS.
ENCODERS: dict[str, tuple[int, tuple[float, float, float, float] | None]] = {
    "vit_tiny_patch16_224": (16, (6, 1.3, 7, 2.6)),
    "vit_small_patch16_224": (16, (22, 4.2, 26, 9.8)),
    "vit_base_patch16_224": (16, (87, 17.2, 99, 38.9)),
    "rvt_tiny": (16, (9, 1.3, 11, 2.7)),
    "rvt_small": (16, (22, 4.3, 26, 10.4)),
    "rvt_base": (16, (86, 17.7, 100, 39.5)),
    "fan_tiny": (16, (7, 1.3, 9, 2.9)),
    "fan_small": (16, (28, 5.3, 32, 11.4)),
    "fan_base": (16, (54, 10.4, 62, 21.8)),
    "rvt_tiny_plus": (16, None),
    "rvt_small_plus": (16, None),
    "rvt_base_plus": (16, None),
    "vit_base_patch16_clip_quickgelu_224": (16, None),
    "vit_base_patch16_siglip_224": (16, None),
    "vit_base_patch14_reg4_dinov2": (14, None),
    "vit_base_patch16_dinov3": (16, None),
    "eva02_base_patch14_224": (14, None),
}


def measure(variant: str, options: argparse.Namespace, k: int) -> tuple[int, float, float]:
    """Parameters, GMAC a question, and median seconds a question of a training step."""
    base = train_step.parse(["--size", options.size])
    base.topdown = variant
    side = train_step.our_side(variant, base, train_step.make_batch(options.size, options.questions, k))
    side.measure(options.repetitions)
    parameters = sum(parameter.numel() for parameter in side.owner.model.parameters())
    return parameters, gmac(side.flops) / options.questions, side.median / options.questions


def cost(architecture: str, patch_size: int, topdown: TopDown | None) -> tuple[float, float]:
    """Millions of parameters, and GMAC of classifying one image at 224 px."""
    with torch.device("meta"):
        encoder = AbSViT(architecture, 224, patch_size, topdown, num_classes=1000).eval().requires_grad_(False)
        parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
        with flop_counter() as counter, torch.no_grad():
            AbSViTClassifier(encoder).requires_grad_(False)(torch.zeros(1, 3, 224, 224), reconstruct=False)
    return parameters, gmac(counter.get_total_flops())


def print_encoders() -> None:
    """A line an encoder, ours beside the paper's, and the same as JSON."""
    print("of a picture at 224 px: parameters in millions, GMAC; plain / with AbS; in brackets the paper's Table 2\n")
    found: dict[str, list[float]] = {}
    for architecture, (patch_size, published) in ENCODERS.items():
        plain, steered = (cost(architecture, patch_size, topdown) for topdown in (None, AbSTopDown(1.0)))
        found[architecture] = [round(value, 2) for value in (*plain, *steered)]
        line = f"{architecture:38}{plain[0]:7.1f} /{steered[0]:6.1f}{plain[1]:9.2f} /{steered[1]:6.2f}"
        if published is not None:
            line += f"     ({published[0]:g} / {published[2]:g}, {published[1]:g} / {published[3]:g})"
        print(line, flush=True)
    print()
    print(json.dumps({"encoders": found}))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="base: ViT-B/16 at 224 px, RoBERTa-base, 6 fusion layers")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--questions", type=int, default=4, help="questions a step")
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, help="of torch; its own choice if not given")
    add("--encoders", action="store_true", help="encoders in the place of variants: parameters and arithmetic")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.encoders:
        print_encoders()
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(
        f"{options.size}: {options.questions} questions a step, {options.repetitions} repetitions, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n"
    )
    columns = [f"{name} k={k}" for k in (1, 4) for name in ("GMAC", "time")]
    print(f"{'':18}{'M parameters':>14}" + "".join(f"{column:>12}" for column in columns))
    ratios: dict[str, dict[str, float]] = {}
    for variant in options.variants:
        cells, ratios[variant] = [], {}
        for k in (1, 4):
            parameters, work, seconds = measure(variant, options, k)
            ratio = 1.0 if variant == PLAIN else seconds / measure(PLAIN, options, k)[2]
            ratios[variant][f"k{k}"] = round(ratio, 3)
            cells += [f"{work:12.4g}", f"{ratio:12.2f}"]
        print(f"{variant:18}{parameters / 1e6:14.2f}{''.join(cells)}", flush=True)
    print()
    print(json.dumps({"time_against_vit": ratios, "size": options.size, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
