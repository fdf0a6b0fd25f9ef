"""Captions in WebDataset shards: read where they lie, every one once an epoch whatever the ranks and workers."""

import io
import json
import tarfile

import numpy as np
import pytest
from conftest import TINY_MODEL, assert_one_line_error, command
from PIL import Image

from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import read_bytes
from vlabs.data.prepared import load_split, read_manifest
from vlabs.data.sampling import GroupSampler

COLORS = ["red", "blue", "green", "white", "black", "yellow"]


def jpg(number):
    file = io.BytesIO()
    Image.new("RGB", (40, 32), COLORS[number % len(COLORS)]).save(file, "PNG")
    return file.getvalue()


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_shards(folder, shards=3, samples=10, extra=()):
    """As img2dataset leaves them: an image, its text, and what else is known of it."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for n in range(samples):
                key = f"{shard:05d}{n:04d}"
                add(archive, f"{key}.png", jpg(n))
                add(archive, f"{key}.txt", f"A {COLORS[n % 6]} square, number {shard * samples + n}.".encode())
                add(archive, f"{key}.json", json.dumps({"caption": "another", "url": "x"}).encode())
            for name, content in extra if shard == 1 else ():
                add(archive, name, content)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("shards")
    write_shards(cwd / "raw")
    result = command("data_prep.webdataset", "--shards", "raw/*.tar", "--val-fraction", 0.2, "--vocab-size", 300,
                     "--out-dir", "out", cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cwd / "out"


def test_every_sample_is_there_once_with_its_own_image(prepared):
    rows = [row for split in ("train", "val") for row in load_split(prepared, split)]
    assert sorted(row["image_id"] for row in rows) == list(range(30))
    assert sorted(id_ for row in rows for id_ in row["caption_id"]) == list(range(30))
    for row in rows:
        number = int(row["caption"][0].split()[-1][:-1])
        assert row["caption"] == [f"A {COLORS[number % 10 % 6]} square, number {number}."]
        assert read_bytes(row) == jpg(number % 10)
    splits = read_manifest(prepared)["splits"]
    assert splits["train"]["images"] + splits["val"]["images"] == 30
    assert 0 < splits["val"]["images"] < 15


@pytest.mark.parametrize("block", [0, 4])
def test_every_caption_comes_once_an_epoch_over_ranks_and_workers(prepared, block):
    rows = load_split(prepared, "train")
    seen = {}
    for workers in (0, 2):
        data = CaptionDataModule(prepared, image_size=32, batch_size=4, num_workers=workers, shuffle_block=block)
        batches = list(data.train_dataloader())
        seen[workers] = [id_ for batch in batches for id_ in batch.caption_ids]
        assert all(len(batch.images) == len(batch.caption_ids) for batch in batches)
    assert seen[0] == seen[2]
    assert sorted(seen[0]) == sorted(id_ for row in rows for id_ in row["caption_id"])
    positions = np.zeros(len(rows), dtype=int)
    samplers = [
        GroupSampler(np.arange(len(rows)), positions, 1, 4, True, 0, rank, 2, shuffle_block=block) for rank in (0, 1)
    ]
    of_ranks = [[group.row for batch in sampler for group in batch.groups] for sampler in samplers]
    assert sorted(of_ranks[0] + of_ranks[1]) == list(range(len(rows)))


def test_blocks_keep_reading_in_a_few_places_and_differ_by_epoch():
    count = 10_000
    sampler = GroupSampler(np.arange(count), np.zeros(count, dtype=int), 1, 1, True, 0, shuffle_block=100)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(np.array([batch.groups[0].row for batch in sampler]))
    for order in orders:
        assert sorted(order) == list(range(count))
        # Any 800 that follow each other come from as many blocks as are mixed, not from all hundred.
        assert max(len(set(order[start : start + 800] // 100)) for start in range(0, count, 800)) == 8
    assert not (orders[0] == orders[1]).all()


def test_a_run_that_was_stopped_reads_no_shard_again(tmp_path, monkeypatch):
    import data_prep.readers.webdataset as module

    folder = write_shards(tmp_path / "raw")
    shards = {"train": sorted(folder.glob("*.tar"))}
    read = []
    original = module.read_shard

    def stopping(path, field):
        read.append(path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return original(path, field)

    monkeypatch.setattr(module, "read_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        module.prepare_shards(shards, tmp_path / "out", "shards")
    assert not (tmp_path / "out").exists()
    module.prepare_shards(shards, tmp_path / "out", "shards")
    assert read == ["00000.tar", "00001.tar", "00002.tar", "00002.tar"]
    assert len(load_split(tmp_path / "out", "train")) == 30
    assert not list(tmp_path.glob("out.*"))


def test_pre_training_reads_shards_beside_other_captions(prepared, tmp_path):
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"image": f"{n}.png", "caption": f"Number {n}", "split": "train"}) + "\n" for n in range(4))
    )
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(jpg(n))
    own = command("data_prep.own", "--table", "own.jsonl", "--out-dir", "own", "--vocab-size", 0, cwd=tmp_path)
    assert own.returncode == 0, own.stderr
    result = command(
        "vlabs.train", "task=pretrain", "data=webdataset", f"data.dir={prepared}", "+data.sets.own=own",
        "data.image_size=32", "data.batch_size=8", "data.num_workers=0", "trainer.max_epochs=1", "logger=csv",
        "task.ranking_images=3", "trainer.enable_progress_bar=false", *TINY_MODEL, "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["seen/texts"]
    assert seen == len(load_split(prepared, "train")) + 4


def test_bad_samples_are_named_counted_and_left_out_only_if_told_to(tmp_path):
    extra = [
        ("b1.txt", b"No picture"), ("b2.png", jpg(0)), ("b3.png", jpg(0)), ("b3.txt", b"  "), ("b4.png", jpg(1)),
        ("b4.json", b"{"), ("c.png", jpg(2)), ("c.json", json.dumps({"caption": ["Two", "captions"]}).encode()),
    ]  # fmt: skip
    write_shards(tmp_path / "raw", extra=extra)
    made = ["data_prep.webdataset", "--shards", "raw/*.tar", "--out-dir", "out", "--val-fraction", 0]
    assert_one_line_error(command(*made, cwd=tmp_path), "4 bad items", "00001.tar: b1 (no image)", "--on-bad skip")
    assert not (tmp_path / "out").exists()
    result = command(*made, "--on-bad", "skip", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest["dropped"] == {"no image": 1, "no caption": 2, "unreadable caption": 1}
    rows = load_split(tmp_path / "out", "train")
    assert len(rows) == 31
    assert ["Two", "captions"] in rows["caption"]


def test_shards_that_are_none_or_gone_are_one_line(prepared, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    for arguments, parts in (
        (["--shards", "nowhere/*.tar"], ["--shards nowhere/*.tar"]),
        (["--shards", "a.tar"], ["a.tar", "not a whole tar file"]),
        (["--shards", "b.tar.gz"], ["b.tar.gz", "gunzip"]),
        (["--shards", "a.tar", "--val-shards", "a.tar"], ["a.tar is among --shards and --val-shards"]),
    ):
        result = command("data_prep.webdataset", *arguments, "--out-dir", "out", cwd=tmp_path)
        assert_one_line_error(result, *parts)
    row = dict(load_split(prepared, "train")[0])
    row["path"] = str(tmp_path / "gone.tar")
    from vlabs.errors import UserError

    with pytest.raises(UserError, match="put it back or prepare the data again"):
        read_bytes(row)
