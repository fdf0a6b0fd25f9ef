"""From texts about images to the prepared form of `vlabs.data.prepared`: the part that all raw data share.

1. The questions or captions go into a sqlite index, one at a time, so memory is constant.
2. Worker processes build shards of a fixed number of images; a finished shard has its final name and a record.
3. The finished folder gets its name, in one step, when nothing is left to do.

The output depends only on the raw data and the options. Until the end it is in `OUT.vlabs-partial`, where a run that
was stopped, even by SIGKILL, continues.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import errno
import hashlib
import multiprocessing
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.engine.folder import (
    SPECIAL_TOKENS,
    BadItem,
    describe_raw,
    is_made,
    report_bad,
    say_ready,
    start_or_go_on,
    write_datasets_files,
    write_manifest,
    write_tokenizer,
)
from data_prep.engine.places import IMAGES_SCHEMA, fingerprint, write_images
from data_prep.engine.raw import Reader
from data_prep.engine.shards import ShardBuilder, ShardRecord, ShardTask, build_shard, open_readonly, start_worker
from data_prep.engine.texts import QUESTIONS, Index, Kind, Rows
from vlabs.data.prepared import FORMAT_VERSION
from vlabs.errors import UserError
from vlabs.utils.files import new_folder

_BYTES = 256


@dataclass(frozen=True)
class Options:
    """What a user chooses.

    Attributes:
        min_answer_count: how often an answer is a question's major answer in train + val to be in the vocabulary;
            nothing to captions.
        vocab_size: size of the tokenizer trained on the train questions or captions; 0 for none.
        on_bad: `error`, or `skip` to leave out what cannot be used.
        shard_size: images per file.
        num_workers: processes; has no influence on what is written.
        name: what the dataset is called; what the raw data say if empty.
    """

    min_answer_count: int = 1
    vocab_size: int = 8192
    on_bad: str = "error"
    shard_size: int = 512
    num_workers: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        for name, least in (("min_answer_count", 1), ("shard_size", 1), ("num_workers", 1), ("vocab_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        check_vocab_size(self.vocab_size)

    def recorded(self, kind: Kind, of_raw: dict[str, Any]) -> dict[str, Any]:
        """Return the options that what is written depends on, with those of the raw data."""
        values = asdict(self)
        for name in ("num_workers", "name", *(() if kind == QUESTIONS else ("min_answer_count",))):
            del values[name]
        return {**of_raw, **values}


def check_vocab_size(size: int) -> None:
    """Raise a UserError unless there can be a tokenizer of so many tokens, or none."""
    smallest = _BYTES + len(SPECIAL_TOKENS)
    if size and size < smallest:
        raise UserError(f"--vocab-size must be 0 (no tokenizer) or at least {smallest}, not {size}")


def prepare(raw: Reader, out_dir: Path, options: Options) -> None:
    """Make the prepared folder, or continue where an earlier run stopped.

    Raises:
        UserError: the raw data is bad, the folder exists and holds something else, or it cannot be written.
    """
    out_dir = out_dir.absolute()
    raw_files = raw_files_of(raw)
    made_from = {"options": options.recorded(raw.kind, raw.options), "raw_files": raw_files}
    if is_made(out_dir, made_from | ({"name": options.name} if options.name else {})):
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        splits = prepare_in(partial, raw, options, out_dir.name, raw_files)
    say_ready(out_dir, splits)


def prepare_in(
    partial: Path, raw: Reader, options: Options, name: str, raw_files: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`prepare` in a folder that `vlabs.utils.files.new_folder` gave.

    Args:
        name: of a dataset that has no name of its own.
        raw_files: of `raw_files_of`.

    Returns:
        What the manifest says of the splits.
    """
    try:
        run = _Run(raw, options, partial, name)
        run.read_tables()
        run.locate_images()
        run.build_shards()
        return run.describe(raw_files)
    except (OSError, sqlite3.OperationalError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "full" in str(error)
        hint = "; free some space and run again, it continues where it stopped" if full else ""
        raise UserError(f"cannot make {partial}: {error}{hint}") from error


def raw_files_of(raw: Reader) -> list[dict[str, Any]]:
    """What a manifest says of raw data."""
    return [describe_raw(path, hashed=True) for path in raw.tables] + [describe_raw(path) for path in raw.images]


class _Run:
    """The steps of `prepare`, each of which finds what is done already."""

    def __init__(self, raw: Reader, options: Options, prepared: Path, name: str) -> None:
        self.raw = raw
        self.name = name
        self.kind = raw.kind
        self.options = options
        self.recorded_options = options.recorded(raw.kind, raw.options)
        self.prepared = prepared
        # What happens to bad items in the end changes no shard.
        shards_options = {name: value for name, value in self.recorded_options.items() if name != "on_bad"}
        tables = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in raw.tables]
        self.work = start_or_go_on(prepared, [FORMAT_VERSION, self.kind.name, tables, shards_options])
        self.records = self.work / "records"
        self.index_file = self.work / "index.sqlite"
        self.images_file = self.work / "images.sqlite"

    def read_tables(self) -> None:
        """Make the index, the tokenizer, and the files of the kind."""
        if self.index_file.exists():
            return
        part = self.index_file.with_suffix(".part")
        part.unlink(missing_ok=True)
        index = Index(part, self.kind)
        self.raw.fill(index)
        index.write_files(self.prepared, self.options.min_answer_count)
        index.finish()
        with closing(open_readonly(part)) as connection:
            if self.options.vocab_size and "train" in _splits(connection):
                found = connection.execute("SELECT text FROM items WHERE split = 'train' ORDER BY image_id, item_id")
                write_tokenizer(self.prepared, (text for (text,) in found), self.options.vocab_size)
        part.replace(self.index_file)

    def locate_images(self) -> None:
        """Note where every image is; anew in every run, because images can be mended between two runs."""
        self.images_file.unlink(missing_ok=True)
        with (
            closing(open_readonly(self.index_file)) as index,
            closing(sqlite3.connect(self.images_file)) as images,
        ):
            images.executescript(IMAGES_SCHEMA)
            for split in _splits(index):
                for place in range(self.kind.pictures):
                    wanted = index.execute(
                        "SELECT image_id, name FROM pictures WHERE split = ? AND place = ? ORDER BY image_id",
                        (split, place),
                    )
                    write_images(images, f"{split}/{place}", self.raw.image_store(split).locate(wanted))
            images.commit()

    def build_shards(self) -> None:
        """Build the shards that are not there yet."""
        with (
            closing(open_readonly(self.index_file)) as index,
            closing(open_readonly(self.images_file)) as images,
        ):
            total = index.execute("SELECT count(*) FROM (SELECT DISTINCT split, image_id FROM items)").fetchone()
            arguments = (self.kind, self.prepared, self.index_file, self.images_file)
            with tqdm(total=total[0], unit="image", desc="images", smoothing=0.05) as progress:

                def unfinished() -> Iterator[ShardTask]:
                    for task, size in self._tasks(index):
                        if _is_done(task, images, self.kind):
                            progress.update(size)
                        else:
                            yield task

                if self.options.num_workers == 1:
                    sizes: Iterable[int] = map(ShardBuilder(*arguments).build, unfinished())
                else:
                    sizes = _build_in_pool(unfinished(), self.options.num_workers, arguments)
                for size in sizes:
                    progress.update(size)

    def _tasks(self, index: sqlite3.Connection) -> Iterator[tuple[ShardTask, int]]:
        """Yield the shards of all splits, with the number of images in each."""
        for split in _splits(index):
            (self.prepared / split).mkdir(exist_ok=True)
            number_of_images: int = index.execute(
                "SELECT count(*) FROM (SELECT DISTINCT image_id FROM items WHERE split = ?)", (split,)
            ).fetchone()[0]
            shards = -(-number_of_images // self.options.shard_size)
            ids = index.execute("SELECT DISTINCT image_id FROM items WHERE split = ? ORDER BY image_id", (split,))
            for number in range(shards):
                image_ids = [image_id for (image_id,) in ids.fetchmany(self.options.shard_size)]
                task = ShardTask(
                    split=split,
                    first_image=image_ids[0],
                    last_image=image_ids[-1],
                    data_file=self.prepared / split / f"data-{number:05d}-of-{shards:05d}.arrow",
                    record_file=self.records / f"{split}-{number:05d}.json",
                )
                yield task, len(image_ids)

    def describe(self, raw_files: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Write the files that make the folder a prepared one, and return what it says of the splits.

        Raises:
            UserError: there are bad items, which are not to be skipped.
        """
        splits: dict[str, dict[str, Any]] = {}
        files: dict[str, list[str]] = {}
        with closing(open_readonly(self.index_file)) as index:
            bad = [BadItem(*row) for row in index.execute("SELECT reason, split, item FROM bad")]
            for task, _ in self._tasks(index):
                record = ShardRecord.read(task.record_file)
                bad.extend(record.bad)
                counts = splits.setdefault(task.split, {**dict.fromkeys(record.counts, 0), "sha256": ""})
                for name, count in record.counts.items():
                    counts[name] += count
                counts["sha256"] = hashlib.sha256((counts["sha256"] + record.sha256).encode()).hexdigest()
                files.setdefault(task.split, []).append(task.data_file.name)
            rows = Rows(self.kind, self.prepared, index)
            seen = dict(index.execute("SELECT split, count FROM seen"))
        dropped = report_bad(bad, self.options.on_bad, self.work / "bad_items.jsonl")
        if not any(counts["images"] for counts in splits.values()):
            raise UserError(f"there are no {self.kind.item}s that can be used: all of them are left out")
        for split, names in files.items():
            write_datasets_files(self.prepared / split, names, splits[split]["sha256"], rows.features)
        name = self.options.name or self.raw.called(seen) or self.name
        more = {"options": self.recorded_options, "raw_files": raw_files}
        write_manifest(self.prepared, self.kind.name, name, splits=splits, **rows.summary(), **dropped, **more)
        return splits


def _build_in_pool(tasks: Iterable[ShardTask], num_workers: int, arguments: tuple[Any, ...]) -> Iterator[int]:
    """Build shards in worker processes, few of them waiting at a time; yield the number of images of each."""
    # Workers are forked from a server that has imported everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.engine.pipeline"])
    waiting: set[concurrent.futures.Future[int]] = set()
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=start_worker, initargs=(arguments,)
    ) as pool:
        try:
            for task in tasks:
                waiting.add(pool.submit(build_shard, task))
                if len(waiting) > 2 * num_workers:
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield sum(future.result() for future in done)
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out: run again with a smaller --num-workers;"
                " it continues where it stopped"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _splits(index: sqlite3.Connection) -> list[str]:
    return [split for (split,) in index.execute("SELECT DISTINCT split FROM items ORDER BY split")]


def _is_done(task: ShardTask, images: sqlite3.Connection, kind: Kind) -> bool:
    """Whether a shard is there, has nothing bad in it, and is made of the raw images as they are now."""
    if not task.record_file.exists() or not task.data_file.exists():
        return False
    record = ShardRecord.read(task.record_file)
    return not record.bad and record.images_fingerprint == fingerprint(*task.read_images(images, kind).values())
