"""Conditional retrieval: whether the nearest other image under a phrase holds what it names, as a plain loop finds."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import assert_one_line_error
from PIL import Image, ImageOps

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.conditional import read_benchmark
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError
from vlabs.evaluation.prompt import with_phrase


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


def pictures(count, size=(40, 30)):
    """Different images of noise, as PNG."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(file, "PNG")
        yield file.getvalue()


def embedded(run, shown, text):
    """[cls] of the second pass of images under a text, one after another."""
    checkpoint = load_checkpoint(run)
    ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([text]))
    with torch.no_grad():
        seen = [checkpoint.model.eval()(checkpoint.preprocessing.image(one)[None], ids, mask).seen for one in shown]
    return torch.cat([one.tokens[:, 0] for one in seen])


def measured(run, tmp_path, in_process, *options):
    result = in_process("vlabs.evaluate", ["task=conditional", f"ckpt={run}", *options, "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out/conditional.jsonl").read_text().splitlines()]
    return records, json.loads((tmp_path / "out/metrics.json").read_text()), result


CORE = [  # source image, scene, object
    ("1", "bath", "duck"), ("1", "bath", "cup"), ("2", "bath", "duck"), ("2", "bath", "cup"), ("3", "bath", "duck"),
    ("4", "street", "cup"), ("5", "street", "cup"), ("5", "street", "dog"), ("6", "street", "cup"),
]  # fmt: skip


def write_core(folder, rows, **columns):
    """The dataset as the hub has it: parquet files of a split, with few rows in a group."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = {"image": [{"bytes": one, "path": None} for one in pictures(len(rows))]}
    table |= dict(zip(("image_id", "scene", "object"), map(list, zip(*rows, strict=True)), strict=True))
    table["prompt"] = [f"the small {name}" for name in table["object"]]
    for n, part in enumerate((slice(0, 4), slice(4, None))):
        arrays = {name: pa.array(values[part]) for name, values in (table | columns).items() if values is not None}
        pq.write_table(pa.table(arrays), folder / f"data/test-0000{n}-of-00002.parquet", row_group_size=3)


def test_core_is_measured_as_its_authors_do(tiny_run, tmp_path, in_process):
    """In every scene, under the object's prompt, without the variants of the same source image."""
    write_core(tmp_path / "core", CORE)
    records, metrics, result = measured(tiny_run[0], tmp_path, in_process, "task.source=core", "task.batch_size=2")
    shown = [decode_image(one, "") for one in pictures(len(CORE))]
    expected = {}
    for n, (source, scene, name) in enumerate(CORE):
        features = embedded(tiny_run[0], shown, f"the small {name}")
        ranked = [m for m, (other, of, _) in enumerate(CORE) if of == scene and other != source]
        holds = [CORE[m][2] == name for m in ranked]
        if any(holds):
            like = torch.cosine_similarity(features[n], features[ranked])
            expected[f"{scene}/{name}/{source}"] = holds[int(like.argmax())], sum(holds) / len(holds)
    assert {one["id"]: (one["second/cls"], one["chance"]) for one in records} == expected
    assert metrics["queries"] == len(expected) == 8
    assert "1 images are not asked about" in result.stdout  # the dog


def template(condition, reference, target, gallery):
    return {"condition": condition, "gallery": gallery, "reference": reference, "target": target}


@pytest.mark.parametrize("kind", ["object", "attribute"])
def test_genecis_is_the_rank_of_the_target_in_the_gallery_of_each_template(kind, tiny_run, tmp_path, in_process):
    """Whole images of COCO, or boxes of Visual Genome: begun 0.7 of their size before, and made square with black."""
    files, boxes = list(pictures(6)), [[3, 8, 10, 5], [0, 0, 40, 30], [20.5, 4, 15, 20], [1, 1, 4, 9], [9, 9, 9, 9]]
    boxes.append([30, 20, 10, 10])
    shown, names = [], []
    for n, content in enumerate(files):
        image, (x, y, w, h) = decode_image(content, ""), boxes[n]
        if kind == "object":
            name, path = {"val_image_id": 7 + n}, tmp_path / f"val2017/{7 + n:012d}.jpg"
        else:
            name, path = (
                {"image_id": 7 + n, "instance_bbox": boxes[n]},
                tmp_path / f"VG_100K{'_2' * (n % 2)}/{7 + n}.jpg",
            )
            left, top = max(0, x - 0.7 * w), max(0, y - 0.7 * h)
            part = image.crop((left, top, min(40, left + 1.7 * w), min(30, top + 1.7 * h)))
            image = ImageOps.pad(part, (max(part.size),) * 2, color="black")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        names.append(name)
        shown.append(image)
    asked = [("wall", 0, 1, [2, 3, 4, 5]), ("sky", 1, 5, [0, 2, 3, 4]), ("wall", 4, 0, [3, 5, 2, 1])]
    templates = [template(text, names[r], names[t], [names[n] for n in g]) for text, r, t, g in asked]
    (tmp_path / "focus.json").write_text(json.dumps(templates))
    folders = "val2017" if kind == "object" else "VG_100K,VG_100K_2"
    options = ["task.source=focus.json", f"task.pictures=[{folders}]", "task.prompt=is there a PHRASE?"]
    records, metrics, _ = measured(tiny_run[0], tmp_path, in_process, *options)
    ranks = []
    for text, reference, target, gallery in asked:
        features = embedded(tiny_run[0], shown, f"is there a {text}?")
        like = torch.cosine_similarity(features[reference], features)
        ranks.append(1 + sum(bool(like[n] > like[target]) for n in gallery))
    found = {one["id"]: [one["second/cls"], one["second/cls@2"], one["second/cls@3"]] for one in records}
    assert found == {n: [rank <= k for k in (1, 2, 3)] for n, rank in enumerate(ranks)}
    assert metrics["second/cls@3"] == pytest.approx(100 * sum(rank <= 3 for rank in ranks) / 3)
    assert metrics["chance"] == pytest.approx(20)


def test_wrong_benchmarks_are_one_line(tiny_run, tmp_path, in_process):
    (tmp_path / "empty").mkdir()
    write_core(tmp_path / "other", CORE, scene=None)
    write_core(tmp_path / "two", CORE, prompt=[f"prompt {n}" for n in range(len(CORE))])
    write_core(tmp_path / "alone", CORE[3:6] + CORE[7:8])
    write_core(tmp_path / "hollow", CORE, image=[{"bytes": None, "path": "x.png"}] * len(CORE))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/test.parquet").write_bytes((tmp_path / "two/data/test-00000-of-00002.parquet").read_bytes()[:99])
    whole, box = {"val_image_id": 1}, {"image_id": 1, "instance_bbox": [1, 1, 0, 5]}
    for name, content in {
        "list": [], "no": [{"condition": "sky"}], "box": [template("sky", box, whole, [whole])],
        "gone": [template("sky", whole, {"val_image_id": 2}, [{"val_image_id": 3}])],
        "alone": [template("sky", whole, whole, [])],
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for options, parts in [
        (["task.source=nowhere"], ["task.source=nowhere", "no such folder"]),
        (["task.source=empty"], ["task.source=empty has no parquet files"]),
        (["task.source=other"], ["no column 'scene', so it is not CORE"]),
        (["task.source=two"], ["has two prompts", "prompt 0"]),
        (["task.source=alone"], ["task.source=alone", "nothing can be asked"]),
        (["task.source=hollow"], ["is not in the file"]),
        (["task.source=cut"], ["cut/test.parquet cannot be read as parquet"]),
        (["task.source=nowhere.json"], ["task.source=nowhere.json", "no such file"]),
        (["task.source=gone.json"], ["pass task.pictures=[FOLDER,...]"]),
        (["task.source=gone.json", "task.pictures=[empty]"], ["000000000001.jpg and 2 more of 3", "val2017"]),
        (["task.source=list.json", "task.pictures=[empty]"], ["has no templates"]),
        (["task.source=no.json", "task.pictures=[empty]"], ["template 0 has no 'reference'"]),
        (["task.source=alone.json", "task.pictures=[empty]"], ["template 0: its 'gallery' is empty"]),
        (["task.source=box.json", "task.pictures=[empty]"], ["must be [left, top, width, height]"]),
    ]:
        result = in_process("vlabs.evaluate", ["task=conditional", f"ckpt={tiny_run[0]}", *options], tmp_path)
        assert_one_line_error(result, *parts)


def test_what_a_benchmark_or_a_task_does_not_read_is_refused(tiny_run, tmp_path, in_process):
    write_core(tmp_path / "core", CORE)
    source, own = ["task=conditional", "task.source=core"], ["task=asymmetry", "task.size=tiny", "task.images=2"]
    for options, item in [
        (source, "split=train"), (source, "data=scenes_phrases"), (source, f"data.dir={tmp_path}"), (own, "split=val"),
        (own, f"data.dir={tmp_path}"), (own, "data.num_workers=0"), (["task=vqa"], "ranker=shortlist"),
        (own, "ranker.batch_size=4"), (["task=vqa"], "tokenizer=roberta-base"),
    ]:  # fmt: skip
        result = in_process("vlabs.evaluate", [*options, f"ckpt={tiny_run[0]}", item], tmp_path)
        assert_one_line_error(result, item.split("=")[-1], "leave it out")


def boxed(number, *box):
    return {"image_id": number, "instance_bbox": list(box)}


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ((" ", 1, 2, [3]), "its 'condition' is empty"),
        (("sky", 1, 1, [3]), "1.jpg is its 'reference' and its 'target'"),
        (("sky", 1, 2, [2, 1]), "its 'gallery' has no image but"),
    ],
)
def test_a_template_in_which_nothing_is_searched_for_is_named(entry, part, tmp_path):
    whole = [{"val_image_id": n} for n in range(5)]
    for n in range(5):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{n:012d}.jpg")
    text, reference, target, gallery = entry
    fine = template("sky", whole[1], whole[2], [whole[3]])
    wrong = template(text, whole[reference], whole[target], [whole[n] for n in gallery])
    (tmp_path / "t.json").write_text(json.dumps([fine, wrong]))
    with pytest.raises(UserError, match=f"t.json: template 1: .*{part}"):
        read_benchmark(tmp_path / "t.json", [tmp_path])


def test_an_image_that_a_template_has_twice_is_ranked_once_and_counted(tmp_path):
    # As template 19 of the published change_object.json, whose target is also in its gallery.
    whole = [{"val_image_id": n} for n in range(5)]
    for n in range(5):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{n:012d}.jpg")
    fine = template("sky", whole[1], whole[2], [whole[3]])
    twice = template("sky", whole[1], whole[2], [whole[n] for n in (3, 2, 4, 3, 1)])
    (tmp_path / "t.json").write_text(json.dumps([fine, twice, twice]))
    gallery = read_benchmark(tmp_path / "t.json", [tmp_path])
    assert [len(query.gallery) for query in gallery.queries] == [2, 3, 3]
    assert gallery.notes == [
        f"2 templates have an image twice, which is ranked once; the first is {tmp_path}/t.json: template 1"
    ]


def test_other_boxes_of_an_image_are_other_images_and_a_box_outside_of_it_is_named(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    seen, outside = [boxed(1, 0, 0, 9, 9), boxed(1, 5, 5, 9, 9), boxed(1, -3, -3, 9, 9)], boxed(1, -30, -30, 5, 5)
    (tmp_path / "t.json").write_text(json.dumps([template("sky", *seen[:2], [seen[2], outside])]))
    gallery = read_benchmark(tmp_path / "t.json", [tmp_path])
    assert [gallery.read(n).size for n in range(3)] == [(15, 15)] * 3
    with pytest.raises(UserError, match=r"1.jpg: the box \[-30, -30, 5, 5\] is not in the image, which is 40 x 30"):
        gallery.read(3)


def test_rows_of_core_that_are_there_twice_are_named(tmp_path):
    write_core(tmp_path / "rows", [*CORE, CORE[5]])
    with pytest.raises(UserError, match="row 2 of row group 1: street/cup/4 is .*00001.*row 1 of row group 0 too"):
        read_benchmark(tmp_path / "rows", [])
    write_core(tmp_path / "shards", CORE)
    shard = tmp_path / "shards/data/test-00000-of-00002.parquet"
    (shard.parent / "test-copy.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="test-copy.parquet, row 0 of row group 0: bath/duck/1 is .*test-00000"):
        read_benchmark(tmp_path / "shards", [])


def test_several_splits_of_core_without_test_are_named(tmp_path):
    write_core(tmp_path, CORE)
    for shard, name in zip(sorted((tmp_path / "data").iterdir()), ("train-0", "validation-0"), strict=True):
        shard.rename(shard.with_name(f"{name}.parquet"))
    with pytest.raises(UserError, match="parquet files of train and val, and none of test"):
        read_benchmark(tmp_path, [])


def test_a_phrase_that_the_model_does_not_read_to_its_end_is_named(tiny_run):
    preprocessing = load_checkpoint(tiny_run[0]).preprocessing
    assert with_phrase("a PHRASE", "red circle", preprocessing, "x") == "a red circle"
    long = "very " * 300
    assert with_phrase(f"PHRASE {long}", "red circle", preprocessing, "x").startswith("red circle very")
    for prompt, phrase in ((f"{long}PHRASE", "red circle"), ("PHRASE", f"{long}red circle")):
        with pytest.raises(UserError, match=f"x: the model reads {preprocessing.max_length} tokens, .* a shorter one"):
            with_phrase(prompt, phrase, preprocessing, "x")


def test_questions_are_answered_with_data_that_are_phrases(tiny_run, tmp_path, in_process):
    result = in_process("vlabs.evaluate", ["task=conditional", f"ckpt={tiny_run[0]}"], tmp_path)
    assert_one_line_error(result, "holds questions", "measured on captions that are phrases (data=scenes_phrases, ")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["task.source=''"], ["task.source='' names nothing"]),
        (
            ["task.phrases=2", f"task.prompt={'very ' * 300}PHRASE"],
            ["split val, ", "does not see the end of the phrase"],
        ),
        (["keep=0.5"], ["keep=0.5: task=conditional reads all patches: leave it out"]),
        (
            ["task.pictures=[val2017]"],
            ["task.pictures=[val2017]", "of a task.source=FILE.json"],
        ),
        (["task.pictures=[val2017]", "task.source=core"], ["task.pictures=[val2017]", "leave them out"]),
        (["task.source=core", "task.images=9"], ["task.images=9: task.source=core", "leave task.images out"]),
        (["task.source=core", "task.phrases=9"], ["task.phrases=9: task.source=core", "leave task.phrases out"]),
        (["task.prompt=a photo"], ["task.prompt=a photo", "PHRASE"]),
        (["data=scenes_captions", "data.size=tiny"], ["no caption is that of two images", "--phrases"]),
    ],
)
def test_what_cannot_be_measured_is_one_line(options, parts, tiny_run, tmp_path, in_process):
    given = ["task=conditional", f"ckpt={tiny_run[0]}", "data=scenes_phrases", "data.size=tiny", *options]
    assert_one_line_error(in_process("vlabs.evaluate", given, tmp_path), *parts)
