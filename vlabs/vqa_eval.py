"""Score a results file with the official VQA accuracy.

vlabs vqa-eval --annotations v2_mscoco_val2014_annotations.json --results results.json --out metrics.json
"""

from __future__ import annotations

from pathlib import Path

from vlabs.errors import run_cli, show
from vlabs.utils.arguments import Parser
from vlabs.utils.files import check_absent, write_json


def main() -> None:
    """Entry point of `vlabs vqa-eval`."""
    parser = Parser("vqa-eval", "Official VQA accuracy, in percent.")
    parser.add_argument("--annotations", type=Path, required=True, help="v2_mscoco_*_annotations.json")
    parser.add_argument("--results", type=Path, required=True, help='a list of {"question_id": ..., "answer": ...}')
    parser.add_argument("--out", type=Path, help="write all accuracies, also per question, to this JSON file")
    parser.add_argument("--overwrite", action="store_true", help="overwrite the file of --out")
    arguments = parser.read()
    from vlabs.metrics.vqa import types_table, vqa_accuracy
    from vlabs.utils.table import table

    if arguments.out is not None:
        check_absent(arguments.out, "--out", arguments.overwrite)
    accuracy = vqa_accuracy(arguments.annotations, arguments.results)
    rows = [["overall", f"{accuracy['overall']:.2f}"], *types_table(accuracy)]
    show(table([f"{len(accuracy['per_question']):,} questions", "percent"], rows))
    if arguments.out is not None:
        write_json(arguments.out, accuracy)


if __name__ == "__main__":
    run_cli(main)
