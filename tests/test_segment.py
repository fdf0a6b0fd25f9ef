"""Segmentation: the head, images of any size, datasets as downloaded, both tasks, and what must be refused."""

import io
import json
import tarfile
import zipfile
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, command
from omegaconf import OmegaConf
from PIL import Image
from test_models import make_vision

from data_prep.readers.segmentation import VOC_CLASSES, prepare_masks
from vlabs.checkpoints.checkpoint import header_of, load_checkpoint
from vlabs.checkpoints.programs import write_programs
from vlabs.data.features import MASK_FEATURES
from vlabs.data.masks import MaskAugmentation, MaskDataModule, MaskDataset
from vlabs.data.prepared import CITYSCAPES, IGNORED, load_split, read_classes, read_manifest
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.evaluation.base import Setting
from vlabs.evaluation.segment import SegmentEvaluation
from vlabs.metrics.segmentation import class_iou, mean_iou, region_iou
from vlabs.models.registry import build
from vlabs.models.segmentation import UperNet, assemble_segmenter
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import AbSTopDown, FeedbackOnly, MaskAttention, PerceiverIO, ReleasedTopDown
from vlabs.prediction.predictor import load_any
from vlabs.tasks.optim import Recipe
from vlabs.tasks.segment import SegmentTask

DECODER = partial(UperNet, num_classes=3, channels=8, aux_channels=8)
WAYS = [None, AbSTopDown, ReleasedTopDown, FeedbackOnly, MaskAttention, PerceiverIO]


def make_segmenter(topdown=AbSTopDown, text=None, **options):
    vision = make_vision(topdown() if topdown else None, depth=4, dynamic_img_size=True)
    prior = "text" if text is not None else "trained"
    return assemble_segmenter(vision, DECODER, prior=prior, text=text, **options).eval()


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_head_is_upernet_written_out():
    torch.manual_seed(0)
    head = UperNet(6, 3, channels=5, aux_channels=4).eval()
    maps = [torch.randn(2, 6, 7, 9) for _ in range(4)]
    weights = head.head

    def unit(module, x, padding):
        conv, norm = module.conv, module.batch_norm
        y = F.conv2d(x, conv.weight, conv.bias, padding=padding)
        return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps))

    def to(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    pooled = [maps[3]]
    for scale, block in zip((1, 2, 3, 6), weights.psp_modules.blocks, strict=True):
        pooled.append(to(unit(block.layers[1], F.adaptive_avg_pool2d(maps[3], scale), 0), maps[3]))
    laterals = [unit(conv, x, 0) for conv, x in zip(weights.lateral_convs, maps[:3], strict=True)]
    laterals.append(unit(weights.bottleneck, torch.cat(pooled, dim=1), 1))
    for n in (3, 2, 1):
        laterals[n - 1] = laterals[n - 1] + to(laterals[n], laterals[n - 1])
    outs = [unit(conv, x, 1) for conv, x in zip(weights.fpn_convs, laterals[:3], strict=True)] + [laterals[3]]
    final = weights.classifier[1]
    expected = F.conv2d(unit(weights.fpn_bottleneck, torch.cat(outs, dim=1), 1), final.weight, final.bias)
    last = head.auxiliary.classifier[1]
    auxiliary = F.conv2d(unit(head.auxiliary.convs[0], maps[3], 1), last.weight, last.bias)
    found = head(maps)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], auxiliary, atol=1e-5, rtol=1e-5)
    assert head.auxiliary.classifier[0].p == head.head.classifier[0].p == 0.1


@pytest.mark.parametrize("topdown", WAYS, ids=lambda way: way.__name__ if way else "vit")
@torch.no_grad()
def test_maps_are_the_second_passes_tokens_after_the_blocks_and_the_last_is_the_output(topdown):
    model = make_segmenter(topdown)
    vision = model.vision
    assert model.layers == [1, 2, 3, 4]
    outputs = []
    original = vision.backbone.block
    vision.backbone.block = lambda *args, **kwargs: outputs.append(original(*args, **kwargs)) or outputs[-1]
    seen = model(torch.randn(2, 3, 16, 16)).seen
    last_pass = outputs[-4:]
    for kept, output in zip(seen.layers[:3], last_pass[:3], strict=True):
        torch.testing.assert_close(kept, output)
    torch.testing.assert_close(seen.layers[3], seen.tokens)
    again = build(model.spec).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 16, 16)
    vision.backbone.block = original
    torch.testing.assert_close(again(images).logits, model(images).logits)


@torch.no_grad()
def test_sides_that_are_no_multiple_of_the_patch_are_padded_and_cut_off_exactly():
    model = make_segmenter()
    images = torch.randn(2, 3, 21, 38)
    logits = model(images).logits
    assert logits.shape == (2, 3, 21, 38)
    padded = F.pad(images, (0, 40 - 38, 0, 24 - 21))
    torch.testing.assert_close(logits, model(padded).logits[..., :21, :38])
    whole = torch.randn(1, 3, 16, 24)
    assert model(whole).logits.shape[-2:] == (16, 24)


@torch.no_grad()
def test_a_sliding_window_is_the_mean_of_its_windows():
    model = make_segmenter()
    images = torch.randn(1, 3, 24, 40)
    found = model.slide(images, (16, 16), (8, 16))
    total, count = torch.zeros(1, 3, 24, 40), torch.zeros(24, 40)
    for top in (0, 8):
        for left in (0, 16, 24):
            total[..., top : top + 16, left : left + 16] += model(images[..., top : top + 16, left : left + 16]).logits
            count[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(found, total / count)
    torch.testing.assert_close(model.slide(images, (64, 64), (8, 8)), model(images).logits)


@torch.no_grad()
def test_a_text_steers_and_each_of_an_images_texts_is_segmented_alone():
    model = make_segmenter(text=RobertaEncoder(30, 32, 2, 2, 64, 20))
    torch.nn.init.normal_(model.decoder.head.classifier[1].weight, std=1.0)
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(5, 30, (3, 6))
    mask, index = torch.ones_like(ids), torch.tensor([0, 1, 1])
    together = model(images, ids, mask, index).logits
    for n in range(3):
        alone = model(images[index[n]][None], ids[n : n + 1], mask[n : n + 1]).logits
        torch.testing.assert_close(together[n : n + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[1], together[2], atol=1e-4)


def test_a_batch_of_one_image_is_trained_on_too():
    decoder = UperNet(8, 2, 2, channels=4, pool_scales=[1, 2], aux_channels=4).train()
    logits, auxiliary = decoder([torch.randn(1, 8, 6, 6) for _ in range(2)])
    (logits.sum() + auxiliary.sum()).backward()
    assert logits.isfinite().all()
    decoder([torch.randn(2, 8, 6, 6) for _ in range(2)])
    assert all(one.training for one in decoder.modules())


def test_encoders_without_maps_of_one_stride_are_refused():
    from test_backbones import make

    with pytest.raises(UserError, match="choose a ViT"):
        assemble_segmenter(make("rvt_pooled", AbSTopDown())[0], DECODER)
    with pytest.raises(UserError, match="model.layers"):
        assemble_segmenter(make_vision(), DECODER, layers=[1, 9])
    with pytest.raises(UserError, match="model/text"):
        assemble_segmenter(make_vision(AbSTopDown()), DECODER, prior="text")


@pytest.mark.parametrize(
    ("transfer", "trained"),
    [
        ("end_to_end", {"vision.vit", "vision.decoders", "prompt", "decoder"}),
        ("linear", {"decoder"}),
        ("top_down", {"vision.decoders", "prompt", "decoder"}),
    ],
)
def test_transfer_trains_what_it_says(transfer, trained):
    model = make_segmenter()
    task = SegmentTask(model, Preprocessing(16, "", names=("a", "b", "c")), {}, Recipe(), transfer=transfer)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {".".join(name.split(".")[: 2 if name.startswith("vision") else 1]) for name in names}
    assert parts == trained
    assert {task.lr_group(f"model.{name}") for name in names} <= {"vision", "head", "feedback"}


def test_no_decay_of_positions_cls_and_norms():
    model = make_segmenter()
    recipe = Recipe(no_decay=("pos_embed", "cls_token"))
    task = SegmentTask(model, Preprocessing(16, "", names=("a", "b", "c")), {}, recipe)
    optimizer = recipe.optimizer(task, task.lr_group)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    without = {names[id(p)] for p in model.parameters() if id(p) not in decayed}
    assert {"vision.vit.pos_embed", "vision.vit.cls_token", "vision.vit.norm.weight", "prompt"} <= without
    assert "vision.vit.blocks.0.attn.qkv.weight" not in without


# --- measures ---------------------------------------------------------------------------------------------------------


def test_iou_is_that_of_sets_of_pixels():
    true, found = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 1])
    confusion = torch.zeros(4, 4, dtype=torch.long)
    for t, f in zip(true, found, strict=True):
        confusion[t, f] += 1
    iou = class_iou(confusion)
    for label in range(3):
        both, either = ((true == label) & (found == label)).sum(), ((true == label) | (found == label)).sum()
        assert iou[label] == pytest.approx(100 * float(both / either))
    assert iou[3].isnan()
    assert float(mean_iou(confusion)) == pytest.approx(float(iou[:3].mean()), rel=1e-6)
    masks = torch.tensor([[[1, 1, 0, 0]], [[255] * 4]])
    assert region_iou(torch.tensor([[[1, 0, 1, 0]], [[1] * 4]]), masks, 255).tolist() == pytest.approx([1 / 3])


# --- data -------------------------------------------------------------------------------------------------------------


def encoded(array, mode=None, form="PNG"):
    file = io.BytesIO()
    image = Image.fromarray(array)
    if mode == "P":
        image = image.convert("L")
        image.putpalette([n for n in range(256) for _ in range(3)])
    image.save(file, form)
    return file.getvalue()


def picture(width=40, height=30, seed=0):
    return encoded(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8), form="JPEG")


def labels(values, width=40, height=30):
    rows = np.resize(np.array(values, dtype=np.uint8), (height, width))
    return rows


def write_voc(folder, sbd=True):
    import scipy.io

    folder.mkdir()
    root = "VOCdevkit/VOC2012"
    files = {
        f"{root}/ImageSets/Segmentation/train.txt": b"a1\na2\n",
        f"{root}/ImageSets/Segmentation/val.txt": b"v1\n",
        **{f"{root}/JPEGImages/{name}.jpg": picture() for name in ("a1", "a2", "v1", "s1")},
        **{f"{root}/SegmentationClass/{name}.png": encoded(labels([0, 5, 255]), "P") for name in ("a1", "a2", "v1")},
    }
    with tarfile.open(folder / "VOCtrainval_11-May-2012.tar", "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if sbd:
        with tarfile.open(folder / "benchmark.tgz", "w:gz") as archive:
            for name in ("s1", "v1", "a1"):
                file = io.BytesIO()
                scipy.io.savemat(file, {"GTcls": {"Segmentation": labels([0, 7])}})
                info = tarfile.TarInfo(f"benchmark_RELEASE/dataset/cls/{name}.mat")
                info.size = len(file.getvalue())
                archive.addfile(info, io.BytesIO(file.getvalue()))
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def masks_of(folder, split):
    return {
        row["name"]: np.asarray(Image.open(io.BytesIO(row["mask"]))) if row["mask"] else None
        for row in load_split(folder, split)
    }


def test_voc_takes_sbds_masks_for_training_but_not_those_of_val(tmp_path):
    raw = write_voc(tmp_path / "raw")
    result = command("data_prep.segmentation", "--layout", "voc", "--raw-dir", raw, "--out-dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    train, val = masks_of(tmp_path / "out", "train"), masks_of(tmp_path / "out", "val")
    assert sorted(train) == ["a1", "a2", "s1"]
    assert sorted(val) == ["v1"]
    assert (train["s1"] == labels([0, 7])).all()
    assert (train["a1"] == labels([0, 5, 255])).all()
    assert read_classes(tmp_path / "out") == list(VOC_CLASSES)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["out", "raw"]


def test_cityscapes_counts_19_classes_and_keeps_the_masks_of_test_back(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    names = {"train": "aachen_000000", "val": "lindau_000001", "test": "berlin_000002"}
    write_zip(raw / "leftImg8bit_trainvaltest.zip", {
        f"leftImg8bit/{split}/{name.split('_')[0]}/{name}_leftImg8bit.png": encoded(np.zeros((30, 40, 3), np.uint8))
        for split, name in names.items()
    })  # fmt: skip
    write_zip(raw / "gtFine_trainvaltest.zip", {
        f"gtFine/{split}/{name.split('_')[0]}/{name}_gtFine_labelIds.png": encoded(labels([0, 7, 33, 4, 26]))
        for split, name in names.items()
    })  # fmt: skip
    prepare_masks("cityscapes", raw, tmp_path / "out")
    assert (masks_of(tmp_path / "out", "train")["aachen_000000"] == labels([255, 0, 18, 255, 13])).all()
    assert masks_of(tmp_path / "out", "test") == {"berlin_000002": None}
    assert read_classes(tmp_path / "out") == list(CITYSCAPES)


def write_ade(folder, masks):
    folder.mkdir()
    listed = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
        f"{n}\t0.1\t1\t1\t1\tclass {n}, other name\n" for n in range(1, 151)
    )
    files = {"ADEChallengeData2016/objectInfo150.txt": listed.encode()}
    for split, name in (("training", "ADE_train_1"), ("training", "ADE_train_2"), ("validation", "ADE_val_1")):
        files[f"ADEChallengeData2016/images/{split}/{name}.jpg"] = picture()
        if name in masks:
            files[f"ADEChallengeData2016/annotations/{split}/{name}.png"] = encoded(masks[name])
    write_zip(folder / "ADEChallengeData2016.zip", files)
    write_zip(folder / "release_test.zip", {"release_test/testing/ADE_test_1.jpg": picture()})
    return folder


def test_ade20k_leaves_0_out(tmp_path):
    masks = {name: labels([0, 1, 150]) for name in ("ADE_train_1", "ADE_train_2", "ADE_val_1")}
    raw = write_ade(tmp_path / "raw", masks)
    prepare_masks("ade20k", raw, tmp_path / "out")
    assert (masks_of(tmp_path / "out", "val")["ADE_val_1"] == labels([255, 0, 149])).all()
    assert read_classes(tmp_path / "out")[149] == "class 150"
    assert masks_of(tmp_path / "out", "test") == {"ADE_test_1": None}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (labels([0, 1], 41, 30), "41 x 30 pixels and the image 40 x 30"),
        (labels([0, 151]), "label value 151"),
        (None, "ADE_train_2.png is missing; ADEChallengeData2016.zip has ADEChallengeData2016/"),
    ],
    ids=["size", "value", "missing"],
)
def test_a_bad_pair_is_one_line_and_left_out_only_if_told_to(wrong, message, tmp_path):
    masks = {"ADE_train_1": labels([0, 1]), "ADE_val_1": labels([0, 1])}
    raw = write_ade(tmp_path / "raw", masks | ({} if wrong is None else {"ADE_train_2": wrong}))
    with pytest.raises(UserError, match=f"train: unusable pair: ADE_train_2 .*{message}.*--on-bad skip"):
        prepare_masks("ade20k", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare_masks("ade20k", raw, tmp_path / "out", on_bad="skip")
    assert sorted(masks_of(tmp_path / "out", "train")) == ["ADE_train_1"]
    assert len(read_manifest(tmp_path / "out")["dropped_items"]) == 1
    with pytest.raises(UserError, match="holds something else"):
        prepare_masks("ade20k", raw, tmp_path / "out")


def test_folders_of_your_own_images_and_masks_are_read(tmp_path):
    raw = tmp_path / "raw"
    for split in ("train", "validation", "test"):
        (raw / "images" / split).mkdir(parents=True)
        (raw / "images" / split / "a.jpg").write_bytes(picture())
    for split in ("train", "validation"):
        (raw / "masks" / split).mkdir(parents=True)
        (raw / "masks" / split / "a.png").write_bytes(encoded(labels([0, 1, 255]), "P"))
    (raw / "classes.txt").write_bytes(b"\xef\xbb\xbfwall\r\nred box\r\n")  # as Windows' Notepad writes it
    prepare_masks("folders", raw, tmp_path / "out")
    assert read_manifest(tmp_path / "out")["name"] == "raw"
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["wall", "red box"]
    for split, true in (("train", labels([0, 1, 255])), ("val", labels([0, 1, 255])), ("test", None)):
        np.testing.assert_array_equal(masks_of(tmp_path / "out", split)["a"], true)
    (raw / "masks/train/a.png").unlink()
    (raw / "masks/train/b.png").write_bytes(encoded(labels([0]), "P"))
    with pytest.raises(UserError, match="masks/train/a.png is missing"):
        prepare_masks("folders", raw, tmp_path / "other")


def test_archives_that_are_not_there_are_one_line(tmp_path):
    for layout, name in (("voc", "VOCtrainval_11-May-2012.tar"), ("cityscapes", "leftImg8bit_trainvaltest.zip")):
        with pytest.raises(UserError, match=name):
            prepare_masks(layout, tmp_path, tmp_path / "out")
    write_voc(tmp_path / "raw", sbd=False)
    (tmp_path / "raw/benchmark.tgz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="benchmark.tgz is not a whole archive"):
        prepare_masks("voc", tmp_path / "raw", tmp_path / "out")


@pytest.fixture(scope="module")
def scenes(tiny_data, tmp_path_factory):
    """The tiny corpus as semantic maps."""
    out = tmp_path_factory.mktemp("masks") / "out"
    prepare_masks("instances", tiny_data.parent / "raw", out, name="scenes")
    return out


def test_scenes_have_the_shape_of_every_pixel(scenes, tiny_data):
    from vlabs.data.instances import list_annotations

    annotations = {}
    for one in list_annotations(tiny_data.parent / "raw/annotations.zip"):
        annotations.setdefault(one["image_id"], []).append(one)
    classes = read_classes(scenes)
    masks = masks_of(scenes, "val")
    assert classes[0] == "background"
    for name, mask in masks.items():
        of = annotations[int(name.rsplit("_", 1)[1])]
        assert (mask > 0).sum() == sum(one["area"] for one in of)
        assert set(np.unique(mask)) - {0} == {classes.index(one["attributes"]["shape"]) for one in of}


def test_training_images_and_masks_are_changed_alike_and_padding_does_not_count(scenes):
    rows = load_split(scenes, "train")
    preprocessing = Preprocessing(64, "", names=tuple(read_classes(scenes)), mean=(0, 0, 0), std=(1, 1, 1))
    plain = MaskAugmentation(scale=(1, 1), crop=(32, 32), hflip=1.0, photometric=0.0)
    dataset = MaskDataset(rows, preprocessing, plain)
    whole = dataset.whole(0)
    image, mask = dataset.change(whole.shown, whole.mask.numpy().astype(np.uint8), np.random.default_rng(0))
    torch.testing.assert_close(image, whole.image[0].flip(2))
    assert (mask == whole.mask.flip(1)).all()
    half = MaskDataset(rows, preprocessing, plain._replace(scale=(0.5, 0.5), hflip=0.0))
    image, mask = half.change(whole.shown, whole.mask.numpy().astype(np.uint8), np.random.default_rng(0))
    assert image.shape == (3, 32, 32)
    assert (mask[16:] == IGNORED).all()
    assert (mask[:, 16:] == IGNORED).all()
    assert (mask[:16, :16] == whole.mask[::2, ::2]).float().mean() > 0.85
    data = MaskDataModule(scenes, image_size=32, batch_size=8, num_workers=0, photometric=1.0)
    first, again = ([batch.images for batch in data.train_dataloader()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first) == len(rows) // 8


# --- both tasks -------------------------------------------------------------------------------------------------------

SMALL = [
    "model.vision.embed_dim=16", "model.vision.num_heads=2", "model.vision.patch_size=8", "model.decoder.channels=8",
    "model.decoder.aux_channels=8", "data.image_size=32", "data.num_workers=0", "trainer.max_epochs=2", "logger=csv",
    "trainer.limit_train_batches=3", "trainer.enable_progress_bar=false", "data.eval_batch_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("segment")
    result = command("vlabs.train", "task=segment", "data=voc", f"data.dir={scenes}", "data.short_side=40",
                     "data.batch_size=8", *SMALL, "hydra.run.dir=run", cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cwd


def test_segmentation_trains_shows_images_and_is_evaluated_over_the_whole_set(run, scenes):
    assert list((run / "run/figures").glob("segments_step*.png"))
    for name, options in (("whole", []), ("slide", ["task.window=24"])):
        result = command("vlabs.evaluate", "task=segment", "ckpt=run", "split=val", f"data.dir={scenes}",
                         "data.num_workers=0", "task.predictions=true", *options, f"hydra.run.dir={name}",
                         cwd=run)  # fmt: skip
        assert result.returncode == 0, result.stderr
    metrics = json.loads((run / "whole/metrics.json").read_text())
    summary = json.loads((run / "run/summary.json").read_text())
    assert metrics["miou"] == pytest.approx(summary["best/val/miou"], abs=1e-3)
    # The same from the PNGs that were written.
    truth = masks_of(scenes, "val")
    found = {path.stem: np.asarray(Image.open(path)) for path in (run / "whole/predictions").glob("*.png")}
    assert found.keys() == truth.keys()
    true, guess = (np.concatenate([x[name].ravel() for name in truth]) for x in (truth, found))
    ious = []
    for label in range(len(read_classes(scenes))):
        either = ((true == label) | (guess == label)).sum()
        if either:
            ious.append(100 * ((true == label) & (guess == label)).sum() / either)
    assert metrics["miou"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert (run / "whole/figures/segments.png").is_file()
    assert json.loads((run / "slide/metrics.json").read_text())["miou"] != metrics["miou"]


def test_an_image_of_your_own_is_segmented(run, tmp_path):
    Image.new("RGB", (53, 31), "red").save(tmp_path / "own.png")
    result = command("vlabs.segment", "--ckpt", run / "run", "--image", "own.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "segments.png").is_file()
    with pytest.raises(UserError, match="export it as weights"):
        write_programs(load_checkpoint(run / "run"), tmp_path / "programs")
    asked = command("vlabs.segment", "--ckpt", run / "run", "--image", "own.png", "--text", "a star", cwd=tmp_path)
    assert_one_line_error(asked, "--text")


def test_a_test_split_becomes_a_submission_with_the_servers_values(run, scenes, tmp_path):
    import shutil

    shutil.copytree(scenes, tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest | {"layout": "ade20k"}))
    import datasets

    rows = datasets.load_from_disk(str(tmp_path / "data/val"))
    hidden = rows.map(lambda row: {"mask": b""}, features=rows.features)
    hidden.save_to_disk(str(tmp_path / "hidden"))
    shutil.rmtree(tmp_path / "data/val")
    (tmp_path / "hidden").rename(tmp_path / "data/val")
    result = command("vlabs.evaluate", "task=segment", f"ckpt={run / 'run'}", "split=val", "data.dir=data",
                     "data.num_workers=0", "hydra.run.dir=out", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = [np.asarray(Image.open(path)) for path in (tmp_path / "out/predictions").glob("*.png")]
    assert len(found) == len(hidden)
    assert min(one.min() for one in found) >= 1
    assert "miou" not in json.loads((tmp_path / "out/metrics.json").read_text())


@pytest.fixture(scope="module")
def phrases(tiny_data, tmp_path_factory):
    from data_prep.engine.pipeline import Options, prepare
    from data_prep.scenes.scenes_captions import ScenesCaptions

    out = tmp_path_factory.mktemp("phrases") / "out"
    source = ScenesCaptions(tiny_data.parent / "raw", True)
    prepare(source, out, Options(min_answer_count=1))
    return out


def test_what_a_text_names_is_segmented_with_the_encoder_of_another_run(run, phrases, tmp_path):
    text = ["model.text.hidden_size=16", "model.text.num_hidden_layers=1", "model.text.num_attention_heads=2",
            "model.text.intermediate_size=32"]  # fmt: skip
    result = command("vlabs.train", "task=refer", "data=coco_captions", f"data.dir={phrases}", "data.rand_augment=null",
                     "data.batch_size=16", *SMALL, *text, f"init={run / 'run'}", "hydra.run.dir=run",
                     cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "parameters loaded" in result.stdout
    evaluated = command("vlabs.evaluate", "task=refer", "ckpt=run", "split=val", f"data.dir={phrases}",
                        "data.num_workers=0", "hydra.run.dir=out", cwd=tmp_path)  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out/refer.jsonl").read_text().splitlines()]
    assert metrics["iou"] == pytest.approx(np.mean([line["iou"] for line in lines]), abs=1e-2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert metrics["iou"] == pytest.approx(summary["best/val/iou"], abs=0.1)
    Image.new("RGB", (53, 31), "red").save(tmp_path / "own.png")
    shown = command("vlabs.segment", "--ckpt", "run", "--image", "own.png", "--text", "a red star", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("a red star: ")


def test_the_control_of_refer_which_reads_no_text_is_read_back(tmp_path):
    model = assemble_segmenter(make_segmenter().vision, partial(DECODER, num_classes=2), prior="trained")
    header = header_of(model, Preprocessing(32, ""), "refer", {})
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"vlabs": header, "state_dict": state}, tmp_path / "control.ckpt")
    read = load_any(tmp_path / "control.ckpt", needs=("segments texts",)).segmenter
    assert torch.equal(read.prompt, model.prompt)
    torch.save({"vlabs": header | {"task": "segment"}, "state_dict": state}, tmp_path / "classes.ckpt")
    with pytest.raises(UserError, match="has 2 answers, but its preprocessing names 0"):
        load_checkpoint(tmp_path / "classes.ckpt")


def test_wrong_options_are_one_line(scenes, phrases, tmp_path, in_process):
    common = ["data.num_workers=0", "logger=csv"]
    segment = ["task=segment", "data=voc", f"data.dir={scenes}", *common]
    refer = ["task=refer", "data=coco_captions", f"data.dir={phrases}", *common]
    for options, parts in (
        ([*segment, "task.transfer=some"], ["task.transfer=some", "end_to_end, linear, top_down"]),
        ([*segment, "data.scale=[2,1]"], ["data.scale"]),
        ([*segment, "model/vision=rvt_tiny"], ["rvt_tiny"]),
        ([*segment, "model.prior=both"], ["model.prior=both", "trained, text"]),
        ([*segment, "model=mini"], ["model=segmenter"]),
        ([*refer, "model.decoder.num_classes=3"], ["num_classes=3", "two classes"]),
        ([*refer, "model/topdown=none"], ["model.prior=text", "model/topdown"]),
        (["task=segment", "data=coco_captions", f"data.dir={phrases}", *common], ["task=segment trains on"]),
    ):
        assert_one_line_error(in_process("vlabs.train", options, tmp_path), *parts)


@pytest.mark.parametrize(("name", "steps"), [("voc", 20_000), ("cityscapes", 40_000), ("ade20k", 160_000)])
def test_the_experiments_of_real_data_are_the_papers(name, steps):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from vlabs.runs.groups import config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}_absvit_b", "model.decoder.num_classes=19"])
    with torch.device("meta"):
        model = instantiate(config.model, _convert_="all")
    assert model.layers == [3, 6, 9, 12]
    assert model.vision.topdown.alpha == 1.0
    assert model.decoder.head.channels == 512
    assert model.vision.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    recipe = config.task.recipe
    assert recipe.warmup * config.trainer.max_steps == pytest.approx(1500)
    assert config.trainer.max_steps == steps
    assert (set(recipe.lr.values()), list(recipe.betas), recipe.weight_decay) == ({6e-5}, [0.9, 0.999], 0.01)
    assert config.data.batch_size == 16
    assert list(config.data.crop or [512, 512]) == ([512, 1024] if name == "cityscapes" else [512, 512])


def test_a_preparation_that_was_stopped_reads_no_finished_split_again(tmp_path, monkeypatch):
    import data_prep.readers.segmentation as module

    masks = {name: labels([0, 1, 150]) for name in ("ADE_train_1", "ADE_train_2", "ADE_val_1")}
    raw = write_ade(tmp_path / "raw", masks)
    read, checked = [], module._checked

    def stopping(pair, known):
        read.append(pair.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return checked(pair, known)

    monkeypatch.setattr(module, "_checked", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare_masks("ade20k", raw, tmp_path / "out")
    prepare_masks("ade20k", raw, tmp_path / "out")
    assert read == ["ADE_train_1", "ADE_train_2", "ADE_val_1", "ADE_val_1", "ADE_test_1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.json", "manifest.json", "test", "train", "val",
    ]  # fmt: skip


@pytest.mark.parametrize("unpacked", [False, True])
def test_of_instances_the_smaller_one_counts_and_a_crowd_does_not(unpacked, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    box = lambda x, y, w, h: [[x, y, x + w, y, x + w, y + h, x, y + h]]  # noqa: E731
    crowd = {"size": [30, 40], "counts": [0, 60, 1140]}  # the first two columns
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "area": 400, "iscrowd": 0, "segmentation": box(10, 5, 20, 20)},
        {"id": 2, "image_id": 7, "category_id": 9, "area": 25, "iscrowd": 0, "segmentation": box(15, 10, 5, 5)},
        {"id": 3, "image_id": 7, "category_id": 9, "area": 60, "iscrowd": 1, "segmentation": crowd},
    ]
    content = {
        "categories": [{"id": 3, "name": "dog"}, {"id": 9, "name": "cat"}],
        "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": annotations,
    }
    captions = {"annotations/captions_train2014.json": "{}"}
    write_zip(
        raw / "annotations_trainval2014.zip", captions | {"annotations/instances_train2014.json": json.dumps(content)}
    )
    write_zip(raw / "train2014.zip", {"train2014/a.jpg": picture()})
    for archive in raw.glob("*.zip") if unpacked else ():
        zipfile.ZipFile(archive).extractall(raw)
        archive.unlink()
    prepare_masks("instances", raw, tmp_path / "out")
    mask = masks_of(tmp_path / "out", "train")["a"]
    assert read_classes(tmp_path / "out") == ["background", "dog", "cat"]
    assert (mask[:, :2] == 255).all()
    assert mask[7, 12] == 1
    assert mask[12, 17] == 2
    assert mask[28, 38] == 0


def test_more_classes_than_a_byte_holds_are_measured_written_and_drawn(tmp_path):
    truth = np.arange(300, dtype=np.uint16).reshape(20, 15)
    truth[0, 0] = IGNORED
    row = {"image_id": 1, "name": "a", "image": picture(15, 20), "mask": encoded(truth)}
    rows = datasets.Dataset.from_list([row], features=MASK_FEATURES)
    rows.save_to_disk(tmp_path / "data/val")
    (tmp_path / "data/classes.json").write_text(json.dumps([f"c{n}" for n in range(300)]))
    (tmp_path / "data/manifest.json").write_text(json.dumps({"kind": "masks", "splits": {"val": {}}}))
    data = MaskDataModule(tmp_path / "data", image_size=16, num_workers=0)

    class Right(torch.nn.Module):
        def forward(self, images):
            right = torch.from_numpy(np.minimum(truth, 299).astype(np.int64))
            return SimpleNamespace(logits=F.one_hot(right, 300).permute(2, 0, 1)[None].float())

    checkpoint = SimpleNamespace(segmenter=Right(), preprocessing=data.preprocessing, data={}, path="x", keep=1)
    (tmp_path / "ev").mkdir()
    trainer = OmegaConf.create(
        {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "enable_progress_bar": False}
    )
    found = SegmentEvaluation(predictions=True).run(checkpoint, data, Setting("val", tmp_path / "ev", trainer))
    assert (found["miou"], found["pixel_accuracy"]) == (100, 100)
    written = np.asarray(Image.open(tmp_path / "ev/predictions/a.png"))
    assert (written.ravel()[1:] == truth.ravel()[1:]).all()
