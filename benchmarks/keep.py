"""What it costs in accuracy to look twice at a share of the patches, by how these are chosen, against the arithmetic.

    python benchmarks/keep.py --out keep                       # one seed; continues where it was stopped
    python benchmarks/keep.py --out keep --seeds 0 1 2 --orders s random --shares 0.25
    python benchmarks/keep.py --out pruned --orders s --shares 0.25 --prune 0.5    # and half of these in the fusion
    python benchmarks/keep.py --out shown --orders s --shares 0.25 --show-rest     # the fusion sees the others, too

Every way of choosing is trained with, alike, for one epoch of the scenes from `init=scenes`, and used at the share that
it was trained with: `s` by the cosine with ξ, `cls` by what [cls] reads in the first pass, `norm` by the norm of the
first pass's tokens, `random`. Prints a table, and draws accuracy against GMAC per question to keep.png.

`--prune` leaves more out inside the fusion, by what the text reads after the first pair of layers (PuMer, ACL 2023).
`--show-rest` gives the fusion z of the patches that the second pass left out, instead of their mean.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.evaluation.report import gmac
from vlabs.models.absvit import AbSViT, BottomUp
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.topdown import pick
from vlabs.runs.record import read_summary

ORDERS = ("s", "cls", "norm", "random")
_TRAINING = (
    "experiment=scenes_vqa", "init=scenes", "trainer.max_epochs=1", "logger=csv", "callbacks.predictions=null",
    "callbacks.grounding=null", "trainer.enable_progress_bar=false",
)  # fmt: skip
_QUESTIONS = 4  # of an image, for the count


def choose_by(order: str) -> None:
    """Let every encoder of this process keep other patches than those most like ξ."""
    if order == "s":
        return
    AbSViT.keeps_what_is_read = order == "cls"  # type: ignore[assignment,method-assign]

    def values(self: AbSViT, bottom_up: BottomUp, prior: Tensor, image_index: Tensor | None) -> Tensor:
        tokens = bottom_up.tokens
        of_image = {"cls": bottom_up.read, "norm": tokens.norm(dim=2)}.get(order)
        if of_image is None:
            return torch.rand(len(prior), tokens.shape[1], device=tokens.device)
        return pick(of_image, image_index).expand(len(prior), -1)

    AbSViT.order = values  # type: ignore[assignment,method-assign]


def prune(share: float) -> None:
    """Let every fusion of this process read, after its first pair of layers, only [cls] and the patches read most."""
    if share == 1:
        return
    made = CoAttentionFusion.__init__

    def make(self: CoAttentionFusion, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        text_layer: Any = self.text_layers[0]

        def read_most(layer: nn.Module, given: tuple[Any, ...], image: Tensor) -> Tensor:
            before, text, _, mask, _ = given
            read = text_layer.cross_attention.weights(text_layer.self_attention(text, text, mask), before)
            read = (read * mask.unsqueeze(-1)).sum(dim=1)[:, 1:]
            best = 1 + read.topk(max(1, round(share * read.shape[1])), dim=1).indices
            places = torch.cat([torch.zeros_like(best[:, :1]), best], dim=1)
            return image.gather(1, places.unsqueeze(-1).expand(-1, -1, image.shape[2]))

        self.image_layers[0].register_forward_hook(read_most)

    CoAttentionFusion.__init__ = make  # type: ignore[method-assign]


def show_rest() -> None:
    """Give every fusion z of the patches that the second pass left out, instead of their mean."""
    attended, joined = AbSViT.attend, CoAttentionFusion.forward
    others: list[Tensor] = []

    def attend(self: AbSViT, bottom_up: BottomUp, prior: Any, image_index: Any = None, **more: Any) -> Any:
        seen = attended(self, bottom_up, prior, image_index, **more)
        z = pick(bottom_up.tokens, image_index).expand(len(seen.tokens), -1, -1)
        others.clear()
        if seen.kept is not None:
            left_out = torch.ones(z.shape[:2], dtype=torch.bool).scatter(1, seen.kept, False)
            others.append(z[left_out].view(len(z), -1, z.shape[2]))
        return seen

    def join(self: CoAttentionFusion, text: Tensor, mask: Tensor, image: Tensor, *more: Any, **options: Any) -> Any:
        return joined(
            self, text, mask, torch.cat([image[:, :-1], *others], dim=1) if others else image, *more, **options
        )

    AbSViT.attend, CoAttentionFusion.forward = attend, join  # type: ignore[method-assign,assignment]


def run(order: str, pruned: float, rest: bool, module: str, *arguments: str) -> None:
    """`python -m module` in a process that chooses so."""
    command = [sys.executable, __file__, "--as", order, str(pruned), "shown" * rest, module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr}")


def measure(out: Path, order: str, share: float, pruned: float, rest: bool, seed: int, more: list[str]) -> float:
    """Percent of val's questions, but yes/no, that one training answers right."""
    folder = out / f"{order}-{share:g}-{seed}"
    metrics = folder / "evaluation" / "metrics.json"
    if not metrics.is_file():
        own = [f"model.vision.keep={share}", f"seed={seed}", f"hydra.run.dir={folder}"]
        if (read_summary(folder) or {}).get("status") != "done":
            run(order, pruned, rest, "vlabs.train", *_TRAINING, *own, *more)
        place = [f"hydra.run.dir={metrics.parent}", "data.num_workers=0", "trainer.enable_progress_bar=false"]
        run(order, pruned, rest, "vlabs.evaluate", f"ckpt={folder}", "split=val", *place)
    return float(json.loads(metrics.read_text())["not_yes_no"])


def check_alike(options: argparse.Namespace) -> None:
    """Exit if the folder holds runs under other options than orders, shares and seeds, which name a run's folder."""
    record = options.out / "options.json"
    own = {name: getattr(options, name) for name in ("prune", "show_rest", "train")}
    if record.is_file() and json.loads(record.read_text()) != own:
        sys.exit(f"error: --out {options.out} holds runs with {record.read_text().strip()}: name another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(own))


def main() -> None:
    if sys.argv[1:2] == ["--as"]:
        _, _, order, pruned, rest, module, *arguments = sys.argv
        choose_by(order)
        prune(float(pruned))
        if rest:
            show_rest()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of keep.png")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.25, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--prune", type=float, default=1.0, help="share of the patches that the fusion keeps")
    parser.add_argument("--train", nargs="+", default=[], help="more overrides of the training, e.g. data.size=medium")
    parser.add_argument("--show-rest", action="store_true", help="the fusion sees z of the patches that are left out")
    options = parser.parse_args()
    check_alike(options)
    prune(options.prune)  # for the count
    if options.show_rest:
        show_rest()
    rows: list[dict[str, Any]] = []
    print(f"{'':10}{'share':>8}{'GMAC':>10}{'accuracy':>10}{'deviation':>11}")
    for order, share in [("s", 1.0), *((order, share) for order in options.orders for share in options.shares)]:
        found = [
            measure(options.out, order, share, options.prune, options.show_rest, seed, options.train)
            for seed in options.seeds
        ]
        checkpoint = load_checkpoint(options.out / f"{order}-{share:g}-{options.seeds[0]}")
        work = gmac(checkpoint.model, checkpoint.preprocessing.image_size, _QUESTIONS)
        rows.append({"order": order, "share": share, "gmac": work, "accuracy": statistics.mean(found), "all": found})
        deviation = f"{statistics.stdev(found):11.2f}" if len(found) > 1 else ""
        print(f"{order:10}{share:8g}{work:10.4f}{statistics.mean(found):10.2f}{deviation}", flush=True)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for order in options.orders:
        shown = sorted((row["gmac"], row["accuracy"]) for row in rows if row["order"] == order or row["share"] == 1)
        axis.plot(*zip(*shown, strict=True), marker="o", label=order)
    axis.set_xlabel("GMAC per question")
    axis.set_ylabel("accuracy, not yes/no (%)")
    axis.legend(frameon=False)
    figure.savefig(options.out / "keep.png", dpi=150)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
