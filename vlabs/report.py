"""A report on a sweep: the accuracy of every variant, its uncertainty, and its cost.

vlabs report outputs/sweeps/DATE

See `vlabs.evaluation.report`.
"""

from __future__ import annotations

from pathlib import Path

from vlabs.errors import run_cli
from vlabs.utils.arguments import Parser, whole


def main() -> None:
    """Entry point of `vlabs report`."""
    parser = Parser("report", __doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of a sweep, or of runs")
    parser.add_argument("--out", type=Path, help="where the report goes (default: SWEEP/report)")
    parser.add_argument(
        "--baseline", metavar="OVERRIDES", help="the variant to compare with (default: the one of model/topdown=none)"
    )
    parser.add_argument(
        "--grounding-texts", type=whole(1), default=500, help="questions measured (default %(default)s)"
    )
    parser.add_argument("--instances", type=Path, help="COCO's instances (default: annotations.zip of DATA-raw)")
    arguments = parser.read()
    from vlabs.evaluation.report import build_report

    out = arguments.out or arguments.sweep / "report"
    for path in build_report(arguments.sweep, out, arguments.baseline, arguments.grounding_texts, arguments.instances):
        print(path)


if __name__ == "__main__":
    run_cli(main)
