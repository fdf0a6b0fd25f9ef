"""Captions in WebDataset shards, as CC3M, CC12M or SBU are downloaded by img2dataset: for pre-training at scale.

    python -m data_prep.webdataset --shards 'cc3m/*.tar' --out-dir data/cc3m
    python -m data_prep.webdataset --shards 'cc3m/train-*.tar' --val-shards 'cc3m/val-*.tar' --out-dir data/cc3m

A sample is some files of one name that follow each other: `000012.jpg` with `000012.txt`, or with `000012.json` that
has a field `caption`, a text or a list of them. Pictures stay in the shards and are read where they lie: what is
written is where each picture is, with its captions, shard by shard. So preparing takes as long as reading the headers
of the tar files, memory does not follow their number, and a run that was stopped goes on with the next shard.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from tqdm import tqdm

from data_prep.engine.images import members, open_tar
from data_prep.engine.pipeline import is_made, say_ready, train_tokenizer, write_datasets_files
from vlabs.data.decoding import known_suffixes
from vlabs.data.prepared import CAPTION_FEATURES, FORMAT_VERSION
from vlabs.errors import UserError, one_line, run_cli, show
from vlabs.utils.files import WORK, clear, new_folder, replacing, write_json

FEATURES = datasets.Features(
    {
        **CAPTION_FEATURES,
        # Where the picture's bytes are, which are not in the row.
        "path": datasets.Value("string"),
        "offset": datasets.Value("int64"),
        "size": datasets.Value("int64"),
    }
)
_BATCH = 5000  # rows that are written at once


class Sample(NamedTuple):
    """A picture in a shard with its captions; what is wrong with it, where something is."""

    key: str
    offset: int
    size: int
    captions: list[str]
    wrong: str = ""


def read_shard(path: Path, field: str = "caption") -> Iterator[Sample]:
    """The samples of a shard.

    Args:
        field: of a sample's JSON file, for the caption; a `.txt` file goes before it.

    Raises:
        UserError: it is no whole tar file.
    """
    if path.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"{path} is compressed, so pictures cannot be read inside it: gunzip it first")
    with open_tar(path) as archive:
        key, found = "", dict[str, Any]()
        for member in members(archive, path):
            if not member.isfile():
                continue
            name = PurePosixPath(member.name)
            stem, _, suffix = name.name.partition(".")
            if (this := str(name.with_name(stem))) != key:
                if found:
                    yield _sample(key, found, field)
                key, found = this, {}
            if f".{suffix.lower()}" in known_suffixes():
                found["picture"] = (member.offset_data, member.size)
            elif suffix in ("txt", "json"):
                content = archive.extractfile(member)
                found[suffix] = b"" if content is None else content.read()
        if found:
            yield _sample(key, found, field)


def _sample(key: str, found: dict[str, Any], field: str) -> Sample:
    offset, size = found.get("picture", (0, 0))
    captions: Any = []
    try:
        if "txt" in found:
            captions = [found["txt"].decode("utf-8")]
        elif "json" in found:
            said = json.loads(found["json"]).get(field)
            captions = said if isinstance(said, list) else [said]
    except (ValueError, AttributeError, RecursionError) as error:
        return Sample(key, offset, size, [], f"unreadable caption ({one_line(str(error))})")
    captions = [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]
    wrong = "" if size and captions else "no picture" if not size else "no caption"
    return Sample(key, offset, size, captions, wrong)


def prepare_shards(
    shards: Mapping[str, Sequence[Path]],
    out_dir: Path,
    name: str,
    field: str = "caption",
    val_fraction: float = 0.0,
    vocab_size: int = 0,
    on_bad: str = "error",
) -> None:
    """Write the prepared folder `out_dir`.

    Args:
        shards: by split, tar files.
        name: of the data set.
        field: as in `read_shard`.
        val_fraction: part of the samples of `train` that go to `val`; which ones depends on their keys alone.
        vocab_size: of a tokenizer that is trained on the training captions; 0 for none.
        on_bad: `error`, or `skip` to leave out samples without a picture or a caption.

    Raises:
        UserError: `out_dir` holds something else, a shard is damaged, there is a bad sample, or none at all.
    """
    out_dir = out_dir.absolute()
    options = {"field": field, "val_fraction": val_fraction, "vocab_size": vocab_size, "on_bad": on_bad}
    files = [path for paths in shards.values() for path in paths]
    raw_files = [{"name": path.name, "size": path.stat().st_size} for path in files]
    if is_made(out_dir, {"raw_files": raw_files, "options": options}):
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        (partial / WORK).mkdir(exist_ok=True)
        records = []
        with tqdm([(split, path) for split, paths in shards.items() for path in paths], unit="shard") as progress:
            for split, path in progress:
                progress.set_postfix_str(path.name)
                records.append((split, path, *_read_part(path, partial / WORK, field)))
        bad = [f"{path.name}: {key} ({wrong})" for _, path, _, found in records for key, wrong in found["bad"]]
        if bad and on_bad != "skip":
            raise UserError(
                f"{len(bad):,} samples cannot be used, the first: {bad[0]}: mend them, or leave them out with "
                "--on-bad skip"
            )
        if bad:
            show(f"left out {len(bad):,} samples, the first: {bad[0]}")
        clear(partial, WORK)
        counts = _write_splits(records, partial, val_fraction)
        if not counts.get("train", {}).get("images"):
            raise UserError(f"{name} has no sample to train on")
        if vocab_size:
            print("training the tokenizer")
            (partial / "tokenizer").mkdir()
            train_tokenizer(_captions(partial / "train"), vocab_size).save(str(partial / "tokenizer/tokenizer.json"))
        reasons = Counter(wrong.split(" (")[0] for _, _, _, found in records for _, wrong in found["bad"])
        manifest = {
            "format": FORMAT_VERSION, "kind": "captions", "name": name, "splits": counts, "dropped": reasons,
            "dropped_items": bad, "options": options, "raw_files": raw_files,
        }  # fmt: skip
        write_json(partial / "manifest.json", manifest)
    say_ready(out_dir, counts)


_PART = pa.schema(
    [("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("captions", pa.list_(pa.string()))]
)


def _read_part(path: Path, work: Path, field: str) -> tuple[Path, dict[str, Any]]:
    """The samples of a shard as an Arrow file, and what is bad in it; of an earlier run, if the shard is as it was."""
    stat = path.stat()
    identity = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, field]
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]
    part, record = work / f"{name}.arrow", work / f"{name}.json"
    if record.is_file() and part.is_file():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if found["shard"] == identity:
            return part, found
    found = {"shard": identity, "bad": []}
    with replacing(part) as half, pa.OSFile(str(half), "wb") as sink, pa.ipc.new_stream(sink, _PART) as writer:
        rows: list[Sample] = []
        for sample in read_shard(path, field):
            if sample.wrong:
                found["bad"].append([sample.key, sample.wrong])
                continue
            rows.append(sample)
            if len(rows) == _BATCH:
                writer.write_batch(_batch(rows))
                rows = []
        writer.write_batch(_batch(rows))
    write_json(record, found)
    return part, found


def _batch(rows: Sequence[Sample]) -> pa.RecordBatch:
    columns = zip(*[row[:4] for row in rows], strict=True) if rows else [()] * 4
    return pa.RecordBatch.from_arrays(
        [pa.array(column, one.type) for column, one in zip(columns, _PART, strict=True)], schema=_PART
    )


def _write_splits(
    records: Sequence[tuple[str, Path, Path, dict[str, Any]]], prepared: Path, val_fraction: float
) -> dict[str, dict[str, Any]]:
    """Write the rows of all splits, a file a shard, and return what the manifest says of them."""
    schema = FEATURES.arrow_schema
    counts: dict[str, dict[str, Any]] = {}
    files: dict[str, list[str]] = {}
    images = captions = 0
    for number, (split, path, part, _) in enumerate(records):
        with pa.memory_map(str(part)) as source:
            for batch in pa.ipc.open_stream(source):
                rows: dict[str, list[dict[str, Any]]] = {}
                for sample in batch.to_pylist():
                    chosen = split
                    if split == "train" and _share(f"{path.name}/{sample['key']}") < val_fraction:
                        chosen = "val"
                    row = _row(images, captions, sample, path)
                    images, captions = images + 1, captions + len(sample["captions"])
                    rows.setdefault(chosen, []).append(row)
                for chosen, those in rows.items():
                    folder = prepared / chosen
                    folder.mkdir(parents=True, exist_ok=True)
                    name = f"data-{number:05d}-{len(files.get(chosen, [])):05d}.arrow"
                    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                        writer.write_batch(pa.RecordBatch.from_pylist(those, schema=schema))
                    files.setdefault(chosen, []).append(name)
                    count = counts.setdefault(
                        chosen, {"images": 0, "captions": 0, "captions_with_region": 0, "sha256": ""}
                    )
                    count["images"] += len(those)
                    count["captions"] += sum(len(row["caption"]) for row in those)
                    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                    count["sha256"] = hashlib.sha256((count["sha256"] + digest).encode()).hexdigest()
    for split, names in files.items():
        write_datasets_files(prepared / split, names, counts[split]["sha256"], FEATURES)
    return counts


def _row(image_id: int, caption_id: int, sample: dict[str, Any], path: Path) -> dict[str, Any]:
    count = len(sample["captions"])
    return {
        "image_id": image_id,
        "image": b"",
        "caption_id": list(range(caption_id, caption_id + count)),
        "caption": sample["captions"],
        "target_instances": [[]] * count,
        "region": [b""] * count,
        "path": str(path.absolute()),
        "offset": sample["offset"],
        "size": sample["size"],
    }


def _share(key: str) -> float:
    """A number in [0, 1) that a key always has."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _captions(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("data-*.arrow")):
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                for captions in batch.column("caption").to_pylist():
                    yield from captions


def expand(option: str, patterns: Sequence[str]) -> list[Path]:
    """The files that some patterns mean, sorted, each once.

    Raises:
        UserError: one of them means none.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = {Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file()}
        if not paths:
            raise UserError(f"{option} {pattern}: there is no such file")
        found |= paths
    return sorted(found)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.webdataset", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", nargs="+", required=True, help="tar files, or patterns of them in quotes")
    parser.add_argument("--val-shards", nargs="+", default=[], help="those of val")
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, help="without --val-shards: part of the samples for val (0.01)"
    )
    parser.add_argument("--caption-field", default="caption", help="of a sample's .json (default %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=0,
        help="of a tokenizer trained on the captions; 0 for none: pass data.tokenizer=FacebookAI/roberta-base",
    )  # fmt: skip
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help="samples without picture or text")
    parser.add_argument("--out-dir", type=Path, required=True, help="new folder of the prepared data")
    arguments = parser.parse_args()
    if not 0 <= arguments.val_fraction < 1:
        raise UserError(f"--val-fraction must be at least 0 and below 1, not {arguments.val_fraction}")
    if arguments.vocab_size and arguments.vocab_size < 261:
        raise UserError(f"--vocab-size must be 0 (no tokenizer) or at least 261, not {arguments.vocab_size}")
    shards = {"train": expand("--shards", arguments.shards)}
    if arguments.val_shards:
        shards["val"] = expand("--val-shards", arguments.val_shards)
        if both := set(shards["train"]) & set(shards["val"]):
            raise UserError(f"{min(both)} is among --shards and --val-shards: it can be of one split only")
    fraction = 0.0 if arguments.val_shards else arguments.val_fraction
    prepare_shards(
        shards, arguments.out_dir, arguments.out_dir.resolve().name, arguments.caption_field, fraction,
        arguments.vocab_size, arguments.on_bad,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
