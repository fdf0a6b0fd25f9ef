"""Prepare captions in WebDataset shards, as img2dataset downloads CC3M, CC12M or SBU, to pre-train at scale.

    vlabs prepare webdataset --shards 'cc3m/*.tar' --out-dir data/cc3m
    vlabs prepare webdataset --shards 'cc3m/train-*.tar' --val-shards 'cc3m/val-*.tar' --out-dir data/cc3m

Download: the shards, with img2dataset or from the hub.

A sample is a sequence of files with one name: `000012.jpg` with `000012.txt`, or with a `000012.json` whose field
`caption` is a text or a list of texts. Images stay in the shards and are read there: only the place of each image and
its captions are written, shard by shard. So preparing takes as long as reading the headers of the tar files, memory is
constant, and a stopped run continues with the next shard.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from data_prep.engine.folder import BadItem, describe_raw, write_tokenizer
from data_prep.engine.pipeline import check_vocab_size
from data_prep.engine.places import is_picture
from data_prep.engine.reader import new_parser
from data_prep.engine.tars import check_not_packed, members, open_tar
from data_prep.engine.units import Batches, Folder, Row, Unit, prepare_units
from data_prep.readers.classes import storable
from vlabs.data.features import CAPTION_FEATURES
from vlabs.errors import UserError, one_line, run_cli
from vlabs.utils.json_file import encoding_of, parse_line

FEATURES = datasets.Features(
    {
        **CAPTION_FEATURES,
        # Where the image's bytes are, which are not in the row.
        "path": datasets.Value("string"),
        "offset": datasets.Value("int64"),
        "size": datasets.Value("int64"),
    }
)
_PART = pa.schema(
    [
        ("key", pa.string()), ("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
        ("captions", pa.list_(pa.string())),
    ]
)  # fmt: skip
_LARGEST_TEXT = 64 * 2**20


class Sample(NamedTuple):
    """An image in a shard with its captions; what is wrong with it, where something is."""

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
    check_not_packed(path)
    with open_tar(path) as archive:
        key, found = "", dict[str, Any]()
        for member in members(archive, path):
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if (this := folder + slash + stem) != key:
                if found:
                    yield _sample(key, found, field)
                key, found = this, {}
            # Of `x.input.jpg` and `x.target.jpg` the first is the image, as of `x.jpg` and `x.png`.
            last = suffix.lower().rpartition(".")[2]
            if is_picture(name):
                found.setdefault("picture", (member.offset_data, member.size))
            elif last in ("txt", "json") and member.size <= _LARGEST_TEXT:
                content = archive.extractfile(member)
                found.setdefault(last, b"" if content is None else content.read())
            else:
                found.setdefault("other", name)
        if found:
            yield _sample(key, found, field)


def _sample(key: str, found: dict[str, Any], field: str) -> Sample:
    offset, size = found.get("picture", (0, 0))
    captions: Any = []
    try:
        if "txt" in found:
            captions = [found["txt"].decode(encoding_of(found["txt"]))]
        elif "json" in found:
            said = parse_line(found["json"].decode(encoding_of(found["json"]))).get(field)
            captions = said if isinstance(said, list) else [said]
    except (ValueError, AttributeError, RecursionError) as error:
        return Sample(key, offset, size, [], f"unreadable caption ({one_line(str(error))})")
    captions = [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]
    wrong = "" if size and captions else "no image" if not size else "no caption"
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
    """Write the prepared folder `out_dir`, see `prepare_units`.

    Args:
        shards: by split, tar files.
        name: of the dataset.
        field: as in `read_shard`.
        val_fraction: part of the samples of `train` that go to `val`; which ones depends on their keys alone.
        vocab_size: of a tokenizer that is trained on the training captions; 0 for none.
        on_bad: see `prepare_units`; a sample without an image or a caption is bad.
    """
    units = [
        Unit(split, path.name, partial(_of_shard, split, path, field))
        for split, paths in shards.items()
        for path in paths
    ]

    def place(read: Callable[[], Batches]) -> Batches:
        images = captions = 0
        for split, samples in read():
            rows: dict[str, list[Row]] = {}
            for sample in samples:
                of_val = split == "train" and _share(f"{Path(sample['path']).name}/{sample['key']}") < val_fraction
                rows.setdefault("val" if of_val else split, []).append(_row(images, captions, sample))
                images, captions = images + 1, captions + len(sample["captions"])
            yield from rows.items()

    def finish(folder: Path, counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if vocab_size and counts["train"]["images"]:
            batches = datasets.load_from_disk(str(folder / "train")).select_columns("caption").iter(1000)
            texts = (text for batch in batches for captions in batch["caption"] for text in captions)
            write_tokenizer(folder, texts, vocab_size)
        return {}

    def count(rows: list[Row]) -> dict[str, int]:
        texts = sum(len(row["caption"]) for row in rows)
        return {"images": len(rows), "captions": texts, "captions_with_region": 0}

    options = {"field": field, "val_fraction": val_fraction, "vocab_size": vocab_size}
    raw_files = [describe_raw(path) for paths in shards.values() for path in paths]
    folder = Folder("captions", name, FEATURES, units, raw_files, options, _PART, place, count, finish)
    prepare_units(folder, out_dir, on_bad)


def _of_shard(split: str, path: Path, field: str) -> Iterator[Row | BadItem]:
    place = storable(path.absolute())
    for sample in read_shard(path, field):
        if sample.wrong:
            yield BadItem(sample.wrong.partition(" (")[0], split, f"{path.name}: {sample.key} ({sample.wrong})")
        else:
            key = sample.key.encode("utf-8", "backslashreplace").decode()
            yield {"key": key, "path": place, "offset": sample.offset, "size": sample.size, "captions": sample.captions}


def _row(image_id: int, caption_id: int, sample: Row) -> Row:
    count = len(sample["captions"])
    return {
        "image_id": image_id,
        "image": b"",
        "caption_id": list(range(caption_id, caption_id + count)),
        "caption": sample["captions"],
        "target_instances": [[]] * count,
        "region": [b""] * count,
        **{name: sample[name] for name in ("path", "offset", "size")},
    }


def _share(key: str) -> float:
    """A number in [0, 1) that a key always has."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


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
    parser = new_parser("webdataset", __doc__, "samples without an image or a caption")
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
    arguments = parser.parse_args()
    if not 0 <= arguments.val_fraction < 1:
        raise UserError(f"--val-fraction must be at least 0 and below 1, not {arguments.val_fraction}")
    check_vocab_size(arguments.vocab_size)
    shards = {"train": expand("--shards", arguments.shards)}
    if arguments.val_shards:
        shards["val"] = expand("--val-shards", arguments.val_shards)
        if both := set(shards["train"]) & set(shards["val"]):
            raise UserError(f"{min(both)} is among --shards and --val-shards: it can be of one split only")
    fraction = 0.0 if arguments.val_shards else arguments.val_fraction
    name = arguments.name or arguments.out_dir.resolve().name
    prepare_shards(
        shards, arguments.out_dir, name, arguments.caption_field, fraction, arguments.vocab_size, arguments.on_bad
    )


if __name__ == "__main__":
    run_cli(main)
