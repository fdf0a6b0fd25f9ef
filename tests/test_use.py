"""Checkpoints in use: evaluation is the official one, questions share a pass, exports and released files work."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import assert_one_line_error, command
from PIL import Image

import vlabs
from vlabs.checkpoints.checkpoint import Checkpoint, export_safetensors, history_of, load_checkpoint, trainings_in_words
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.errors import UserError
from vlabs.metrics.vqa import vqa_accuracy
from vlabs.page.answers import _question
from vlabs.prediction.second_look import best_window, view_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def evaluation(tiny_run, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("evaluation")
    result = command("vlabs.evaluate", f"ckpt={tiny_run[0]}", "split=val", "data.num_workers=0",
                     "trainer.enable_progress_bar=false", "hydra.run.dir=out", cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cwd / "out", result


def test_evaluation_is_the_official_one_on_the_raw_annotations(evaluation, tiny_data):
    out, result = evaluation
    with zipfile.ZipFile(tiny_data.parent / "raw/v2_Annotations_Val_mscoco.zip") as archive:
        annotations = json.loads(archive.read("v2_mscoco_val2014_annotations.json"))
    official = vqa_accuracy(annotations, out / "results.json")
    metrics = json.loads((out / "metrics.json").read_text())
    for key in ("overall", "per_answer_type", "per_question_type"):
        assert metrics[key] == official[key]
    assert f"{official['overall']:.2f}" in result.stdout
    others = [a["question_id"] for a in annotations["annotations"] if a["answer_type"] != "yes/no"]
    assert metrics["not_yes_no"] == pytest.approx(np.mean([official["per_question"][q] for q in others]))


def test_training_logs_the_accuracy_that_evaluation_finds(evaluation, tiny_run):
    summary = json.loads((tiny_run[0] / "summary.json").read_text())
    metrics = json.loads((evaluation[0] / "metrics.json").read_text())
    assert summary["best/val/vqa_accuracy"] == pytest.approx(metrics["overall"], abs=1e-4)


def test_a_split_without_answers_gives_a_submission_with_each_question_once(tiny_run, tiny_data, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(tiny_data.parent / "raw", raw)
    (raw / "v2_Annotations_Test_mscoco.zip").unlink()
    prepared = command("data_prep.vqav2", "--raw-dir", raw, "--out-dir", "data", "--min-answer-count", 1, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    result = command("vlabs.evaluate", f"ckpt={tiny_run[0]}", "split=test", "data.dir=data", "data.num_workers=0",
                     "hydra.run.dir=out", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    submission = json.loads((tmp_path / "out/vqa_test_submission.json").read_text())
    asked = sum(load_split(tmp_path / "data", "test")["question_id"], [])
    assert sorted(entry["question_id"] for entry in submission) == sorted(asked)
    assert all(set(entry) == {"question_id", "answer"} for entry in submission)


def test_predict_prints_five_answers_a_question_and_leaves_the_image(tiny_run, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "street.png")
    result = command(
        "vlabs.predict", "--ckpt", tiny_run[0], "--image", "street.png",
        "--question", "What's left of it, the red one?",
        "--question", "Was ist das für ein Ding = $5?", "--out", "figure.png", "--map", "relevance", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("  (words that counted: ") for line in lines) == 2
    assert lines[0] == "What's left of it, the red one?"
    assert "  (its training never had: 5, das, ding, ein, für, ist, was)" in lines
    assert lines[-3] == "the model's training: vqa on scenes (320 questions, 40 images)"
    assert "need not sum to 100%" in lines[-2]
    assert sum(line.strip().split("%")[0].replace(".", "").isdigit() for line in lines) == 10
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > figure.height > 300


def test_a_model_knows_the_words_of_all_its_trainings_or_says_nothing():
    naming = {"task": "naming", "data": {"sets": [{"name": "coco"}, {"name": "own"}], "images": 9, "words": "a cat 猫"}}
    data = {"name": "rooms", "questions": 12000, "images": 900, "words": "is it red", "history": [naming]}
    known = Checkpoint(torch.nn.Identity(), Preprocessing(32, ""), "vqa", data, Path("x"))
    assert known.training == "naming on coco and own (9 images), then vqa on rooms (12,000 questions, 900 images)"
    twice = trainings_in_words([*history_of("vqa", data), *history_of("vqa", {**data, "history": []})])
    assert twice == f"{known.training}, twice"
    longer = trainings_in_words(history_of("vqa", data) + history_of("vqa", {"name": "rooms", "questions": 7}))
    assert longer == f"{known.training.removesuffix(')')}; then 7 questions)"
    assert known.new_words("IS the cat's 猫犬 red-hot? It is a cat.") == ["cat's", "hot", "the", "犬"]
    # Words are the same however accents and apostrophes are written, by a phone or a Mac.
    written = Checkpoint(known.network, known.preprocessing, "vqa", {"words": "what's café"}, known.path)
    assert written.new_words("What’s a cafe\u0301?") == ["a"]
    for damaged in ({"words": None}, {"words": 7}, {"words": ["is"]}):
        older = Checkpoint(known.network, known.preprocessing, "vqa", data | damaged, known.path)
        assert older.new_words("What is a zebra?") == []
    # Nothing is known of the words of an encoder's own training, and classes have none.
    classes = {"task": "classify", "data": {"name": "birds"}}
    started = Checkpoint(known.network, known.preprocessing, "vqa", data | {"history": [classes]}, known.path)
    assert started.new_words("is it green") == ["green"]


def test_a_share_of_the_patches_that_training_never_met_is_said(tiny_run, capsys):
    checkpoint = load_checkpoint(tiny_run[0])
    for shares, keep, said in (
        ([1.0], 0.25, "trained with 1, "), ([0.25], 1, "trained with 0.25, "), ([0.5, 0.25, 1], 0.1, "0.25 and 0.5 "),
        ([0.25, 1], 0.5, ""), ([0.25, 1], None, ""), ([1.0], 1, ""),
    ):  # fmt: skip
        checkpoint.vision.shares, checkpoint.vision.keep = shares, max(shares)
        checkpoint.use_share(keep)
        assert checkpoint.vision.keep == (max(shares) if keep is None else keep)
        note = capsys.readouterr().err
        assert said in note
        assert (note == "") is (said == "")
    with pytest.raises(UserError, match=r"keep=0 must be a number in \(0, 1\]"):
        checkpoint.use_share(0)


def test_the_words_that_counted_are_those_without_which_the_best_score_falls(tiny_run):
    question, image = "What color is the big star? ", Image.new("RGB", (40, 40), "red")
    predictor = vlabs.load(tiny_run[0])
    predictor.model.double()  # it has hardly learned, so that scores differ by little
    _, answer = predictor.answer(image, ["Is it red?", question], map_name="relevance")
    assert "".join(word for word, _ in answer.words).lower() == question.replace(" ", "").lower()
    assert all(word for word, _ in answer.words)  # the space at the end is none
    ids, mask = predictor.preprocessing.pad(predictor.preprocessing.token_ids([question]))
    pixels = predictor.preprocessing.image(image)[None].double()
    with torch.no_grad():
        whole = predictor.model(pixels, ids, mask).logits[0]
        falls = []
        for _, places in predictor.preprocessing.words(question):
            left = mask.clone()
            left[0, places] = 0
            falls.append(max(0.0, float((whole - predictor.model(pixels, ids, left).logits[0])[whole.argmax()])))
    assert [share for _, share in answer.words] == pytest.approx([fall / sum(falls) for fall in falls], abs=1e-4)
    assert sum(share for _, share in answer.words) == pytest.approx(1)
    assert predictor.answer(image, [question], map_name="normgrad")[0].words is None
    best = max(answer.words, key=lambda word: word[1])
    assert answer.counted.startswith(f"words that counted: {best[0]} {best[1]:.0%}, ")
    assert " 0%" not in answer.counted
    shown = _question(answer)
    assert shown.count("class='word'") == len(answer.words)
    assert f"style='--share:1.00' title='{best[1]:.0%}'>{best[0]}<" in shown


@pytest.mark.parametrize("map_name", ["fusion", "weights", "norm"])
def test_questions_asked_together_and_alone_get_the_same_answers(tiny_run, tiny_data, map_name, tmp_path):
    predictor = vlabs.load(tiny_run[0])
    row = load_split(tiny_data, "val")[0]
    (tmp_path / "picture.jpg").write_bytes(row["image"])
    questions = [*row["question"][:2], "?" * 500, "Какого цвета звезда?"]
    together = predictor.answer(tmp_path / "picture.jpg", questions, map_name=map_name)
    for question, answer in zip(questions, together, strict=True):
        alone = predictor.answer(tmp_path / "picture.jpg", [question], map_name=map_name)[0]
        assert [a for a, _ in alone.answers] == [a for a, _ in answer.answers]
        np.testing.assert_allclose([p for _, p in alone.answers], [p for _, p in answer.answers], atol=1e-5)
        np.testing.assert_allclose(alone.map, answer.map, atol=1e-5)
        assert answer.map.shape == (4, 4)
        assert (answer.map >= 0).all()


def test_prediction_agrees_with_evaluation(evaluation, tiny_run, tiny_data, tmp_path):
    results = {r["question_id"]: r["answer"] for r in json.loads((evaluation[0] / "results.json").read_text())}
    predictor = vlabs.load(tiny_run[0])
    row = load_split(tiny_data, "val")[1]
    (tmp_path / "picture.jpg").write_bytes(row["image"])
    answers = predictor.answer(tmp_path / "picture.jpg", row["question"])
    assert [a.answers[0][0] for a in answers] == [results[q] for q in row["question_id"]]


def test_an_export_answers_as_its_checkpoint(tiny_run, tmp_path):
    path = export_safetensors(tiny_run[0], tmp_path / "model.safetensors")
    image = Image.new("RGB", (32, 32), "blue")
    exported, original = (vlabs.load(p).answer(image, ["What color is it?"])[0] for p in (path, tiny_run[0]))
    assert exported.answers == original.answers
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.fixture
def released(tmp_path):
    """A released VQA file with its vocabulary of 11 answers and a tokenizer of 100 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", *["what", "color", "is", "the", "it"]]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "roberta").mkdir()
    tokenizer.save(str(tmp_path / "roberta/tokenizer.json"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/answers.json").write_text(json.dumps([f"answer {n}" for n in range(11)]))
    state = safetensors.torch.load_file(GOLDEN / "meter_absvit_vqa.safetensors")
    state = {key.removeprefix("state/"): value for key, value in state.items() if key.startswith("state/")}
    torch.save({"state_dict": state}, tmp_path / "released.ckpt")
    Image.new("RGB", (40, 40), "green").save(tmp_path / "picture.png")
    return tmp_path


def test_predict_takes_a_released_file_with_its_vocabulary(released):
    arguments = ["--ckpt", "released.ckpt", "--image", "picture.png", "--question", "what color is it"]
    result = command(
        "vlabs.predict", *arguments, "--answers", "data", "--tokenizer", "roberta", "--map", "weights", cwd=released
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("answer ") == 5


def test_a_released_file_without_its_vocabulary_is_asked_for_it(released):
    arguments = ["--ckpt", "released.ckpt", "--image", "picture.png", "--question", "what color is it"]
    assert_one_line_error(command("vlabs.predict", *arguments, cwd=released), "--answers")


@pytest.mark.parametrize("option", ["answers", "tokenizer"])
def test_a_checkpoint_of_vlabs_has_its_own_answers_and_tokenizer(option, tiny_run, tiny_data):
    with pytest.raises(UserError, match="has (answers of its|its) own.*leave it out"):
        vlabs.load(tiny_run[0], **{option: str(tiny_data)})


def test_a_second_look_is_at_what_stands_out_and_joins_both_answers(tiny_run, tiny_data, tmp_path, in_process):
    values = np.zeros((6, 6))
    values[3:5, 1:3] = 1.0
    assert best_window(values) == (3, 1, 2)
    image = Image.effect_noise((60, 60), 80).convert("RGB")
    crop = view_of(image, (0, 0, 60, 60), values, "crop", (9, 9, 9))
    assert np.array_equal(np.asarray(crop), np.asarray(image)[30:50, 10:30])
    masked = np.asarray(view_of(image, (0, 0, 60, 60), np.arange(36.0).reshape(6, 6), "masked", (9, 9, 9)))
    assert np.array_equal(masked[40:], np.asarray(image)[40:])
    assert (masked[:20] == 9).all()
    for size, part in (((1, 90), (1, 30)), ((90, 1), (30, 1)), ((1, 1), (1, 1))):  # windows of less than a pixel
        for found in (values, np.eye(6)[::-1] * np.arange(6)):
            assert view_of(Image.new("RGB", size), (0, 0, *size), found, "crop", (9, 9, 9)).size == part

    predictor, question = vlabs.load(tiny_run[0]), "What color is the big star?"
    names = list(predictor.preprocessing.names)
    for kind in ("crop", "masked"):
        (found,) = predictor.answer(image, [question], len(names), second_look=kind)
        (first,) = predictor.answer(image, [question], len(names))
        box = predictor.preprocessing.box(image.size)
        color = tuple(round(255 * one) for one in predictor.preprocessing.mean)
        (second,) = predictor.answer(view_of(image, box, first.map, kind, color), [question], len(names))
        assert found.before == first.answers
        one, other = (dict(looked.answers) for looked in (first, second))
        logit = {
            name: (np.log(one[name] / (1 - one[name])) + np.log(other[name] / (1 - other[name]))) / 2 for name in names
        }
        most = max(one.values())
        assert {name for name, _ in found.answers} == {name for name in names if one[name] >= most / 2}
        for name, share in found.answers:
            assert share == pytest.approx(1 / (1 + np.exp(-logit[name])), abs=1e-5), name

    given = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "task.view=crop", "hydra.run.dir=out", "split=val"]
    result = in_process("vlabs.evaluate", given, tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out/metrics.json").read_text())["view"] == "crop"
    answers = {one["question_id"]: one["answer"] for one in json.loads((tmp_path / "out/results.json").read_text())}
    row = load_split(tiny_data, "val")[0]
    (tmp_path / "picture.jpg").write_bytes(row["image"])
    looked = predictor.answer(tmp_path / "picture.jpg", row["question"], 1, second_look="crop")
    assert [one.answers[0][0] for one in looked] == [answers[n] for n in row["question_id"]]
    with pytest.raises(UserError, match="crop, masked"):
        predictor.answer(image, [question], second_look="again")


def test_an_ensemble_answers_by_the_mean_of_probabilities(tiny_run, tiny_data, tmp_path, in_process):
    content = torch.load(tiny_run[0] / "checkpoints/best.ckpt", weights_only=True)
    weights = {name: value for name, value in content["state_dict"].items() if ".head." in name and value.ndim == 2}
    assert weights
    for value in weights.values():  # another model: with other answers
        value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    torch.save(content, tmp_path / "other.ckpt")
    given = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "split=val", "task.ensemble=[other.ckpt]"]
    result = in_process("vlabs.evaluate", [*given, "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    members = [load_checkpoint(path) for path in (tiny_run[0], tmp_path / "other.ckpt")]
    found = {one["question_id"]: one["answer"] for one in json.loads((tmp_path / "out/results.json").read_text())}
    differs = 0
    for row in load_split(tiny_data, "val"):
        image = members[0].preprocessing.image(decode_image(row["image"], "image"))[None]
        for question_id, question in zip(row["question_id"], row["question"], strict=True):
            ids, mask = members[0].preprocessing.pad(members[0].preprocessing.token_ids([question]))
            with torch.no_grad():
                each = [one.model.eval()(image, ids, mask).logits[0].sigmoid() for one in members]
            assert found[question_id] == members[0].preprocessing.names[(each[0] + each[1]).argmax()]
            differs += int(each[0].argmax() != (each[0] + each[1]).argmax())
    assert differs
    result = in_process("vlabs.evaluate", [*given, "task.view=crop"], tmp_path)
    assert_one_line_error(result, "task.view=crop", "task.ensemble")
