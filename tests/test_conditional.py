"""Conditional retrieval: whether the nearest other image under a phrase holds what it names, as a plain loop finds."""

import json

import pytest
import torch
from conftest import assert_one_line_error

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image


def test_precision_at_1_is_that_of_a_plain_loop(tiny_run, tmp_path, in_process):
    options = ["task=conditional", f"ckpt={tiny_run[0]}", "data=scenes_phrases", "data.size=tiny", "split=train"]
    given = [*options, "task.prompt=is there a PHRASE?", "task.phrases=3", "task.batch_size=7", "task.images=25"]
    result = in_process("vlabs.evaluate", [*given, "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out/conditional.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["phrases"], metrics["queries"]) == (3, len(records))
    checkpoint = load_checkpoint(tiny_run[0])
    model = checkpoint.model.eval()
    rows = load_split(tmp_path / "data/scenes_phrases-tiny", "train").select(range(25))
    images = torch.stack([checkpoint.preprocessing.image(decode_image(row["image"], "")) for row in rows])
    for phrase in {record["phrase"] for record in records}:
        holds = [phrase in [caption.lower().rstrip(".") for caption in row["caption"]] for row in rows]
        ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([f"is there a {phrase}?"]))
        with torch.no_grad():
            out = model(images, ids.expand(25, -1), mask.expand(25, -1))
        asked = {record["id"]: record for record in records if record["phrase"] == phrase}
        assert [row["image_id"] for row, held in zip(rows, holds, strict=True) if held] == list(asked)
        for when, tokens in (("first", out.bottom_up.tokens), ("second", out.seen.tokens)):
            s = out.seen.token_weights[:, 1:]
            weighted = [(w[:, None] * z).sum(0) / w.sum() for w, z in zip(s + 1e-6, tokens[:, 1:], strict=True)]
            for kind, features in (
                ("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1)), ("weighted", torch.stack(weighted)),
            ):  # fmt: skip
                for n, row in enumerate(rows):
                    if holds[n]:
                        others = [m for m in range(25) if m != n]
                        nearest = max(others, key=lambda m: torch.cosine_similarity(features[n], features[m], dim=0))
                        assert asked[row["image_id"]][f"{when}/{kind}"] == holds[nearest]
                        assert asked[row["image_id"]]["chance"] == (sum(holds) - 1) / 24
    frame = [record["second/cls"] for record in records]
    assert metrics["second/cls"] == pytest.approx(100 * sum(frame) / len(frame))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["task.prompt=a photo"], ["task.prompt=a photo", "PHRASE"]),
        (["data=scenes_captions", "data.size=tiny"], ["no caption is that of two images", "--phrases"]),
    ],
)
def test_what_cannot_be_measured_is_one_line(options, parts, tiny_run, tmp_path, in_process):
    given = ["task=conditional", f"ckpt={tiny_run[0]}", "data=scenes_phrases", "data.size=tiny", *options]
    assert_one_line_error(in_process("vlabs.evaluate", given, tmp_path), *parts)
