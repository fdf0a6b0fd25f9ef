"""GQA, Winoground, VALSE and tables of pairs, in their raw layouts; and what tells pairs apart."""

import io
import json
import zipfile

import numpy as np
import pytest
from conftest import TINY_MODEL, assert_one_line_error
from PIL import Image

from data_prep.engine.pipeline import Options, prepare
from data_prep.readers.gqa import GQA
from data_prep.readers.pairs import PairTable, find_pairs
from data_prep.readers.pope import POPE
from vlabs.data.images import decode_region
from vlabs.data.prepared import load_split, read_answers, read_manifest
from vlabs.errors import UserError
from vlabs.metrics.statements import told_apart
from vlabs.metrics.vqa import yes_no

NO_TOKENIZER = Options(vocab_size=0)


def picture(shade=0, kind="JPEG", size=(64, 48)):
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 200)).save(content, kind)
    return content.getvalue()


def question(image, text, answer=None, about=None):
    """As in train_balanced_questions.json."""
    entry = {"semantic": [], "entailed": [], "equivalent": [], "question": text, "imageId": image, "isBalanced": True}
    entry |= {"groups": {"global": "", "local": "x"}, "semanticStr": "select: it"}
    if answer is not None:
        entry |= {"answer": answer, "fullAnswer": f"It is {answer}.", "annotations": about}
        entry |= {"types": {"detailed": "choose", "semantic": "attr", "structural": "query"}}
    return entry


def graph(**objects):
    named = {
        name: {"name": "thing", "x": x, "y": y, "w": w, "h": h, "attributes": [], "relations": []}
        for name, (x, y, w, h) in objects.items()
    }
    return {"width": 64, "height": 48, "objects": named}


def test_pope_is_read_as_it_is_downloaded_and_scored_by_precision_and_recall(tiny_run, tmp_path, in_process):
    raw = tmp_path / "raw"
    raw.mkdir()
    names = [f"COCO_val2014_{n:012}.jpg" for n in (310196, 210789)]
    with zipfile.ZipFile(raw / "val2014.zip", "w") as archive:
        for shade, name in enumerate(names):
            archive.writestr(f"val2014/{name}", picture(shade))
    lines = [
        {"question_id": n, "image": names[n > 3], "text": f"Is there a {what} in the image?", "label": label}
        for n, (what, label) in enumerate(
            [("star", "yes"), ("car", "no"), ("circle", "yes"), ("dog", "no"), ("red square", "yes"), ("bus", "no")], 1
        )
    ]
    (raw / "coco_pope_random.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (raw / "coco_pope_popular.json").write_text(json.dumps(lines[0]))
    prepare(POPE(raw), tmp_path / "out", NO_TOKENIZER)
    first, second = load_split(tmp_path / "out", "random")
    assert first["image"] == picture(0)
    assert first["question"] == [line["text"] for line in lines[:3]]
    assert second["answers"] == [["no"], ["yes"], ["no"]]
    assert load_split(tmp_path / "out", "popular")["question_id"] == [[1]]

    given = [f"ckpt={tiny_run[0]}", f"data.dir={tmp_path / 'out'}", "split=random", "hydra.run.dir=measured"]
    result = in_process("vlabs.evaluate", [*given, "data.num_workers=0"], tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "measured/metrics.json").read_text())
    answers = {
        one["question_id"]: one["answer"] for one in json.loads((tmp_path / "measured/results.json").read_text())
    }
    said = [answers[line["question_id"]] == "yes" for line in lines]
    right = [yes for yes, line in zip(said, lines, strict=True) if line["label"] == "yes"]
    assert metrics["recall"] == pytest.approx(100 * sum(right) / 3)
    assert metrics["yes"] == pytest.approx(100 * sum(said) / 6)
    # These data have no vocabulary of answers, and need none for what is right.
    more = ["task=faithfulness", "task.maps=[norm]", *given[:-1], "hydra.run.dir=faithful"]
    assert in_process("vlabs.evaluate", [*more, "data.num_workers=0"], tmp_path).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "faithful/faithfulness.jsonl").read_text().splitlines()]
    labels = {line["question_id"]: line["label"] for line in lines}
    assert {row["id"]: row["right"] for row in rows} == {
        n: 100.0 * (answers[n] == label) for n, label in labels.items()
    }
    assert any(row["right"] for row in rows)
    assert yes_no(["yes", "yes", "cat", "no"], ["yes", "no", "yes", "no"]) == {
        "precision": 50, "recall": 50, "f1": 50, "yes": 50
    }  # fmt: skip

    (raw / "gqa_pope_random.json").write_text(json.dumps(lines[0]))
    with pytest.raises(UserError, match="coco_pope_random.json and .*gqa_pope_random.json are both"):
        POPE(raw)
    (raw / "gqa_pope_random.json").unlink()
    (raw / "coco_pope_popular.json").write_text(json.dumps(lines[0] | {"label": "maybe"}))
    with pytest.raises(UserError, match="line 1.*maybe"):
        prepare(POPE(raw), tmp_path / "bad", NO_TOKENIZER)
    (raw / "coco_pope_popular.json").unlink()
    (raw / "coco_pope_random.json").unlink()
    with pytest.raises(UserError, match="coco_pope_random.json"):
        POPE(raw)


@pytest.fixture
def gqa_raw(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    about = {"question": {"4": "101", "6:8": "102"}, "answer": {"0": "101"}, "fullAnswer": {"2": "101"}}
    nobody = {"question": {}, "answer": {}, "fullAnswer": {}}
    train = {
        "02930152": question("2354786", "Is the sky dark?", "yes", nobody),
        "07333408": question("2354786", "What is left of the lamp?", "chair", about),
        "07333409": question("n161313", "How many are there?", "2", {"question": {"0": "999"}, "answer": {}}),
    }
    with zipfile.ZipFile(raw / "questions1.2.zip", "w") as archive:
        archive.writestr("train_balanced_questions.json", json.dumps(train))
        archive.writestr("testdev_balanced_questions.json", json.dumps({"1": question("1", "Is it?", "no", nobody)}))
        archive.writestr("test_balanced_questions.json", json.dumps({"201": question("1", "Is it?")}))
        archive.writestr("train_all_questions/train_all_questions_0.json", json.dumps({"5": train["02930152"]}))
    with zipfile.ZipFile(raw / "sceneGraphs.zip", "w") as archive:
        graphs = {"2354786": graph(**{"101": (4, 8, 16, 10), "102": (40, 20, 8, 8)})}
        archive.writestr("train_sceneGraphs.json", json.dumps(graphs))
    with zipfile.ZipFile(raw / "images.zip", "w") as archive:
        for shade, name in enumerate(("2354786", "n161313", "1")):
            archive.writestr(f"images/{name}.jpg", picture(shade))
    return raw


def test_gqa_is_read_as_it_is_downloaded(gqa_raw, tmp_path):
    prepare(GQA(gqa_raw), tmp_path / "out", NO_TOKENIZER)
    assert set(read_manifest(tmp_path / "out")["splits"]) == {"train", "testdev", "test"}
    assert read_answers(tmp_path / "out") == ["yes", "chair", "2"]
    first, second = load_split(tmp_path / "out", "train")
    assert first["image"] == picture(0)
    assert first["question"] == ["Is the sky dark?", "What is left of the lamp?"]
    assert first["question_id"] == ["02930152", "07333408"]  # letter by letter
    assert first["answers"] == [["yes"], ["chair"]]
    assert first["answer_scores"] == [[1.0], [1.0]]
    assert first["answer_type"] == ["yes/no", "other"]
    assert first["question_type"] == ["query", "query"]
    assert first["region"][0] == b""  # about nothing that is named
    rows, columns = np.nonzero(decode_region(first["region"][1], "it"))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (4, 47, 8, 27)  # both boxes
    assert len(rows) == 16 * 10 + 8 * 8
    assert second["region"] == [b""]  # no scene graph has its object
    (test,) = load_split(tmp_path / "out", "test")
    assert test["answers"] == [[]]
    raw = GQA(gqa_raw, all_questions=True)
    prepare(raw, tmp_path / "all", Options(vocab_size=0))
    assert load_split(tmp_path / "all", "train")["question_id"][0] == ["5"]


def test_two_questions_of_gqa_differ_in_a_leading_zero(gqa_raw, tmp_path):
    entry = question("2354786", "Is the sky dark?", "yes", {})
    (gqa_raw / "questions1.2.zip").unlink()
    (gqa_raw / "val_balanced_questions.json").write_text(json.dumps({"01827492": entry, "1827492": entry}))
    prepare(GQA(gqa_raw), tmp_path / "out", NO_TOKENIZER)
    assert load_split(tmp_path / "out", "val")["question_id"][0] == ["01827492", "1827492"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"imageId": "77"}, "missing image: 1.*77.jpg"),
        ({"imageId": 77}, "question 02930152: 'imageId' must be text"),
        ({"answer": 3}, "question 02930152: 'answer' must be text"),
        ({"annotations": {"question": ["101"]}}, "'annotations' of the question must be an object"),
        ({"question": ""}, "empty question: question 02930152"),
    ],
)
def test_bad_questions_of_gqa_are_named(gqa_raw, tmp_path, change, says):
    entry = question("2354786", "Is the sky dark?", "yes", {}) | change
    (gqa_raw / "questions1.2.zip").unlink()
    (gqa_raw / "train_balanced_questions.json").write_text(json.dumps({"02930152": entry}))
    with pytest.raises(UserError, match=says):
        prepare(GQA(gqa_raw), tmp_path / "out", NO_TOKENIZER)
    assert not (tmp_path / "out").exists()


def test_a_box_outside_its_image_is_named_and_gqa_without_questions_too(gqa_raw, tmp_path):
    with zipfile.ZipFile(gqa_raw / "sceneGraphs.zip", "w") as archive:
        graphs = {"2354786": graph(**{"101": (400, 8, 16, 10)})}
        archive.writestr("val_sceneGraphs.json", json.dumps(graphs))
    prepare(GQA(gqa_raw), tmp_path / "out", NO_TOKENIZER)
    found = read_manifest(tmp_path / "out")
    assert found["dropped"] == {"degenerate region": 1}
    assert "nothing of the region is in the image" in found["dropped_items"][0]["item"]
    (gqa_raw / "questions1.2.zip").unlink()
    with pytest.raises(UserError, match="holds no balanced questions"):
        GQA(gqa_raw)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def winoground_raw(tmp_path):
    raw = tmp_path / "winoground"
    raw.mkdir()
    lines = [
        {"id": n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "caption_0": "a cat on a dog",
         "caption_1": "a dog on a cat", "tag": "Object", "secondary_tag": "", "num_main_preds": 1}
        for n in range(3)
    ]  # fmt: skip
    (raw / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with zipfile.ZipFile(raw / "images.zip", "w") as archive:
        for n in range(3):
            for side in (0, 1):
                archive.writestr(f"images/ex_{n}_img_{side}.png", picture(10 * n + side, "PNG"))
    return raw


def test_winoground_is_read_as_it_is_downloaded(winoground_raw, tmp_path):
    prepare(find_pairs(winoground_raw), tmp_path / "out", NO_TOKENIZER)
    rows = list(load_split(tmp_path / "out", "test"))
    assert len(rows) == 6
    assert rows[3]["image"] == picture(11, "PNG")
    assert rows[3]["statement"] == ["a cat on a dog", "a dog on a cat"]
    assert rows[3]["label"] == [0, 1]
    assert rows[3]["key"] == ["1/2/1/0", "1/2/1/1"]


def test_valse_is_read_as_it_is_downloaded(tmp_path):
    raw = tmp_path / "VALSE"
    (raw / "data").mkdir(parents=True)
    entry = {"dataset": "SWiG", "original_split": "test", "linguistic_phenomena": "actions", "image_file": "ex_255.jpg"}
    entry |= {
        "caption": "A man exercises.",
        "foil": "A torso exercises.",
        "mturk": {"foil": 0, "caption": 3, "other": 0},
    }
    unsure = entry | {"mturk": {"foil": 2, "caption": 1, "other": 0}}
    (raw / "data/actant-swap.json").write_text(json.dumps({"actions_test_0": entry, "actions_test_1": unsure}))
    (raw / "images/swig").mkdir(parents=True)
    (raw / "images/swig/ex_255.jpg").write_bytes(picture())
    prepare(find_pairs(raw), tmp_path / "out", NO_TOKENIZER)
    (row,) = load_split(tmp_path / "out", "actant-swap")
    assert row["statement"] == ["A man exercises.", "A torso exercises."]
    assert (row["label"], row["key"]) == ([1, 0], ["actions_test_0/1/0/0", "actions_test_0/1/0/1"])
    (raw / "data/actant-swap.json").write_text(json.dumps({"actions_test_0": {**entry, "mturk": 3}}))
    with pytest.raises(UserError, match="actions_test_0: 'mturk' must say how many chose"):
        prepare(find_pairs(raw), tmp_path / "again", NO_TOKENIZER)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_of_pairs_is_read_and_what_is_wrong_in_it_is_named(tmp_path, suffix):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    rows = [{"image": "a.jpg", "caption": "a red star", "foil": "a red moon", "split": "easy"}]
    path = tmp_path / f"mine{suffix}"

    def write(rows):
        if suffix == ".csv":
            names = list(rows[0])
            path.write_text(
                "\n".join([",".join(names), *(",".join(str(row.get(n, "")) for n in names) for row in rows)])
            )
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    prepare(PairTable(path), tmp_path / "out", NO_TOKENIZER)
    assert load_split(tmp_path / "out", "easy")[0]["statement"] == ["a red star", "a red moon"]
    write([{"image": "b.jpg", "caption": "a", "foil": "b"}])
    with pytest.raises(UserError, match="missing image: 1.*b.jpg"):
        prepare(PairTable(path), tmp_path / "other", NO_TOKENIZER)
    write([{"image": "a.jpg", "caption": "a"}])
    with pytest.raises(UserError, match=rf"mine{suffix}, line . has no column 'foil', but"):
        prepare(PairTable(path), tmp_path / "third", NO_TOKENIZER)
    with pytest.raises(UserError, match="--table .*mine.txt: there is no such file"):
        PairTable(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="neither Winoground's examples.jsonl nor VALSE's"):
        find_pairs(tmp_path)


def test_what_is_told_apart_is_winogrounds_definition():
    generator = np.random.default_rng(0)
    for scores in generator.normal(size=(200, 2, 2)):
        found = told_apart({(p, c): scores[p, c] for p in (0, 1) for c in (0, 1)})
        text = scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0]
        image = scores[0, 0] > scores[1, 0] and scores[1, 1] > scores[0, 1]
        assert found == {"text": text, "image": image, "group": text and image}
    assert told_apart({(0, 0): 1.0, (0, 1): 1.0}) == {"text": False}
    assert told_apart({(0, 0): 1.5, (0, 1): 1.0}) == {"text": True}


def test_pairs_are_measured_with_a_model_of_captions(tmp_path, winoground_raw, in_process):
    """The scores are those of the model for each image and caption by themselves."""
    import torch

    from vlabs.checkpoints.checkpoint import load_checkpoint
    from vlabs.data.preprocessing import decode_image

    prepare(find_pairs(winoground_raw), tmp_path / "pairs", NO_TOKENIZER)
    options = ["task=pretrain", "data.size=tiny", "data.image_size=32", "data.num_workers=0", "logger=csv", *TINY_MODEL]
    steps = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.enable_progress_bar=false"]
    quick = ["callbacks.grounding=null", "task.ranking_images=4", "hydra.run.dir=run"]
    assert in_process("vlabs.train", [*options, *steps, *quick], tmp_path).returncode == 0
    evaluate = ["task=pairs", "ckpt=run", "data.num_workers=0"]
    measured = [*evaluate, f"data.dir={tmp_path / 'pairs'}", "split=test", "hydra.run.dir=ev"]
    result = in_process("vlabs.evaluate", measured, tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "ev/metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "ev/pairs.jsonl").read_text().splitlines()]
    for name in ("text", "image", "group"):
        assert metrics[name] == pytest.approx(100 * np.mean([line[name] for line in lines]))
    checkpoint = load_checkpoint(tmp_path / "run")
    preprocessing = checkpoint.preprocessing
    for row in load_split(tmp_path / "pairs", "test"):
        image = preprocessing.image(decode_image(row["image"], "it"))[None]
        for key, caption in zip(row["key"], row["statement"], strict=True):
            with torch.no_grad():
                output = checkpoint.model(image, *preprocessing.pad(preprocessing.token_ids([caption])))
            name, _, place = key.split("/", 2)
            score = float(checkpoint.model.head.score(output.pooled_features))
            line = next(line for line in lines if line["example"] == name)
            assert line["scores"][place] == pytest.approx(score, abs=1e-5)
    # An example that lacks an image is not taken for one of an image and two captions.
    with zipfile.ZipFile(winoground_raw / "images.zip", "w") as archive:
        for n, side in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
            archive.writestr(f"images/ex_{n}_img_{side}.png", picture(10 * n + side, "PNG"))
    prepare(find_pairs(winoground_raw), tmp_path / "fewer", Options(vocab_size=0, on_bad="skip"))
    measured = [*evaluate, f"data.dir={tmp_path / 'fewer'}", "split=test", "hydra.run.dir=fewer_ev"]
    result = in_process("vlabs.evaluate", measured, tmp_path)
    assert "an image or a caption is missing: 1\n" in result.stdout
    metrics = json.loads((tmp_path / "fewer_ev/metrics.json").read_text())
    assert (metrics["examples"], metrics["left_out"]) == (2, 1)
    assert "caption" not in metrics
    wrong = in_process("vlabs.evaluate", [*evaluate, "split=val"], tmp_path)
    assert_one_line_error(wrong, "holds captions", "measured on statements")
