"""Every page of docs/ is executed: its files are written and its commands run, in a fresh folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import warm_python
from PIL import Image

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
BLOCK = re.compile(r"<!-- (file: (?P<file>\S+)|run) -->\n```\w*\n(?P<body>.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_page_does_what_it_says(page, tmp_path):
    (tmp_path / "photos").mkdir()
    for n, color in enumerate(["red", "blue", "red"], start=1):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"photos/{n}.png")
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    assert blocks
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    # `python` in a page is this Python.
    warm, plain = shlex.join(warm_python()), shlex.quote(sys.executable)
    python = f'python() {{ case "$2" in vlabs.*) {warm} "$@";; *) {plain} "$@";; esac; }}\nset -e\n'
    for block in blocks:
        if block["file"]:
            path = tmp_path / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["body"], encoding="utf-8")
        else:
            result = subprocess.run(
                ["bash", "-c", python + block["body"]],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
