"""How long a visitor of the web page waits: python benchmarks/page.py

In a headless Chromium, with the model that comes with vlabs: from asking for the page to the first answer on it, a
picture uploaded and two questions typed in between, and from a click to the answer after that (median). A page has no
other side to be compared with, so these are seconds; the machine's cores are printed beside them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from page_server import BROWSER, NO_BROWSER, browsing, give_picture, open_page, serving  # type: ignore[import-not-found]

from vlabs.page.answers import example_pictures

CLICKS = 20


def main() -> None:
    if BROWSER is None:
        sys.exit(f"error: {NO_BROWSER}")
    picture = example_pictures()[1]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with serving("--index", Path(folder) / "index") as server, browsing() as browser:
            started = time.perf_counter() - began
            began = time.perf_counter()
            page = open_page(browser, server.address)
            loaded = time.perf_counter() - began
            give_picture(page, picture)
            page.fill("#questions textarea", "What color is the hollow object?\nWhich color is the star?")
            page.click("#ask")
            page.wait_for_selector("#answers .card img")
            first = time.perf_counter() - began
            seconds = []
            for n in range(CLICKS):
                page.fill("#questions textarea", f"Which color is the star?\nHow many blue objects are there?{'?' * n}")
                clicked = time.perf_counter()
                page.click("#ask")
                page.wait_for_function(
                    "end => document.querySelectorAll('#answers figcaption b')[1].innerText.endsWith(end)",
                    arg=f"there?{'?' * n}",
                )
                seconds.append(time.perf_counter() - clicked)
    found = {
        "start_of_the_command_s": round(started, 2),
        "page_shown_s": round(loaded, 2),
        "first_answer_s": round(first, 2),
        "next_answer_s": round(statistics.median(seconds), 3),
        "slowest_next_answer_s": round(max(seconds), 3),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
