"""Memory that preparing VQA data takes, for two sizes of data: it should not follow the size.

    python benchmarks/prepare_memory.py --images 100000

Makes raw data in VQA v2's layout (16 px images, 5 questions each, 10 answers each) in a temporary folder, runs the real
command for a tenth of the images and for all, and prints the peak memory of its processes together: the sum of resident
sizes, and the same with pages that processes share counted once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

QUESTIONS_PER_IMAGE = 5
SAMPLE_EVERY = 0.05  # seconds


def make_raw(folder: Path, images: int) -> None:
    """Write train images, questions and annotations as zip files, one entry at a time."""
    folder.mkdir()
    draw = random.Random(0)
    pictures = []
    for number in range(64):
        buffer = io.BytesIO()
        Image.effect_noise((16, 16), number + 1).convert("RGB").save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    with zipfile.ZipFile(folder / "train2014.zip", "w") as archive:
        for image_id in range(images):
            archive.writestr(f"train2014/COCO_train2014_{image_id:012d}.jpg", pictures[image_id % len(pictures)])

    def questions() -> Iterator[dict[str, object]]:
        for image_id in range(images):
            for position in range(QUESTIONS_PER_IMAGE):
                yield {
                    "image_id": image_id,
                    "question_id": image_id * 1000 + position,
                    "question": f"What is the thing number {draw.randrange(5000)} next to the {draw.randrange(5000)}?",
                }

    def annotations() -> Iterator[dict[str, object]]:
        for image_id in range(images):
            for position in range(QUESTIONS_PER_IMAGE):
                answers = draw.choices([f"answer {int(4000 * draw.random() ** 3)}" for _ in range(3)], k=10)
                yield {
                    "image_id": image_id,
                    "question_id": image_id * 1000 + position,
                    "question_type": "what is the",
                    "answer_type": "other",
                    "multiple_choice_answer": answers[0],
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                        for number, answer in enumerate(answers)
                    ],
                }

    for name, member, key, entries in (
        ("v2_Questions_Train_mscoco.zip", "v2_OpenEnded_mscoco_train2014_questions.json", "questions", questions()),
        ("v2_Annotations_Train_mscoco.zip", "v2_mscoco_train2014_annotations.json", "annotations", annotations()),
    ):
        with (
            zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(member, "w", force_zip64=True) as file,
        ):
            file.write(b'{"data_subtype": "train2014", "%s": [' % key.encode())
            for number, entry in enumerate(entries):
                file.write((", " if number else "").encode() + json.dumps(entry).encode())
            file.write(b"]}")


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                parent = int(Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found.extend(children.get(member, []))
    return found


def memory(pid: int) -> tuple[float, float]:
    """Return resident MiB of a process, and the same with every shared page divided among those that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0, 0.0
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
    return values.get("Rss", 0.0), values.get("Pss", 0.0)


def measure(raw: Path, out: Path, num_workers: int) -> tuple[float, float, float]:
    """Prepare the data; return seconds, peak resident MiB of all processes, and that with shared pages once."""
    command = [sys.executable, "-m", "data_prep.vqav2", "--raw-dir", str(raw), "--out-dir", str(out)]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--num-workers", str(num_workers)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak_rss = peak_pss = 0.0
    while process.poll() is None:
        sizes = [memory(pid) for pid in family(process.pid)]
        peak_rss = max(peak_rss, sum(rss for rss, _ in sizes))
        peak_pss = max(peak_pss, sum(pss for _, pss in sizes))
        time.sleep(SAMPLE_EVERY)
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)} failed")
    return time.monotonic() - started, peak_rss, peak_pss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--num-workers", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{'images':>9} {'seconds':>8} {'resident MiB':>13} {'shared once':>12}")
    for images in (max(1, arguments.images // 10), arguments.images):
        with tempfile.TemporaryDirectory() as folder:
            make_raw(Path(folder) / "raw", images)
            seconds, rss, pss = measure(Path(folder) / "raw", Path(folder) / "out", arguments.num_workers)
        print(f"{images:>9,} {seconds:>8.1f} {rss:>13.0f} {pss:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
