"""Evaluation of segmentation: IoU of classes over a whole split, or of what each text names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from vlabs.attention.figures import as_view
from vlabs.attention.segments import Segmented, segment_figure
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import name_of, read_bytes
from vlabs.data.masks import MaskDataModule, WholePicture, stacked
from vlabs.data.module import Wants
from vlabs.data.prepared import CITYSCAPES, IGNORED, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.segmentation import class_iou, mean_iou
from vlabs.tasks.segment import at_size, region_masks, segment_texts
from vlabs.utils.files import new_folder
from vlabs.utils.options import Count, Distinct, Percent, Size

# The raw label value of each class, for datasets with an evaluation server.
_RAW_LABELS = {
    "cityscapes": list(CITYSCAPES.values()),
    "ade20k": list(range(1, 151)),
}


class SegmentEvaluation(Evaluation):
    """Segments all images of a split at their own size: mean IoU, a table of classes, a figure, and a submission.

    Args:
        window: rows and columns of a sliding window, or one number for both; None for whole images.
        stride: rows and columns between windows; None for two thirds of the window.
        num_pictures: number of images in the figure.
        predictions: write the predicted classes as PNGs, with the raw label values of Cityscapes and ADE20K for their
            servers; always done if a split's masks are not public.
    """

    name = "segment"
    needs = ("segments classes",)
    reads = MaskDataModule

    def __init__(
        self,
        window: Size | tuple[Size, Size] | None = None,
        stride: Size | tuple[Size, Size] | None = None,
        num_pictures: Count = 6,
        predictions: bool = False,
    ) -> None:
        self.window = None if window is None else _pair(window)
        chosen = (
            stride if stride is not None or self.window is None else [max(1, 2 * side // 3) for side in self.window]
        )
        self.stride = None if chosen is None else _pair(chosen)
        if self.window is None and self.stride is not None:
            raise UserError("task.stride is for a sliding window: pass task.window too")
        self.num_pictures = num_pictures
        self.predictions = predictions

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: MaskDataModule, results: Results) -> None:
        """See `Evaluation`; IoU in percent."""
        device = results.device
        if data.short_side is None and (side := checkpoint.data.get("short_side")) is not None:
            data.short_side = int(side)
            results.say(f"images are resized to a shorter side of {side} first, as in training (data.short_side)")
        model = checkpoint.segmenter.to(device)
        classes = checkpoint.preprocessing.names
        confusion = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORED, validate_args=False).to(device)
        shown: list[Segmented] = []
        hidden = not any(data.rows(results.split)[:1]["mask"])
        predictions = results.setting.out_dir / "predictions" if self.predictions or hidden else None
        count = 0
        if predictions is not None:
            results.begin()
        with _writer(predictions, data, len(classes)) as write:
            for batch in results.batches(data.eval_dataloader(results.split)):
                for images, pictures in stacked(batch):
                    logits = self._logits(model, images)
                    for one, picture in zip(logits, pictures, strict=True):
                        found = at_size(one, picture.mask.shape).argmax(dim=0)
                        confusion.update(found, picture.mask)
                        count += 1
                        labels = found.cpu().numpy()
                        write(picture, labels)
                        if len(shown) < self.num_pictures:
                            truth = None if hidden else picture.mask.cpu().numpy()
                            shown.append(Segmented(as_view(picture.shown), labels, truth, picture.name))
        results.metrics["images"] = count
        if predictions is not None:
            results.file(predictions)
        if not hidden:
            _report(results, confusion.compute().cpu(), classes)
        if shown:
            results.figure("segments", segment_figure(shown, classes))

    def _logits(self, model: Any, images: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            logits: Tensor = model(images).logits
            return logits
        return model.slide(images, self.window, self.stride)  # type: ignore[no-any-return]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _report(results: Results, confusion: Tensor, classes: Sequence[str]) -> None:
    counts = confusion.double()
    iou, right, pixels = class_iou(confusion), counts.diag(), counts.sum(dim=1)
    recall = 100 * right / pixels.where(pixels > 0, torch.nan)
    means = {
        "miou": float(mean_iou(confusion)),
        "pixel_accuracy": float(100 * right.sum() / counts.sum().clamp_min(1)),
        "mean_recall": float(recall.nanmean()),
    }
    known = {name: one for name, one in zip(classes, iou.tolist(), strict=True) if one == one}  # not NaN
    results.metrics |= {**means, "per_class": known}
    table = [
        [name, f"{one:.2f}", f"{of:.2f}", f"{int(many):,}"]
        for name, one, of, many in zip(classes, iou.tolist(), recall.tolist(), pixels.tolist(), strict=True)
    ]
    mean = ["mean", f"{means['miou']:.2f}", f"{means['mean_recall']:.2f}", f"{int(counts.sum()):,}"]
    results.table(["class", "IoU", "recall", "pixels"], [*table, mean])
    results.say(f"pixel accuracy {means['pixel_accuracy']:.2f}")


@contextlib.contextmanager
def _writer(
    folder: Path | None, data: MaskDataModule, classes: int
) -> Iterator[Callable[[WholePicture, np.ndarray], None]]:
    """Give a function that writes the classes of an image as PNG; the folder appears when all are written.

    Without a folder the function does nothing.
    """
    if folder is None:
        yield lambda picture, labels: None
        return
    layout = read_manifest(data.dir).get("layout")
    raw = _RAW_LABELS.get(str(layout), list(range(classes)))
    values = np.array(raw, dtype=np.uint8 if max(raw) < 256 else np.uint16)
    with new_folder(folder, "predictions", replaces=_is_predictions) as partial:

        def write(picture: WholePicture, labels: np.ndarray) -> None:
            # A dataset's names may contain a path; make each a single file name.
            name = picture.name.replace("/", "_").replace("\0", "_")
            Image.fromarray(values[labels]).save(partial / f"{name}.png")

        yield write


def _is_predictions(folder: Path) -> bool:
    return folder.is_dir() and all(path.suffix == ".png" for path in folder.iterdir())


class ReferEvaluation(Evaluation):
    """Segments what each text of a split names: mean and overall IoU, and the share of texts above some IoUs.

    Args:
        num_pictures: number of images in the figure.
        above: IoUs in percent; for each, the share of texts with a higher IoU is given.
    """

    name = "refer"
    needs = ("segments texts",)
    reads = CaptionDataModule

    def __init__(self, num_pictures: Count = 6, above: Distinct[Percent] = (50, 70, 90)) -> None:
        self.num_pictures = num_pictures
        self.above = list(above)

    def wants(self, checkpoint: Checkpoint, data: CaptionDataModule) -> Wants:
        """See `Evaluation`; the regions of texts, one value per pixel."""
        size = checkpoint.preprocessing.image_size
        return Wants((size, size), regions_in_validation=True)

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: CaptionDataModule, results: Results) -> None:
        """See `Evaluation`; in percent, with 95% intervals over texts."""
        if not data.regions_known:
            raise UserError(f"{data.dir} has no regions of texts: prepare data with regions")
        if not checkpoint.preprocessing.tokenizer:
            raise UserError(f"{checkpoint.path} has no tokenizer: train task=refer")
        model = checkpoint.segmenter.to(results.device)
        rows = data.rows(results.split)
        shown: list[Segmented] = []
        for batch in results.batches(data.eval_dataloader(results.split)):
            logits = segment_texts(model, batch).logits
            found, masks = logits.argmax(dim=1), region_masks(batch, logits.shape[-2:])
            known = (masks != IGNORED).flatten(1).any(dim=1)
            both = ((found == 1) & (masks == 1)).flatten(1).sum(dim=1)
            either = ((found == 1) | (masks == 1)).flatten(1).sum(dim=1)
            ious = [round(100 * iou, 3) for iou in (both / either.clamp_min(1)).tolist()]
            ids = batch.caption_ids
            columns = zip(ids, ious, both.tolist(), either.tolist(), known.tolist(), strict=True)
            results.rows += [
                {"caption_id": text_id, "iou": iou, "intersection": shared, "union": total}
                for text_id, iou, shared, total, is_known in columns
                if is_known
            ]
            for n in known.nonzero()[:, 0].tolist()[: self.num_pictures - len(shown)]:
                row = rows[int(batch.image_ids[n])]
                text = row["caption"][row["caption_id"].index(ids[n])]
                image = decode_image(read_bytes(row), name_of(row))
                view = as_view(image, checkpoint.preprocessing.box(image.size))
                shown.append(Segmented(view, found[n].cpu().numpy(), masks[n].cpu().numpy(), text))
        if len(results.rows) < 2:
            raise UserError(f"{data.dir}, {results.split}: fewer than two texts have a region")
        frame = results.frame
        overall = 100 * float(frame["intersection"].sum()) / max(1, int(frame["union"].sum()))
        results.metrics |= {"texts": len(frame), "overall_iou": overall}
        precisions = [
            [f"Pr@{level / 100:g}", results.mean(f"above_{level:g}", 100.0 * (frame["iou"] > level))]
            for level in self.above
        ]
        ious = [
            ["oIoU, of all texts together", f"{overall:.2f}"],
            ["mIoU, over texts", results.mean("iou", frame["iou"])],
        ]
        results.table([f"{len(frame):,} texts, {results.split}", "percent"], [*ious, *precisions])
        results.figure("refer", segment_figure(shown, ["all else", "what the text names"]))
