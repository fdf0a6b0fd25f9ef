"""What each way to steer costs in training: parameters, arithmetic, time against the plain ViT.

    python benchmarks/variants.py                    base size, k = 1 and 4; the last line is JSON with the ratios
    python benchmarks/variants.py --size mini

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

PLAIN = "none"


def measure(variant: str, options: argparse.Namespace, k: int) -> tuple[int, float, float]:
    """Parameters, GMAC a question, and median seconds a question of a training step."""
    base = train_step.parse(["--size", options.size])
    base.topdown = variant
    side = train_step.our_side(variant, base, train_step.make_batch(options.size, options.questions, k))
    side.measure(options.repetitions)
    parameters = sum(parameter.numel() for parameter in side.owner.model.parameters())
    return parameters, gmac(side.flops) / options.questions, side.median / options.questions


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="base: ViT-B/16 at 224 px, RoBERTa-base, 6 fusion layers")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--questions", type=int, default=4, help="questions a step")
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, help="of torch; its own choice if not given")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
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
