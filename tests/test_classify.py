"""Images with one class: their preparation from raw files, batches, the task, and the command line."""

import io
import itertools
import json
import random
import tarfile

import datasets
import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch
import torch.nn.functional as F
from conftest import areas_by_hand, assert_one_line_error, command
from PIL import Image
from torchvision.transforms import v2

from data_prep.engine.units import Unit
from data_prep.readers.classes import dataset_units, entry, folder_units, prepare_classes, table_units
from data_prep.readers.imagenet import DEVKIT, TRAIN, VAL, imagenet_units
from data_prep.scenes.objects import SIZES, Task, draw_object, make_objects
from vlabs.attention.classes import class_maps
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.checkpoints.pretrained import vit_from_timm
from vlabs.data.classes import ClassDataModule, ClassDataset
from vlabs.data.images import read_bytes
from vlabs.data.pictures import ImageSampler
from vlabs.data.prepared import load_split, read_classes
from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.data.sampling import BatchSpec, Group
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.diversity import attention_diversity
from vlabs.models.topdown import AbSTopDown
from vlabs.runs.values import check_values
from vlabs.tasks.classify import ClassifyTask
from vlabs.tasks.optim import Recipe

TINY = [
    "data.size=tiny", "data.image_size=32", "data.batch_size=32", "data.num_workers=0", "model.vision.embed_dim=16",
    "model.vision.num_heads=2", "trainer.enable_progress_bar=false", "logger=csv",
]  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The tiny objects, raw and prepared."""
    folder = tmp_path_factory.mktemp("objects")
    make_objects("tiny", folder / "raw", num_workers=1)
    units, files = folder_units(folder / "raw")
    prepare_classes(units, files, folder / "prepared", "objects-tiny", SIZES["tiny"].classes_by_folder)
    return folder / "prepared"


def picture(color, size=(40, 30)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "JPEG")
    return out.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def contents(folder, split):
    """Class and bytes of every image of a prepared split."""
    names = read_classes(folder)
    return sorted((names[row["label"]], read_bytes(row)) for row in load_split(folder, split))


# Preparation


def test_objects_are_a_function_of_the_seed_and_every_class_comes_as_often(objects, tmp_path):
    make_objects("tiny", tmp_path / "again", num_workers=2)
    for split in ("train", "val"):
        found = (tmp_path / f"again/{split}.tar").read_bytes()
        assert found == (objects.parent / f"raw/{split}.tar").read_bytes()
    assert draw_object(Task("tiny", "train", 0, 0)) != draw_object(Task("tiny", "train", 0, 1))
    labels = load_split(objects, "train")["label"]
    assert set(np.bincount(labels)) == {SIZES["tiny"].train_images // len(SIZES["tiny"].classes)}


PICTURES = {"cat/1.jpg": picture("red"), "cat/2.jpg": picture("pink"), "dog/3.jpg": picture("blue")}
EXPECTED = sorted((name.split("/")[0], content) for name, content in PICTURES.items())


def make_raw(folder, form):
    if form == "tar":
        folder.mkdir()
        for split in ("train", "val"):
            write_tar(folder / f"{split}.tar", PICTURES | {"README.txt": b"no picture"})
        return folder_units(folder)[:2]
    for split, (name, content) in itertools.product(("train", "val"), PICTURES.items()):
        path = folder / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if form == "folder":
        return folder_units(folder)
    rows = [{"image": f"{split}/{name}", "class": name.split("/")[0], "split": split}
            for split, name in itertools.product(("train", "val"), PICTURES)]  # fmt: skip
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return table_units(folder / "mine.jsonl")


@pytest.mark.parametrize("form", ["tar", "folder", "table"])
def test_images_are_read_where_they_lie(form, tmp_path):
    units, files = make_raw(tmp_path / "raw", form)
    prepare_classes(units, files, tmp_path / "prepared", "mine")
    for split in ("train", "val"):
        assert contents(tmp_path / "prepared", split) == EXPECTED
    assert read_classes(tmp_path / "prepared") == ["cat", "dog"]


def test_a_dataset_of_datasets_is_read_with_its_labels(tmp_path):
    rows = {"image": [{"bytes": content, "path": None} for _, content in EXPECTED], "label": [1, 1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(str(tmp_path / "hub"))
    units, files, names = dataset_units(str(tmp_path / "hub"), "image", "label")
    prepare_classes(units, files, tmp_path / "prepared", "hub", names)
    assert contents(tmp_path / "prepared", "train") == EXPECTED
    assert read_classes(tmp_path / "prepared") == ["dog", "cat"]
    with pytest.raises(UserError, match="no column fine_label; it has image, label"):
        dataset_units(str(tmp_path / "hub"), "image", "fine_label")


def make_imagenet(raw):
    """ImageNet's three files with two classes and three validation images."""
    raw.mkdir()
    inner = {}
    for wnid, color in (("n01440764", "red"), ("n01443537", "blue")):
        write_tar(raw / "inner.tar", {f"{wnid}_{n}.JPEG": picture(color, (30 + n, 30)) for n in range(2)})
        inner[f"{wnid}.tar"] = (raw / "inner.tar").read_bytes()
    (raw / "inner.tar").unlink()
    write_tar(raw / TRAIN, inner)
    write_tar(raw / VAL, {f"ILSVRC2012_val_{n:08d}.JPEG": picture("green", (30 + n, 30)) for n in (1, 2, 3)})
    synsets = np.array(
        [(1, "n01443537"), (2, "n01440764"), (1001, "n00001740")], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")]
    )
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data/"
    files = {
        folder + "ILSVRC2012_validation_ground_truth.txt": b"2\n1\n1\n",
        folder + "meta.mat": meta.getvalue(),
    }
    with tarfile.open(raw / DEVKIT, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_imagenet_is_read_inside_its_tar_files(tmp_path):
    make_imagenet(tmp_path / "raw")
    units, files, wnids = imagenet_units(tmp_path / "raw")
    prepare_classes(units, files, tmp_path / "prepared", "imagenet", wnids)
    assert read_classes(tmp_path / "prepared") == ["n01440764", "n01443537"]
    expected = [("n01440764", picture("red", (30 + n, 30))) for n in range(2)]
    expected += [("n01443537", picture("blue", (30 + n, 30))) for n in range(2)]
    assert contents(tmp_path / "prepared", "train") == sorted(expected)
    of_val = [("n01440764", 1), ("n01443537", 2), ("n01443537", 3)]
    assert contents(tmp_path / "prepared", "val") == sorted((c, picture("green", (30 + n, 30))) for c, n in of_val)


def test_a_preparation_that_was_stopped_continues(tmp_path):
    read = []

    def unit(name, stops=False):
        def entries():
            read.append(name)
            yield entry(name, image=picture("red"))
            if stops:
                raise KeyboardInterrupt

        return Unit("train", name, entries)

    with pytest.raises(KeyboardInterrupt):
        prepare_classes([unit("a"), unit("b", stops=True)], [], tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()
    prepare_classes([unit("a"), unit("b")], [], tmp_path / "out", "x")
    assert read == ["a", "b", "b"]
    assert [label for label, _ in contents(tmp_path / "out", "train")] == ["a", "b"]


def test_bad_raw_files_are_one_line_and_leave_nothing(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()

    def refused(message, *arguments):
        result = command("data_prep.classes", *arguments, "--out-dir", "out", cwd=tmp_path)
        assert_one_line_error(result, message)
        assert not (tmp_path / "out").exists()

    refused("holds no class folders", "--raw-dir", "raw")
    write_tar(raw / "train.tar", PICTURES)
    whole = (raw / "train.tar").read_bytes()
    (raw / "train.tar").write_bytes(whole[:1500])
    refused("train.tar", "--raw-dir", "raw")
    (raw / "train.tar").unlink()
    (raw / "train.tar.gz").write_bytes(b"")
    refused("gunzip it", "--raw-dir", "raw")
    (tmp_path / "t.csv").write_text("image,class\nnowhere.jpg,cat\n")
    refused("missing image: t.csv, line 2: nowhere.jpg", "--table", "t.csv")


def test_an_image_that_is_gone_or_damaged_is_named(tmp_path):
    units, files = make_raw(tmp_path / "raw", "folder")
    prepare_classes(units, files, tmp_path / "prepared", "mine")
    (tmp_path / "raw/train/cat/1.jpg").write_bytes(PICTURES["cat/1.jpg"][:-5])
    with pytest.raises(UserError, match="1.jpg has changed"):
        contents(tmp_path / "prepared", "train")
    size = len(PICTURES["cat/1.jpg"])
    (tmp_path / "raw/train/cat/1.jpg").write_bytes(b"x" * size)
    data = ClassDataModule(tmp_path / "prepared", image_size=16, batch_size=3, num_workers=0)
    with pytest.raises(UserError, match="1.jpg"):
        list(data.train_dataloader())
    skipping = ClassDataModule(tmp_path / "prepared", image_size=16, batch_size=3, num_workers=0, on_bad="skip")
    (batch,) = skipping.train_dataloader()
    assert (len(batch.skipped), len(batch.labels)) == (1, 2)


# Batches


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_is_shared_out_and_drawn_anew(repeats, world):
    epochs = []
    for epoch in range(2):
        seen = []
        for rank in range(world):
            sampler = ImageSampler(60, 10, True, seed=3, repeats=repeats)
            sampler.rank, sampler.world_size = rank, world
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler) == 60 // world // 10
            seen += [group.row for batch in batches for group in batch.groups]
            sampler.first = 2
            assert list(sampler) == batches[2:]
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    if repeats == 1:
        assert sorted(epochs[0]) == list(range(60))
    else:
        assert max(np.bincount(epochs[0])) > 1


def test_augmentation_and_mixing_are_a_function_of_where_the_training_is(objects):
    options = {"scale": 0.5, "color_jitter": 0.4, "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
    data = ClassDataModule(
        objects, image_size=32, batch_size=8, num_workers=0, seed=1, augmentation=options | {"label_smoothing": 0.1}
    )
    dataset = data.train_dataloader().dataset
    spec = BatchSpec(2, [Group(n, (0,)) for n in range(8)], 5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again = dataset[spec], dataset[spec]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, dataset[spec._replace(epoch=3)].images)
    torch.testing.assert_close(first.targets.sum(dim=1), torch.ones(8))
    assert (first.targets > 0.1 / 15 + 1e-6).sum() > 8  # some images are of two classes


def test_without_augmentation_a_batch_is_what_evaluation_sees(objects):
    data = ClassDataModule(objects, image_size=16, crop=0.8, num_workers=0)
    batch = next(iter(data.eval_dataloader("val")))
    row = load_split(objects, "val")[3]
    image = Image.open(io.BytesIO(read_bytes(row))).convert("RGB")
    expected = v2.Compose([v2.Resize(20, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])(image)
    found = batch.images[3] * torch.tensor(data.preprocessing.std)[:, None, None]
    found = 255 * (found + torch.tensor(data.preprocessing.mean)[:, None, None])
    assert (found - v2.functional.pil_to_tensor(expected)).abs().max() < 4  # it is computed in one step
    assert torch.equal(batch.targets, F.one_hot(batch.labels, 15).float())


def test_images_are_mixed_in_pairs(objects):
    preprocessing = ClassDataModule(objects, image_size=16).preprocessing
    assert isinstance(preprocessing, Preprocessing)
    with pytest.raises(UserError, match="must be even"):
        ClassDataModule(objects, image_size=16, batch_size=7, augmentation={"mixup": 0.8})
    with pytest.raises(UserError, match="data.augmentation.mixups"):
        ClassDataModule(objects, image_size=16, augmentation={"mixups": 0.8})


# The task


def make_task(topdown, **options):
    torch.manual_seed(0)
    encoder = AbSViT(
        "vit_tiny_patch16_224", 16, 8, topdown, num_classes=4, embed_dim=24, depth=2, num_heads=2, sincos_positions=True
    )
    return ClassifyTask(AbSViTClassifier(encoder), Preprocessing(16, ""), {}, Recipe(), **options)


def class_batch():
    from vlabs.data.classes import ClassBatch

    torch.manual_seed(1)
    labels = torch.tensor([0, 3, 1])
    targets = 0.9 * F.one_hot(labels, 4) + 0.025
    return ClassBatch(torch.randn(3, 3, 16, 16), targets, labels, [7, 8, 9], [])


def test_an_attentive_probe_is_its_equation_and_all_that_is_trained_over_a_frozen_encoder(tmp_path):
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    plain = AbSViT("vit_tiny_patch16_224", 16, 8, None, **options)
    safetensors.torch.save_file(plain.vit.state_dict(), tmp_path / "weights.safetensors")
    encoder = vit_from_timm(
        str(tmp_path / "weights.safetensors"), "vit_tiny_patch16_224", 16, 8, global_pool="probe", **options
    )
    assert torch.equal(encoder.vit.blocks[1].attn.qkv.weight, plain.vit.blocks[1].attn.qkv.weight)
    probe = encoder.vit.attn_pool
    assert probe.query.shape == (24, 24)  # of at most 32 queries, as many as divide the width
    tokens = torch.randn(2, 5, 24)
    pooled = encoder.backbone.pool(tokens)
    for image, found in zip(tokens[:, 1:], pooled, strict=True):  # without [cls]
        values = [probe.value.weight @ token for token in image]
        for n, query in enumerate(probe.query):
            scores = np.exp([float(query @ token) / 24**0.5 for token in image])
            expected = sum(score * float(value[n]) for score, value in zip(scores, values, strict=True)) / sum(scores)
            assert float(found[n]) == pytest.approx(expected, abs=1e-5)
    task = ClassifyTask(AbSViTClassifier(encoder), Preprocessing(16, ""), {}, Recipe(), freeze=["vision"])
    trained = {name for name, value in task.named_parameters() if value.requires_grad}
    assert {name.removeprefix("model.encoder.vit.").split(".")[0] for name in trained} == {"attn_pool", "head"}
    losses = task.losses(class_batch())
    losses.task["class"].backward()
    assert probe.query.grad.abs().sum() > 0


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_loss_is_the_mean_of_both_passes_or_that_of_the_second(pool):
    batch = class_batch()

    def entropy(logits):
        return -(batch.targets * logits.log_softmax(dim=1)).sum(dim=1).mean()

    torch.manual_seed(0)
    encoder = AbSViT(
        "vit_tiny_patch16_224", 16, 8, AbSTopDown(1.0), pool, num_classes=4, embed_dim=24, depth=2, num_heads=2
    )
    model = AbSViTClassifier(encoder)
    logits, bottom_up, seen = model(batch.images)
    both, second = (
        ClassifyTask(model, Preprocessing(16, ""), {}, Recipe(), passes=passes, reconstruction_weight=0.1)
        for passes in ("both", "second")
    )
    expected = (entropy(logits) + entropy(bottom_up)) / 2 + 0.1 * seen.reconstruction
    torch.testing.assert_close(both.total(both.losses(batch)), expected)
    torch.testing.assert_close(second.total(second.losses(batch)), entropy(logits) + 0.1 * seen.reconstruction)


@pytest.mark.parametrize("topdown", [None, AbSTopDown(1.0)], ids=["one pass", "two passes"])
def test_the_diversity_of_attention_is_that_of_a_plain_loop_over_rows_of_the_last_pass(topdown):
    task, batch = make_task(topdown, diversity_weight=0.7, reconstruction_weight=0.0), class_batch()
    for block in task.model.encoder.vit.blocks:  # so that some rows read few tokens
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    record = []
    task.model(batch.images, record=record)
    values = []
    for weights in record:
        for image in weights.detach().mean(dim=1).numpy():
            mean = image.mean(axis=0)
            kept = np.where(mean > 2 / 5, mean, 0)
            for row in image:
                read = np.where(row > 2 / 5, row, 0)
                lengths = np.linalg.norm(kept) * np.linalg.norm(read)
                values.append(float(kept @ read / lengths) if lengths else 0.0)
    assert len(record) == 2
    assert 0 < np.mean(values) < 1
    losses = task.losses(batch)
    assert float(losses.others["diversity"]) == pytest.approx(np.mean(values), abs=1e-5)
    torch.testing.assert_close(task.total(losses), losses.task["class"] + 0.7 * losses.others["diversity"])
    losses.others["diversity"].backward()
    assert task.model.encoder.vit.blocks[0].attn.qkv.weight.grad.any()
    assert "diversity" not in task.eval().losses(batch).others


def test_blocks_that_compare_no_rows_have_no_part_in_diversity_and_an_encoder_of_none_is_refused():
    peaked = (10 * torch.randn(2, 3, 5, 5)).softmax(dim=-1)
    alone = peaked[:, :, :1]  # [cls] alone reads, as in FAN's last blocks
    assert attention_diversity([peaked]) > 0
    torch.testing.assert_close(attention_diversity([peaked, alone]), attention_diversity([peaked]))
    windows = {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 3}
    swin = AbSViT("swin_tiny_patch4_window7_224", 32, 4, num_classes=4, **windows)
    with pytest.raises(UserError, match=r"task.diversity_weight=1 reads attention over the whole image, .*: pass 0"):
        ClassifyTask(AbSViTClassifier(swin), Preprocessing(32, ""), {}, Recipe(), diversity_weight=1.0)
    with pytest.raises(UserError, match="task.diversity_weight=1 trains attention, which task.freeze freezes: pass 0"):
        make_task(None, diversity_weight=1.0, freeze=["vision"])
    make_task(AbSTopDown(), diversity_weight=1.0, freeze=["vision"])  # what is fed back moves the last pass


def test_without_feedback_there_is_one_pass_and_no_xi_is_trained():
    task = make_task(None)
    losses = task.losses(class_batch())
    assert losses.others == {}
    assert not task.model.prompt.requires_grad
    logits, bottom_up, _ = task.model(class_batch().images)
    assert bottom_up is logits


def test_every_parameter_has_its_group_and_the_rate_goes_as_deits():
    recipe = Recipe(
        {"vision": 1.0, "head": 2.0, "feedback": 3.0}, warmup=0.1, schedule="cosine_warmup_with_min_lr",
        schedule_options={"min_lr_rate": 0.01, "warmup_lr_rate": 0.001},
    )  # fmt: skip
    task = make_task(AbSTopDown(1.0))
    optimizer = recipe.optimizer(task, task.lr_group)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    groups = {name: rates[id(parameter)] for name, parameter in task.named_parameters()}
    assert groups["model.prompt"] == groups["model.encoder.decoders.0.linear.weight"] == 3
    assert groups["model.encoder.vit.head.weight"] == 2
    assert groups["model.encoder.vit.blocks.0.attn.qkv.weight"] == 1
    schedule = recipe.scheduler(optimizer, 100)
    of_vision = next(group for group in optimizer.param_groups if group["name"] == "vision")
    course = []
    for _ in range(100):
        course.append(of_vision["lr"])
        optimizer.step()
        schedule.step()
    assert course[0] == pytest.approx(0.001)
    assert max(course) == pytest.approx(1)
    assert course.index(max(course)) in (9, 10)
    assert of_vision["lr"] == pytest.approx(0.01, abs=1e-3)


# The command line


@pytest.fixture(scope="module")
def run(objects, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("classify")
    result = command(
        "vlabs.train",
        "task=classify",
        *TINY,
        f"data.dir={objects}",
        "trainer.max_epochs=1",
        "hydra.run.dir=run",
        cwd=cwd,
    )
    assert result.returncode == 0, result.stderr
    return cwd / "run"


def test_a_classifier_is_trained_and_evaluated(run, objects, in_process, tmp_path):
    result = in_process("vlabs.evaluate", ["task=classify", f"ckpt={run}", "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    checkpoint = load_checkpoint(run)
    assert checkpoint.classifier.encoder.topdown.alpha == 1
    data = ClassDataset(load_split(objects, "val"), checkpoint.preprocessing)
    batch = data[BatchSpec(0, [Group(n, (0,)) for n in range(SIZES["tiny"].val_images)])]
    with torch.no_grad():
        logits, bottom_up, _ = checkpoint.classifier(batch.images)
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == batch.labels).float().mean()))
    assert found["bottom_up_top1"] == pytest.approx(100 * float((bottom_up.argmax(1) == batch.labels).float().mean()))
    wrong = in_process("vlabs.evaluate", ["task=vqa", f"ckpt={run}"], tmp_path)
    assert_one_line_error(wrong, "trained for the task 'classify'")


def test_maps_of_a_classifier_are_measured_by_its_class_without_patches(run, objects, in_process, tmp_path):
    given = ["task=faithfulness", f"ckpt={run}", "task.num_texts=3", "task.batch_size=5", "hydra.run.dir=out"]
    result = in_process("vlabs.evaluate", given, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "fusion is left out: it needs a text" in result.stdout
    model, preprocessing = load_checkpoint(run).classifier, load_checkpoint(run).preprocessing
    for line in (tmp_path / "out/faithfulness.jsonl").read_text().splitlines():
        record = json.loads(line)
        row = next(row for row in load_split(objects, "val") if row["image_id"] == record["id"])
        image = preprocessing.image(decode_image(read_bytes(row), ""))[None]
        values = class_maps(model, image, ["norm"])[1]["norm"][0]
        rows, columns = values.shape

        def score(taken):
            left, side = image.clone(), 32 // rows  # noqa: B023
            for patch in taken:
                top, start = side * (patch // columns), side * (patch % columns)  # noqa: B023
                left[..., top : top + side, start : start + side] = 0
            return 100.0 * (int(model(left)[0].argmax()) == row["label"])  # noqa: B023

        deletion, insertion = areas_by_hand(values.flatten().argsort(descending=True).tolist(), score)
        assert record["norm"]["deletion"] == pytest.approx(deletion)
        assert record["norm"]["insertion"] == pytest.approx(insertion)
    only = in_process("vlabs.evaluate", ["task=faithfulness", f"ckpt={run}", "task.maps=[contrast]"], tmp_path)
    assert_one_line_error(only, "task.maps", "contrast is left out: it needs a text")


def test_maps_of_gradients_of_a_classifier_equal_a_plain_computation(run):
    model = load_checkpoint(run).classifier.double()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    logits, maps = class_maps(model, image, ["relevance", "normgrad"])
    attention, states = [], []
    hooks = [
        block.norm2.register_forward_pre_hook(lambda _, given, n=n: states.__setitem__(slice(n, n + 1), [given[0]]))
        for n, block in enumerate(model.encoder.vit.blocks)
    ]
    seen = model(image.requires_grad_(), record=attention)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen[0], logits)
    gradients = torch.autograd.grad(seen[0].max(), [*attention, *states])
    relevance = torch.eye(attention[0].shape[-1], dtype=torch.float64)
    for gradient, read in zip(gradients, attention, strict=False):
        relevance = relevance + (gradient * read).clamp(min=0).mean(dim=1)[0] @ relevance
    torch.testing.assert_close(maps["relevance"].flatten().double(), relevance[0, 1:])
    product = torch.ones(len(relevance), dtype=torch.float64)
    for gradient, x in zip(gradients[len(attention) :], states, strict=True):
        one = gradient[0].norm(dim=1) * x[0].norm(dim=1)
        if (one > 0).sum() > 1:  # of the last one, only [cls] is read
            product *= (one - one.min()) / (one.max() - one.min())
    torch.testing.assert_close(maps["normgrad"].flatten().double(), product[1:].detach())
    assert maps["normgrad"].unique().numel() > 1


def test_a_classifier_starts_the_image_encoder_of_a_run_on_texts(run, tiny_options, in_process, tmp_path):
    options = [*tiny_options, "trainer.max_epochs=1", "trainer.limit_train_batches=1", "task.freeze=[vision,feedback]"]
    result = in_process(
        "vlabs.train", [*options, "data.image_size=48", f"init={run}", "logger=csv", "hydra.run.dir=vqa"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "resampled (1): vision.vit.pos_embed" in result.stdout
    before, after = load_checkpoint(run).classifier.encoder, load_checkpoint(tmp_path / "vqa").model.vision
    assert torch.equal(before.decoders[1].linear2.weight, after.decoders[1].linear2.weight)
    assert torch.equal(before.vit.blocks[0].attn.qkv.weight, after.vit.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.passes=first", "task.passes=first must be one of both, second"),
        ("model/topdown=qa_vit", "QAViT steers by words, and a classifier has none: choose another model/topdown"),
        ("data.crop=2", "data.crop=2"),
        ("model=mini", "pass model=classifier"),
        ("task.diversity_weight=1", "task.compile do not keep"),
    ],
)
def test_wrong_options_are_one_line(override, message, objects, in_process, tmp_path):
    more = ["task.recompute_activations=true"] if "diversity" in override else []
    result = in_process("vlabs.train", ["task=classify", *TINY, f"data.dir={objects}", override, *more], tmp_path)
    assert_one_line_error(result, message)


def test_a_task_refuses_data_of_another_kind(objects, tiny_data, in_process, tmp_path):
    result = in_process("vlabs.train", ["task=classify", "data=vqav2", f"data.dir={tiny_data}"], tmp_path)
    assert_one_line_error(result, "task=classify trains on images with a class", "holds questions")
    result = in_process("vlabs.train", ["task=vqa", "data=classes", f"data.dir={objects}"], tmp_path)
    assert_one_line_error(result, "task=vqa trains on questions", "holds images with a class")


@pytest.mark.parametrize(
    "option",
    [
        {"rand_augment": "rand-m9-n2"},
        {"max_length": 20},
        {"bucket_batches": 4},
        {"scaled_decoding": False},
        {"texts_per_image": 2},
        {"names": ["a"]},
        {"sets": {}},
    ],
)
def test_options_that_images_without_texts_do_not_use_are_refused(option, objects):
    name = next(iter(option))
    with pytest.raises(UserError, match=rf"data\.{name}=.* do not use it; choose one of aug.*num_workers"):
        check_values({"data": {"_target_": "vlabs.data.classes.ClassDataModule", "dir": str(objects), **option}})


def test_options_of_texts_may_stand_in_a_config_of_old_at_their_defaults(objects):
    old = {"max_length": 50, "tokenizer": None, "rand_augment": None, "scaled_decoding": True, "bucket_batches": 0}
    assert ClassDataModule(objects, **old, shuffle_block=0).batch_size == 64
