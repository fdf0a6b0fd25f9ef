"""The VQA accuracy agrees with the official evaluation, on its golden files and on what they do not reach."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import warm_python

from vlabs.errors import UserError
from vlabs.metrics.vqa import answer_accuracy, normalize_answer, vqa_accuracy

GOLDEN = Path(__file__).parent / "golden" / "vqa_eval"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_accuracies_are_those_of_the_official_evaluation() -> None:
    expected = golden("expected")
    accuracy = vqa_accuracy(GOLDEN / "annotations.json", GOLDEN / "results.json")
    assert accuracy["overall"] == pytest.approx(expected["overall"], abs=5e-5)
    assert accuracy["per_question_type"] == pytest.approx(expected["perQuestionType"], abs=5e-5)
    assert accuracy["per_answer_type"] == pytest.approx(expected["perAnswerType"], abs=5e-5)
    per_question = {str(question_id): value for question_id, value in accuracy["per_question"].items()}
    assert per_question == pytest.approx(expected["perQuestion"], abs=5e-5)


def test_normal_forms_are_those_of_the_official_evaluation() -> None:
    expected = golden("expected")["normalized"]
    assert {answer: normalize_answer(answer) for answer in expected} == expected


def test_every_entry_of_the_tables_is_applied_as_officially() -> None:
    tables = golden("normalisation_tables")
    for word, number in tables["number_words"].items():
        assert normalize_answer(f"{word.upper()} x") == f"{number} x"
    for article in tables["articles"]:
        assert normalize_answer(f"x {article} y") == "x y"
    for mark in tables["punctuation"]:
        assert normalize_answer(f"x{mark}y") == "x y"
        assert normalize_answer(f"x{mark} y") == "x y"
        assert normalize_answer(f"x {mark}y{mark}z") == "x yz"
    for written, meant in tables["contractions"].items():
        capitalised = written != written.lower()
        assert normalize_answer(written) == (written.lower() if capitalised else meant)


@pytest.mark.parametrize(
    ("answer", "normal_form"),
    [
        ("1,000 x-y", "1000 xy"),  # a comma between digits anywhere deletes every mark
        ("2.5", "2.5"),
        ("5. 6", "5 6"),
        ("5.m", "5m"),  # the half of the pattern that should spare this one says nothing
        ("two.", "2"),
        ("t.h.e end", "end"),  # periods go before articles
        ("one-a", "1"),  # and so does other punctuation
        (" \n x\ty ", "x y"),
        ("a", ""),
        ("." * 40 + "x", "." * 8 + "x"),  # the official call replaces 32 periods at most
        ("none", "0"),
        ("wed've", "we'd've"),
        ("Im", "im"),
    ],
)
def test_quirks(answer: str, normal_form: str) -> None:
    assert normalize_answer(answer) == normal_form


def test_accuracy_is_the_mean_over_leave_one_out_sets() -> None:
    for matches in range(1, 10):
        answers = ["red"] * matches + [f"other{number}" for number in range(10 - matches)]
        left_out = [min(1, sum(b == "red" for j, b in enumerate(answers) if j != i) / 3) for i in range(10)]
        assert answer_accuracy("Red!", answers) == pytest.approx(sum(left_out) / 10, abs=1e-12)


def test_strings_stay_as_they_are_where_all_humans_wrote_the_same() -> None:
    assert answer_accuracy("red", ["Red"] * 10) == 0
    assert answer_accuracy("Red\n", [" Red"] * 10) == 1
    assert answer_accuracy("red", ["Red"] * 9 + ["red"]) == 1


def test_results_must_answer_every_question_once() -> None:
    annotations, results = golden("annotations"), golden("results")
    first, second = results[0]["question_id"], results[1]["question_id"]
    with pytest.raises(UserError, match=f"no answer to question {first}"):
        vqa_accuracy(annotations, results[1:])
    with pytest.raises(UserError, match=f"more than once: question {first}"):
        vqa_accuracy(annotations, [*results, results[0]])
    with pytest.raises(UserError, match="do not have: question 7"):
        vqa_accuracy(annotations, [*results, {"question_id": 7, "answer": "x"}])
    with pytest.raises(UserError, match=f"no answer to questions {first}, {second}"):
        vqa_accuracy(annotations, results[2:])
    with pytest.raises(UserError, match="result 0"):
        vqa_accuracy(annotations, [{"question_id": first, "answer": 3}])


def test_arguments_are_left_as_they_were() -> None:
    annotations, results = golden("annotations"), golden("results")
    before = copy.deepcopy((annotations, results))
    vqa_accuracy(annotations, results)
    assert (annotations, results) == before


def run_vqa_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), "-m", "vlabs.vqa_eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "new" / "metrics.json"
    results = tmp_path / "results.json"  # with a byte order mark, as some editors write
    results.write_text((GOLDEN / "results.json").read_text(), encoding="utf-8-sig")
    done = run_vqa_eval("--annotations", GOLDEN / "annotations.json", "--results", results, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "overall" in done.stdout
    assert "yes/no" in done.stdout
    assert "what color is the" in done.stdout
    written = json.loads(out.read_text())
    assert written["overall"] == pytest.approx(62.925)
    assert written["per_question"]["262148000"] == 100


def test_command_line_names_a_file_that_is_not_json(tmp_path: Path) -> None:
    broken = tmp_path / "results.json"
    broken.write_text('[{"question_id"')
    done = run_vqa_eval("--annotations", GOLDEN / "annotations.json", "--results", broken)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(broken) in done.stderr
