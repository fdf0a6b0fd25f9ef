"""The embedded corpus: the same bytes from a seed, answers that follow from the instances, splits that differ."""

from __future__ import annotations

import io
import json
import re
import subprocess
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import warm_python
from PIL import Image

from data_prep.scenes.corpus import Task, make_scenes, subset_name
from data_prep.scenes.question_only import answer_scores, question_only_accuracy, read_split
from data_prep.scenes.questions import MARGIN, Balance, Question, possible_questions
from data_prep.scenes.render import SHAPES, SIZES, SPLITS, SceneObject, _shape_table, sample_objects
from vlabs.errors import UserError

SIDE = SIZES["tiny"].image_size
# Of each relation: the axis along which two objects are compared, and whether the first is nearer to zero.
AXES = {"left of": ("x", True), "right of": ("x", False), "above": ("y", True), "below": ("y", False)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny corpus, made by the command."""
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    command = [
        warm_python(),
        "-m",
        "data_prep.scenes",
        "--size",
        "tiny",
        "--out-dir",
        str(folder),
        "--num-workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "images/s per core" in done.stdout
    assert "not yes/no" in done.stdout
    return folder


def instances(corpus: Path, split: str) -> dict[int, list[dict[str, Any]]]:
    """The COCO instances by image."""
    with zipfile.ZipFile(corpus / "annotations.zip") as archive:
        content = json.loads(archive.read(f"annotations/instances_{subset_name(split)}.json"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for instance in content["annotations"]:
        assert names[instance["category_id"]] == instance["attributes"]["shape"]
        found[instance["image_id"]].append(instance)
    return found


def asked(corpus: Path, split: str) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(question, annotation, the image's instances) of a split."""
    annotations, questions = read_split(corpus, split)
    by_image = instances(corpus, split)
    assert [a["question_id"] for a in annotations] == [q["question_id"] for q in questions]
    return [(q["question"], dict(a), by_image[a["image_id"]]) for a, q in zip(annotations, questions, strict=True)]


def pairs(corpus: Path, split: str) -> set[tuple[str, str]]:
    """The (color, shape) pairs that a split shows."""
    attributes = [i["attributes"] for found in instances(corpus, split).values() for i in found]
    return {(a["color"], a["shape"]) for a in attributes}


def decode(segmentation: dict[str, Any]) -> np.ndarray:
    """An uncompressed COCO run-length mask, (height, width)."""
    values = [index % 2 for index, count in enumerate(segmentation["counts"]) for _ in range(count)]
    height, width = segmentation["size"]
    return np.array(values, bool).reshape(width, height).T


# --- an independent reading of the questions -----------------------------------------------------------------------

PLACE = re.compile(r"(left of|right of|above|below) (the .*)")


def select(phrase: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The instances that a phrase such as "the object left of the object above the large red star" speaks of."""
    place = PLACE.search(phrase)
    words = set((phrase[: place.start()] if place else phrase).split())
    chosen = []
    for instance in found:
        attributes = instance["attributes"]
        known = {*attributes.values(), *(attributes["shape"] + end for end in ("s", "es")), "object", "objects"}
        if words - {"the", "a", "an", "any", "there", "is"} <= known:
            chosen.append(instance)
    if place:
        anchors = select(place[2], found)
        assert len(anchors) == 1, f"{place[2]!r} is not unique"
        chosen = [i for i in chosen if i is not anchors[0] and towards(i, anchors[0], place[1]) > MARGIN * SIDE / 3]
    return chosen


def towards(item: dict[str, Any], anchor: dict[str, Any], relation: str) -> float:
    """How many pixels the first lies in that direction from the second, by the middles of their visible boxes."""
    x, y, width, height = np.subtract(item["bbox"], anchor["bbox"])
    right, down = x + width / 2, y + height / 2
    return float({"left of": -right, "right of": right, "above": -down, "below": down}[relation])


def solve(question: str, found: list[dict[str, Any]]) -> str:
    """The answer that the instances give."""
    text = question.rstrip("?")
    if match := re.fullmatch(r"How many (.*) (?:are there|can you see)", text):
        return str(len(select(match[1], found)))
    if match := re.fullmatch(r"(?:Is there|Are there|Does the picture show) (.*)", text):
        return "yes" if select(match[1], found) else "no"
    if match := re.fullmatch(r"Is (the [\w ]*?) (left of|right of|above|below) (the .*)", text):
        (item,), (anchor,) = select(match[1], found), select(match[3], found)
        return "yes" if towards(item, anchor, match[2]) > 0 else "no"
    match = re.fullmatch(r"(?:What|Which|What is the) (color|shape)(?: of| is)? (.*)", text)
    assert match, question
    phrase = match[2] if match[2].startswith("the ") else f"the object {match[2]}"
    (item,) = select(phrase, found)
    return str(item["attributes"][match[1]])


# --- claims --------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_whatever_the_workers(corpus: Path, tmp_path: Path) -> None:
    make_scenes("tiny", tmp_path / "again", seed=0, num_workers=2)
    first = {path.name: path.read_bytes() for path in corpus.iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert len(first) == 3 * len(SPLITS) + 3
    assert not list(tmp_path.glob("*partial"))


def test_another_seed_gives_other_images(corpus: Path, tmp_path: Path) -> None:
    make_scenes("tiny", tmp_path / "other", seed=1, num_workers=1)
    assert (tmp_path / "other" / "val2014.zip").read_bytes() != (corpus / "val2014.zip").read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_instances(corpus: Path, split: str) -> None:
    for question, annotation, found in asked(corpus, split):
        assert solve(question, found) == annotation["multiple_choice_answer"], question
        targets = [instance for phrase in annotation["target_instances"] for instance in phrase]
        assert {*targets} <= {instance["id"] for instance in found}
        if question.startswith("Is the "):
            assert len(targets) == len(annotation["target_instances"]) >= 2  # each phrase has its own object
        if annotation["multiple_choice_answer"] == "0":
            assert annotation["target_instances"] == []
        if annotation["question_type"] in ("color", "shape", "relation"):
            target = next(i for i in found if i["id"] == targets[0])
            assert annotation["multiple_choice_answer"] in target["attributes"].values()


def test_no_question_is_asked_twice_about_an_image(corpus: Path) -> None:
    for split in SPLITS:
        times = Counter((question, annotation["image_id"]) for question, annotation, _ in asked(corpus, split))
        assert set(times.values()) == {1}


def test_ten_answers_whose_majority_is_the_truth_though_some_disagree(corpus: Path) -> None:
    disagreeing = 0
    annotations = [annotation for _, annotation, _ in asked(corpus, "train")]
    for annotation in annotations:
        given = Counter(answer["answer"] for answer in annotation["answers"])
        assert given.total() == 10
        assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
        assert given[annotation["multiple_choice_answer"]] >= 6
        disagreeing += len(given) > 1
    assert 0.08 < disagreeing / len(annotations) < 0.22


def test_answers_are_balanced(corpus: Path) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, annotation, _ in asked(corpus, "train"):
        answers[annotation["question_type"]][annotation["multiple_choice_answer"]] += 1
    assert set(answers) == {"yes/no", "number", "color", "shape", "relation"}
    assert abs(answers["yes/no"]["yes"] - answers["yes/no"]["no"]) <= 4
    assert max(answers["number"].values()) <= 0.35 * answers["number"].total()
    assert max(answers["color"].values()) <= 0.3 * answers["color"].total()


def test_balance_refuses_an_answer_that_is_ahead() -> None:
    balance = Balance(text_slack=1, family_slack=1)
    rng = Task("tiny", "train", 0, 0).random("test")
    yes, no = (Question("yes/no", "exists", "Is there a star?", answer, ()) for answer in ("yes", "no"))
    other = Question("number", "count", "How many stars are there?", "1", ())
    chosen = [balance.choose([yes, other], rng) for _ in range(6)]
    assert sum(yes in questions for questions in chosen) < 6
    assert no in balance.choose([no, other], rng)


def test_masks_decode_to_area_and_box_and_do_not_overlap(corpus: Path) -> None:
    for found in instances(corpus, "distractors").values():
        masks = [decode(instance["segmentation"]) for instance in found]
        assert np.sum(masks, axis=0).max() == 1
        for instance, mask in zip(found, masks, strict=True):
            x, y, width, height = instance["bbox"]
            assert mask.sum() == instance["area"] == mask[y : y + height, x : x + width].sum()
            assert mask[y, :].any()
            assert mask[:, x].any()
            assert mask[y + height - 1].any()
            assert mask[:, x + width - 1].any()


def test_pixels_have_the_color_that_the_instance_names(corpus: Path) -> None:
    with zipfile.ZipFile(corpus / "train2014.zip") as archive:
        for image_id, found in instances(corpus, "train").items():
            name = f"train2014/COCO_train2014_{image_id:012d}.jpg"
            image = np.asarray(Image.open(io.BytesIO(archive.read(name))), float)
            assert image.shape == (SIDE, SIDE, 3)
            for instance in found:
                if instance["attributes"]["fill"] == "solid" and instance["attributes"]["color"] in (
                    "red",
                    "green",
                    "blue",
                ):
                    mean = image[decode(instance["segmentation"])].mean(axis=0)
                    assert ("red", "green", "blue")[int(mean.argmax())] == instance["attributes"]["color"]


def test_distractors_has_more_objects_than_training_ever_shows(corpus: Path) -> None:
    most = max(len(found) for found in instances(corpus, "train").values())
    assert min(len(found) for found in instances(corpus, "distractors").values()) > most


def test_systematic_asks_about_pairs_that_training_never_shows_or_mentions(corpus: Path) -> None:
    held_out = {tuple(pair) for pair in json.loads((corpus / "scenes.json").read_text())["held_out_pairs"]}
    for split in ("train", "val", "test", "distractors", "productive"):
        assert not pairs(corpus, split) & held_out
        for question, _, _ in asked(corpus, split):
            assert not any(f"{color} {shape}" in question for color, shape in held_out)
    assert pairs(corpus, "systematic") & held_out
    for question, annotation, found in asked(corpus, "systematic"):
        asked_about = [instance for phrase in annotation["target_instances"] for instance in phrase][:1]
        target = [i["attributes"] for i in found if i["id"] in asked_about]
        shown = {(attributes["color"], attributes["shape"]) for attributes in target}
        assert shown <= held_out
        assert shown or any(f"{color} {shape}" in question for color, shape in held_out)


def test_productive_questions_are_longer_than_any_in_training_but_use_its_words(corpus: Path) -> None:
    trained = [re.findall(r"\w+", question) for question, _, _ in asked(corpus, "train")]
    productive = [re.findall(r"\w+", question) for question, _, _ in asked(corpus, "productive")]
    assert min(map(len, productive)) > max(map(len, trained))
    assert {word for words in productive for word in words} <= {word for words in trained for word in words}


def test_how_two_objects_lie_follows_neither_from_the_words_nor_in_most_cases_from_the_place_of_one() -> None:
    size, balance = SIZES["small"], Balance()
    words: dict[str, Counter[str]] = defaultdict(Counter)
    of_one: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)  # by the object and the twelfth that it lies in
    for number in range(500):
        rng = Task("small", "relations", number, 0).random("test")
        objects = sample_objects(size, "relations", rng)
        if possible := possible_questions(objects, size, "relations", rng):  # else the scene is drawn again
            for question in balance.choose(possible, rng):
                assert question.family == "compare"
                for word in set(question.text.split()):
                    words[word][question.answer] += 1
                along, towards = next(axis for relation, axis in AXES.items() if f" {relation} the" in question.text)
                for which, index in enumerate(question.asked):
                    place = getattr(objects[index], along)
                    of_one[which, int(12 * (place if towards else 1 - place))][question.answer] += 1
    assert max(max(n.values()) / n.total() for n in words.values() if n.total() > 50) < 0.6
    for which in (0, 1):
        by_place = [n for (one, _), n in of_one.items() if one == which]
        asked = sum(n.total() for n in by_place)
        assert asked > 1000
        # What the more frequent answer of each place would get. An object at the border has others at one side only.
        assert sum(max(n.values()) for n in by_place) / asked < 0.7


def test_five_distinct_captions_name_objects_of_the_image(corpus: Path) -> None:
    content = json.loads((corpus / "dataset_scenes.json").read_text())
    assert {image["split"] for image in content["images"]} == set(SPLITS)
    by_split = {split: instances(corpus, split) for split in SPLITS}
    sentids = [sentid for image in content["images"] for sentid in image["sentids"]]
    assert sentids == list(range(5 * len(content["images"])))
    for image in content["images"]:
        found = {i["id"]: i["attributes"] for i in by_split[image["split"]][image["cocoid"]]}
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
        for sentence in image["sentences"]:
            assert len(sentence["target_instances"]) >= 2
            for (target,) in sentence["target_instances"]:
                assert {found[target][key] for key in ("size", "color", "shape")} <= set(sentence["tokens"])


def test_shape_tables_measure_distance() -> None:
    for shape in SHAPES:
        table = _shape_table(shape)
        assert table.min() < -0.2
        assert table[0, 0] > 0.2
        assert np.abs(np.diff(table, axis=0)).max() <= 2.5 / (table.shape[0] - 1) + 1e-5  # slope at most 1
    assert _shape_table("square")[128, 128] == pytest.approx(-0.8)


def test_larger_sizes_have_answers_for_every_split() -> None:
    size = SIZES["medium"]
    for split in SPLITS:
        rng = Task("medium", split, 0, 0).random("test")
        scenes = [sample_objects(size, split, rng) for _ in range(30)]
        assert any(possible_questions(objects, size, split, rng) for objects in scenes)
        low, high = size.distractor_objects if split == "distractors" else size.objects
        assert all(low <= len(objects) <= high for objects in scenes)


def test_relations_are_asked_only_where_one_object_is_clearly_there() -> None:
    def circle(color: str, x: float) -> SceneObject:
        return SceneObject("circle", color, "small", "solid", x, 0.5, 0.05, 0.0)

    def texts(*objects: SceneObject) -> str:
        rng = Task("tiny", "train", 0, 0).random("test")
        found = possible_questions(objects, SIZES["tiny"], "train", rng)
        return " ".join(question.text for question in found if question.kind == "relation")

    green, blue, yellow = circle("green", 0.2), circle("blue", 0.5), circle("yellow", 0.8)
    assert "left of the blue circle" in texts(green, blue, yellow)
    assert "left of the yellow circle" not in texts(green, blue, yellow)  # two are
    assert "left of the blue circle" not in texts(green._replace(x=0.4), blue, yellow)  # not clearly


def annotate(question_id: int, kind: str, answers: str) -> dict[str, Any]:
    """An annotation whose ten answers are the letters of a string."""
    given = [{"answer": letter} for letter in answers]
    answer_type = "yes/no" if kind == "yes/no" else "other"
    return {"question_id": question_id, "question_type": kind, "answer_type": answer_type, "answers": given}


def test_question_only_accuracy_by_hand() -> None:
    train_questions = [{"question_id": i, "question": text} for i, text in enumerate(["A?", "A?", "B?", "C?"])]
    train = [annotate(0, "color", "r" * 10), annotate(1, "color", "g" * 9 + "r"), annotate(2, "color", "g" * 10)]
    train.append(annotate(3, "yes/no", "y" * 10))
    val_questions = [{"question_id": i, "question": text} for i, text in enumerate(["A?", "B?", "new?", "C?"], 10)]
    val = [annotate(10, "color", "rr" + "g" * 8), annotate(11, "color", "b" * 10)]
    val += [annotate(12, "color", "g" * 10), annotate(13, "yes/no", "yyy" + "n" * 7)]
    # "A?" is answered r (1.3 against 1.0 on train), which two of ten said: 60. "B?" is g, wrong: 0. "new?" falls back
    # to the type's best, g (2.0 against 1.3): 100. "C?" is y, which three of ten said: 90.
    found = question_only_accuracy(train, train_questions, val, val_questions)
    assert found == pytest.approx({"color": 160 / 3, "yes/no": 90, "overall": 62.5, "not yes/no": 160 / 3})


def test_answer_scores_are_the_official_ones() -> None:
    for same, score in ((1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        assert answer_scores(annotate(0, "color", "r" * same + "g" * (10 - same)))["r"] == pytest.approx(score)


def test_question_only_reads_a_raw_folder(corpus: Path) -> None:
    command = [warm_python(), "-m", "data_prep.question_only", "--raw-dir", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads((corpus / "scenes.json").read_text())["question_only_accuracy"]
    assert f"{written['overall']:.2f}" in done.stdout
    failed = subprocess.run([*command, "--val", "nowhere"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_another_number_of_training_images_changes_no_image(corpus: Path, tmp_path: Path) -> None:
    make_scenes("tiny", tmp_path / "few", num_workers=1, train_images=7)
    with (
        zipfile.ZipFile(corpus / "train2014.zip") as all_of_them,
        zipfile.ZipFile(tmp_path / "few/train2014.zip") as few,
    ):
        assert few.namelist() == all_of_them.namelist()[:7]
        assert all(few.read(name) == all_of_them.read(name) for name in few.namelist())
    assert (tmp_path / "few/val2014.zip").read_bytes() == (corpus / "val2014.zip").read_bytes()
    assert json.loads((tmp_path / "few/scenes.json").read_text())["splits"]["train"]["images"] == 7
    for wrong, message in ((0, "--train-images is 0"), (None, "number of images")):
        with pytest.raises(UserError, match=message):
            make_scenes("tiny", tmp_path / "few", num_workers=1, train_images=wrong)


def test_a_finished_corpus_stays_and_anything_else_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (corpus / "scenes.json").stat().st_mtime_ns
    make_scenes("tiny", corpus, seed=0)
    assert "already" in capsys.readouterr().out
    assert (corpus / "scenes.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another size, seed, layout or number of images"):
        make_scenes("tiny", corpus, seed=7)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds no scenes"):
        make_scenes("tiny", tmp_path / "mine")
    with pytest.raises(UserError, match="one of tiny"):
        make_scenes("huge", tmp_path / "new")
    with pytest.raises(UserError, match="1 or more"):
        make_scenes("tiny", tmp_path / "new", num_workers=0)
