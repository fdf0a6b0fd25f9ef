"""Evaluation of segmentation: IoU of classes over a whole set, or of what every text names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from vlabs.attention.figures import as_view, save_figure
from vlabs.attention.segments import Segmented, segment_figure
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import name_of, read_bytes
from vlabs.data.masks import MaskDataModule, WholePicture, stacked
from vlabs.data.module import Wants
from vlabs.data.prepared import CITYSCAPES, IGNORED, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError, show
from vlabs.evaluation.base import Evaluation, Setting
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.metrics.segmentation import class_iou, mean_iou
from vlabs.runs.trainer import device_of
from vlabs.tasks.segment import at_size, region_masks, segment_texts
from vlabs.utils.files import new_folder, write_json, write_text

# The raw label value of every class, of what has a server that scores it.
_RAW_LABELS = {
    "cityscapes": list(CITYSCAPES.values()),
    "ade20k": list(range(1, 151)),
}


class SegmentEvaluation(Evaluation):
    """Segments every picture of a split, at its own size: mean IoU, a table of classes, pictures; and a submission.

    Args:
        window: rows and columns of a sliding window, or one number for both; None for whole pictures.
        stride: between windows; two thirds of the window if not given.
        num_pictures: shown.
        predictions: write the classes found as PNGs, with the raw label values of Cityscapes and ADE20K, as their
            servers want them; done anyway where a split's masks are kept back.
    """

    trained_for = ("segment",)
    reads = MaskDataModule

    def __init__(
        self,
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        num_pictures: int = 6,
        predictions: bool = False,
    ) -> None:
        self.window = None if window is None else _pair("window", window)
        chosen = (
            stride if stride is not None or self.window is None else [max(1, 2 * side // 3) for side in self.window]
        )
        self.stride = None if chosen is None else _pair("stride", chosen)
        if self.window is None and self.stride is not None:
            raise UserError("task.stride is of a sliding window: pass task.window too")
        self.num_pictures = num_pictures
        self.predictions = predictions

    @torch.inference_mode()
    def run(self, checkpoint: Checkpoint, data: MaskDataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`; IoU in percent."""
        device = device_of(setting.trainer)
        if data.short_side is None and (side := checkpoint.data.get("short_side")) is not None:
            data.short_side = int(side)
            print(f"pictures are resized to a shorter side of {side} first, as in training (data.short_side)")
        model = checkpoint.segmenter.to(device)
        classes = checkpoint.preprocessing.names
        confusion = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORED, validate_args=False).to(device)
        shown: list[Segmented] = []
        hidden = not any(data.rows(setting.split)[:1]["mask"])
        predictions = setting.out_dir / "predictions" if self.predictions or hidden else None
        count = 0
        loader = data.eval_dataloader(setting.split)
        with _writer(predictions, data, len(classes)) as write:
            for batch in tqdm(loader, unit="batch", desc="segment", disable=not setting.shows_progress):
                for images, pictures in stacked(batch):
                    logits = self._logits(model, images.to(device))
                    for one, picture in zip(logits, pictures, strict=True):
                        found = at_size(one, picture.mask.shape).argmax(dim=0)
                        confusion.update(found, picture.mask.to(device))
                        count += 1
                        labels = found.cpu().numpy()
                        write(picture, labels)
                        if len(shown) < self.num_pictures:
                            truth = None if hidden else picture.mask.numpy()
                            shown.append(Segmented(as_view(picture.shown), labels, truth, picture.name))
        metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path), "split": setting.split, "images": count}
        if predictions is not None:
            print(predictions)
        if not hidden:
            metrics |= _report(confusion.compute().cpu(), classes)
        if shown:
            path = save_figure(segment_figure(shown, classes), setting.out_dir / "figures" / "segments.png")
            print(path)
        print(write_json(setting.out_dir / "metrics.json", metrics))
        return metrics

    def _logits(self, model: Any, images: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            logits: Tensor = model(images).logits
            return logits
        return model.slide(images, self.window, self.stride)  # type: ignore[no-any-return]


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"task.{name}={value} must be a number of pixels, or rows and columns")
    return int(sides[0]), int(sides[1])


def _report(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Print a table of classes, and return the numbers."""
    counts = confusion.double()
    iou, right = class_iou(confusion), counts.diag()
    recall = 100 * right / counts.sum(dim=1).where(counts.sum(dim=1) > 0, torch.nan)
    print(f"\n{'class':24}{'IoU':>8}{'recall':>8}{'pixels':>14}")
    for name, one, of, pixels in zip(classes, iou.tolist(), recall.tolist(), counts.sum(dim=1).tolist(), strict=True):
        show(f"{name[:23]:24}{one:8.2f}{of:8.2f}{int(pixels):14,}")
    found = {
        "miou": float(mean_iou(confusion)),
        "pixel_accuracy": float(100 * right.sum() / counts.sum().clamp_min(1)),
        "mean_recall": float(recall.nanmean()),
    }
    print(f"{'mean':24}{found['miou']:8.2f}{found['mean_recall']:8.2f}\npixels right {found['pixel_accuracy']:.2f}\n")
    known = {name: one for name, one in zip(classes, iou.tolist(), strict=True) if one == one}  # not NaN
    return found | {"per_class": known}


@contextlib.contextmanager
def _writer(
    folder: Path | None, data: MaskDataModule, classes: int
) -> Iterator[Callable[[WholePicture, np.ndarray], None]]:
    """What writes classes of pictures as PNGs in a folder, which is there when all are; nothing, without a folder."""
    if folder is None:
        yield lambda picture, labels: None
        return
    layout = read_manifest(data.dir).get("layout")
    raw = _RAW_LABELS.get(str(layout), list(range(classes)))
    values = np.array(raw, dtype=np.uint8 if max(raw) < 256 else np.uint16)
    with new_folder(folder, "predictions", replaces=_is_predictions) as partial:

        def write(picture: WholePicture, labels: np.ndarray) -> None:
            # What data call a picture is one name of a file, whatever is in it.
            name = picture.name.replace("/", "_").replace("\0", "_")
            Image.fromarray(values[labels]).save(partial / f"{name}.png")

        yield write


def _is_predictions(folder: Path) -> bool:
    return folder.is_dir() and all(path.suffix == ".png" for path in folder.iterdir())


class ReferEvaluation(Evaluation):
    """Segments what every text of a split names: mean and overall IoU, and the share of texts above some IoUs.

    Args:
        num_pictures: shown.
        above: IoUs, in percent.
    """

    trained_for = ("refer",)
    reads = CaptionDataModule

    def __init__(self, num_pictures: int = 6, above: Sequence[float] = (50, 70, 90)) -> None:
        self.num_pictures = num_pictures
        self.above = list(above)

    @torch.inference_mode()
    def run(self, checkpoint: Checkpoint, data: CaptionDataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`; in percent, with 95% intervals over texts."""
        if not data.regions_known:
            raise UserError(f"{data.dir} does not say what its texts are about: prepare data with regions")
        device = device_of(setting.trainer)
        model = checkpoint.segmenter.to(device)
        size = checkpoint.preprocessing.image_size
        data.wants, data.val_split = Wants((size, size), regions_in_validation=True), setting.split
        rows = data.rows(setting.split)
        lines, both_of, either_of = [], [], []
        shown: list[Segmented] = []
        loader = data.val_dataloader()
        for batch in tqdm(loader, unit="batch", desc="refer", disable=not setting.shows_progress):
            given = batch._replace(
                images=batch.images.to(device), input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device), image_index=batch.image_index.to(device),
            )  # fmt: skip
            logits = segment_texts(model, given).logits
            found = logits.argmax(dim=1).cpu()
            masks = region_masks(batch, logits.shape[-2:])
            known = (masks != IGNORED).flatten(1).any(dim=1)
            both = ((found == 1) & (masks == 1)).flatten(1).sum(dim=1)
            either = ((found == 1) | (masks == 1)).flatten(1).sum(dim=1)
            for n, text_id in enumerate(batch.caption_ids):
                if not known[n]:
                    continue
                iou = float(both[n] / either[n].clamp_min(1))
                lines.append({"caption_id": text_id, "iou": round(100 * iou, 3)})
                both_of.append(int(both[n]))
                either_of.append(int(either[n]))
                if len(shown) < self.num_pictures:
                    row = rows[int(batch.image_ids[n])]
                    text = row["caption"][row["caption_id"].index(text_id)]
                    image = decode_image(read_bytes(row), name_of(row))
                    view = as_view(image, checkpoint.preprocessing.box(image.size))
                    shown.append(Segmented(view, found[n].numpy(), masks[n].numpy(), text))
        if len(lines) < 2:
            raise UserError(f"{data.dir}, {setting.split}: fewer than two texts have a region")
        values = np.array([line["iou"] for line in lines])
        metrics: dict[str, Any] = {
            "checkpoint": str(checkpoint.path), "split": setting.split, "texts": len(values),
            "overall_iou": 100 * sum(both_of) / max(1, sum(either_of)),
        }  # fmt: skip
        print(f"\n{len(values):,} texts, {setting.split}\n{'overall IoU':14}{metrics['overall_iou']:8.2f}")
        measured = {"iou": values} | {f"above_{level:g}": 100.0 * (values > level) for level in self.above}
        for name, one in measured.items():
            interval = bootstrap_interval(one)
            metrics[name] = interval.mean
            metrics[f"{name}_interval"] = [interval.low, interval.high]
            print(f"{name.replace('_', ' '):14}{interval.mean:8.2f} [{interval.low:.2f}, {interval.high:.2f}]")
        write_text(setting.out_dir / "refer.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        figure = segment_figure(shown, ["all else", "what the text names"])
        print(save_figure(figure, setting.out_dir / "figures" / "refer.png"))
        print(write_json(setting.out_dir / "metrics.json", metrics))
        return metrics
