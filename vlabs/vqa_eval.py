"""Score a results file with the official VQA accuracy.

python -m vlabs.vqa_eval --annotations v2_mscoco_val2014_annotations.json --results results.json --out metrics.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlabs.errors import UserError, run_cli, show
from vlabs.metrics.vqa import format_table, vqa_accuracy


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m vlabs.vqa_eval", description="Official VQA accuracy, in percent.")
    parser.add_argument("--annotations", type=Path, required=True, help="v2_mscoco_*_annotations.json")
    parser.add_argument("--results", type=Path, required=True, help='a list of {"question_id": ..., "answer": ...}')
    parser.add_argument("--out", type=Path, help="write all accuracies, per question too, to this JSON file")
    arguments = parser.parse_args()
    accuracy = vqa_accuracy(arguments.annotations, arguments.results)
    show(format_table(accuracy))
    if arguments.out is not None:
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(accuracy, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {arguments.out}: {error.strerror}") from None


if __name__ == "__main__":
    run_cli(main)
