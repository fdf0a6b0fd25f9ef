"""What becomes of a damaged archive: every byte of a small zip, tar and shard changed, and each cut off everywhere.

    python benchmarks/damage.py

For each change the archive is read as a preparation reads it, and every image is decoded. Prints how often it
was refused, an image was named as bad, all was as before, or something differs unnoticed: in tar files, which
have no checksum of what is in them, an image of other colors or a caption of other letters; never a name.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from data_prep.engine.places import NamedImages, read_image
from data_prep.readers.webdataset import read_shard
from vlabs.errors import UserError

NAMES = ("1.png", "2.png", "3.jpg")


def picture(name: str, color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "JPEG" if name.endswith("jpg") else "PNG")
    return file.getvalue()


def make_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(NAMES):
            method = zipfile.ZIP_DEFLATED if number else zipfile.ZIP_STORED
            archive.writestr(f"set/{name}", picture(name, (number * 90, 20, 30)), method)


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(NAMES):
            for one, content in ((name, picture(name, (number * 90, 20, 30))), (f"{name[0]}.txt", b"a caption")):
                member = tarfile.TarInfo(f"set/{one}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def pictures_of(path: Path) -> dict[str, object]:
    """By name what a preparation keeps of each image, or why it is bad."""
    found: dict[str, object] = {}
    for number, image in NamedImages((path,)).locate(enumerate(NAMES)):
        try:
            found[NAMES[number]] = ("bad", "missing") if isinstance(image, str) else read_image(image)[0]
        except ValueError as error:
            found[NAMES[number]] = ("bad", str(error))
    return found


def samples_of(path: Path) -> dict[str, object]:
    """By key what a preparation keeps of each sample, or why it is bad."""
    content = path.read_bytes()
    return {
        sample.key: ("bad", sample.wrong)
        if sample.wrong
        else (content[sample.offset : sample.offset + sample.size], tuple(sample.captions))
        for sample in read_shard(path)
    }


def changes(content: bytes) -> Iterator[tuple[str, bytes]]:
    end = len(content.rstrip(b"\0")) + 1100  # of a tar file the rest is padding
    for at in range(min(end, len(content))):
        yield "changed", content[:at] + bytes([content[at] ^ (0xFF if at % 2 else 0x01)]) + content[at + 1 :]
        yield "cut", content[:at]


def outcome(read: Callable[[Path], dict[str, object]], path: Path, right: dict[str, object]) -> str:
    try:
        found = read(path)
    except UserError:
        return "refused"
    if found == right:
        return "as before"
    if found.keys() != right.keys():
        return "A NAME IS LOST OR OTHER"
    bad = [value for value in found.values() if isinstance(value, tuple) and value[0] == "bad"]
    return "named as bad" if bad else "other content"


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, make, read in (
            ("zip", make_zip, pictures_of), ("tar", make_tar, pictures_of), ("shard", make_tar, samples_of),
        ):  # fmt: skip
            path = Path(folder) / f"a.{'zip' if kind == 'zip' else 'tar'}"
            make(path)
            content, right = path.read_bytes(), read(path)
            counts: dict[str, Counter[str]] = {"changed": Counter(), "cut": Counter()}
            for how, damaged in changes(content):
                path.write_bytes(damaged)
                counts[how][outcome(read, path, right)] += 1
            results[kind] = {"bytes": len(content), **{how: dict(count) for how, count in counts.items()}}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
