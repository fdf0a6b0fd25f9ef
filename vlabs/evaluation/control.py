"""Evaluation of control: does a classifier look at the object that it is asked for (paper, section 6.1)?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlabs.attention.classes import look_for, strength
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.data.embedded import several_objects
from vlabs.data.several import Several, open_several, pairs, read_several
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.grounding import energy_inside, pointing, to_pixels
from vlabs.models.absvit import AbSViTClassifier
from vlabs.utils.options import Pairs, Seed, Strength

LAYOUTS = ("pairs", "several")
WHEN = ("before", "after")
MEASURES = {
    "norm_energy": "norm map: energy on the class asked for",
    "norm_energy_others": "norm map: energy on the others",
    "norm_pointing": "norm map: maximum on the class asked for",
    "weights_energy": "weights: energy on the class asked for",
    "weights_pointing": "weights: maximum on the class asked for",
    "top1": "best class is the one asked for",
    "chosen": "best of those in the image is the one asked for",
}


class ControlEvaluation(Evaluation):
    """Asks a classifier for each class in images with several classes.

    ξ is the class's row of the last linear layer. `before` is the bottom-up pass, which has no ξ; `after` is the pass
    under ξ. Metrics of each layout are `LAYOUT/MEASURE/before` and `…/after` in percent, `…_interval` over images, and
    `LAYOUT/area`, the score of a uniform map.

    Args:
        alpha: strength of the top-down signal, if the variant has one; None for the paper's 10, or for the largest of a
            variant that mixes by it.
        num_images: number of images per layout.
        several: folder of images with several classes (see `vlabs.data.several.read_several`); None for the embedded
            ones if the checkpoint was trained on the embedded objects, else only pairs.
        seed: seed of the choice of pairs.

    Raises:
        UserError: an option is out of range.
    """

    name = "control"
    needs = ("classes",)
    reads = ClassDataModule

    def __init__(
        self, alpha: Strength | None = None, num_images: Pairs = 300, several: str | None = None, seed: Seed = 0
    ) -> None:
        self.alpha, self.num_images, self.several, self.seed = alpha, num_images, several, seed

    def measure(self, checkpoint: Checkpoint, data: ClassDataModule, results: Results) -> None:
        """See `Evaluation`."""
        model = checkpoint.classifier.to(results.device)
        if model.encoder.has_cls:
            results.say("this model classifies [cls], so ξ of a class is similar to [cls], not necessarily to patches: "
                        "see model.vision.global_pool=avg")  # fmt: skip
        alpha = strength(model.encoder, self.alpha)
        if alpha is None and self.alpha is not None:
            raise UserError(f"task.alpha={self.alpha:g}: this model's top-down variant has no α: leave it out")
        if alpha is not None:
            results.metrics["alpha"] = alpha
        said = "which has no α here" if alpha is None else f"α = {alpha:g}"
        results.say(f"ξ is the class's row of the last linear layer, {said}; percent, 95% intervals over images")
        for layout, total, pictures in self._layouts(checkpoint, data, results.split):
            shown = results.each(pictures, "image", total)
            measured = [_measure(model, checkpoint, picture, alpha) for picture in shown]
            if (count := len(measured)) < 2:
                raise UserError("task.several: fewer than two images show two classes in the part that the model sees")
            if left_out := total - count:
                results.say(
                    f"{left_out} of {total} images left out: fewer than two classes in the part that the model sees"
                )
            results.rows += [{"layout": layout, **row} for row in measured]
            cells = {
                name: results.mean(f"{layout}/{name}", [row[name] for row in measured], digits=1)
                for name in measured[0]
            }
            what = "pairs of images side by side" if layout == "pairs" else "images of several objects"
            area = results.metrics[f"{layout}/area"]
            results.say(f"{count} {what}; a uniform map: {area:.1f}")
            rows = [[title, *(cells.get(f"{name}/{when}", "–") for when in WHEN)] for name, title in MEASURES.items()]
            results.table(["", "bottom-up", "under the prior"], [row for row in rows if row[1:] != ["–", "–"]])

    def _layouts(
        self, checkpoint: Checkpoint, data: ClassDataModule, split: str
    ) -> Iterator[tuple[str, int, Iterator[Several]]]:
        preprocessing = checkpoint.preprocessing
        yield "pairs", self.num_images, pairs(data.rows(split), preprocessing, self.num_images, self.seed)
        folder = None if self.several is None else Path(self.several)
        name = str(data.identity["name"])
        if folder is None and name.startswith("objects-"):
            folder = several_objects(name.removeprefix("objects-"), data.dir)
        if folder is not None:
            shown = read_several(folder, preprocessing, self.num_images)
            opened = (open_several(path, by_class, preprocessing) for path, by_class in shown)
            yield "several", len(shown), (picture for picture in opened if picture is not None)


def _measure(
    model: AbSViTClassifier, checkpoint: Checkpoint, picture: Several, alpha: float | None
) -> dict[str, float]:
    """All measures of one image in percent, each the mean over its classes."""
    image = checkpoint.preprocessing.normalize(picture.image)[None]
    found = look_for(model, image, picture.labels, alpha)
    size, labels = checkpoint.preprocessing.image_size, picture.labels
    values: dict[str, list[float]] = defaultdict(list)

    def map_measures(name: str, values_of: np.ndarray, n: int, when: str) -> None:
        pixels = to_pixels(values_of, size)
        others = np.logical_or.reduce([mask for k, mask in enumerate(picture.masks) if k != n])
        values[f"{name}_energy/{when}"].append(float(energy_inside(pixels, picture.masks[n])))
        values[f"{name}_energy_others/{when}"].append(float(energy_inside(pixels, others)))
        values[f"{name}_pointing/{when}"].append(float(pointing(pixels, picture.masks[n])))

    for n, label in enumerate(labels):
        values["area"].append(float(picture.masks[n].mean()))
        map_measures("norm", found.bottom_up.numpy(), n, "before")
        map_measures("norm", found.norm[n].numpy(), n, "after")
        if found.weights is not None:
            map_measures("weights", found.weights[n].numpy(), n, "after")
        for when, shares in (("before", found.before), ("after", found.after[n])):
            values[f"top1/{when}"].append(float(shares.argmax() == label))
            values[f"chosen/{when}"].append(float(labels[int(shares[labels].argmax())] == label))
    return {name: 100 * float(np.mean(of_classes)) for name, of_classes in values.items()}
