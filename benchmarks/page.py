"""What the web page does for a visitor and under load: python benchmarks/page.py

For a visitor, in a headless Chromium (without one this part is left out) with the model that comes with vlabs: from
asking for the page to the first answer on it, an image uploaded and two questions typed in between, and from a click
to the answer after that (median).

Under load: 300 requests of 20 clients, each with its own image, question, α and map, while three others post past the
line, go away, send nonsense, ask for files and break uploads off. `lost` and `wrong` are of the 300, compared with the
model itself; memory is of the server and what it has started, after the first third and at the end. A page has no other
side to be compared with, so these are seconds and megabytes; the machine's cores are printed beside them.
"""

from __future__ import annotations

import concurrent.futures
import html
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from page_server import (  # type: ignore[import-not-found]
    BROWSER,
    Hostile,
    browsing,
    function_of,
    give_picture,
    listen,
    open_page,
    request_of,
    serving,
    upload,
)

import vlabs
from vlabs.page.answers import example_pictures

CLICKS = 20
REQUESTS, CLIENTS, HOSTILE = 300, 20, 3
QUESTIONS = ("Which color is the star?", "What color is the hollow object?", "How many red objects can you see?")


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with serving("--index", Path(folder) / "index", TMPDIR=folder) as server:
            found["start_of_the_command_s"] = round(time.perf_counter() - began, 2)
            if BROWSER is not None:
                found |= visit(server)
            found |= load(server)
        found["left_behind"] = [path.name for path in Path(folder).iterdir() if path.name != "index"]
    found["cores"] = len(os.sched_getaffinity(0))
    print(json.dumps(found))


def visit(server: Any) -> dict[str, float]:
    """How long somebody with a browser waits."""
    with browsing() as browser:
        began = time.perf_counter()
        page = open_page(browser, server.address)
        loaded = time.perf_counter() - began
        give_picture(page, example_pictures()[1])
        page.fill("#questions textarea", "What color is the hollow object?\nWhich color is the star?")
        page.click("#ask")
        page.wait_for_function("document.querySelector('#answers b')?.innerText.includes('hollow object')")
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
    return {
        "page_shown_s": round(loaded, 2),
        "first_answer_s": round(first, 2),
        "next_answer_s": round(statistics.median(seconds), 3),
        "slowest_next_answer_s": round(max(seconds), 3),
    }


def load(server: Any) -> dict[str, Any]:
    """What becomes of many requests beside hostile ones."""
    pictures = [path.read_bytes() for path in example_pictures()]
    asked = [(n % len(pictures), QUESTIONS[n % 3], n % 21, ("weights", "norm")[n % 2]) for n in range(REQUESTS)]
    answers: dict[int, str] = {}
    memory, done, seconds = [], threading.Lock(), []

    def client(number: int) -> None:
        with httpx.Client(base_url=server.address, timeout=120) as opened:
            function = function_of(opened, "ask")
            for n in range(number, REQUESTS, CLIENTS):
                picture, question, alpha, map_name = asked[n]
                began = time.perf_counter()
                name = upload(opened, pictures[picture])
                body = request_of(function, f"client{n}", {"path": name}, question, map_name, alpha, "", 1, "none")
                opened.post("/gradio_api/queue/join", json=body).raise_for_status()
                for message in listen(opened, f"client{n}"):
                    if message.get("msg") == "process_completed":
                        answers[n] = message["output"]["data"][0]
                with done:
                    seconds.append(time.perf_counter() - began)
                    if len(seconds) in (REQUESTS // 3, REQUESTS):
                        memory.append(_megabytes(server.pid))

    began = time.perf_counter()
    with ExitStack() as others, concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        hostile = [others.enter_context(Hostile(server.address, pictures[0], n)) for n in range(HOSTILE)]
        list(pool.map(client, range(CLIENTS)))
    took = time.perf_counter() - began
    predictor = vlabs.load("scenes", device="cpu")
    wrong = 0
    for n, said in answers.items():
        picture, question, alpha, map_name = asked[n]
        path = example_pictures()[picture]
        (expected,) = predictor.answer(path, [question], map_name=map_name, alpha=float(alpha))
        shown = re.findall(r"class='text'>([^<]*)</span><span class='score'>([^<]*)<", said)
        wrong += shown != [(html.escape(text), f"{share:.1%}") for text, share in expected.answers]
    counts: Counter[str] = sum((Counter(one.counts) for one in hostile), Counter())
    return {
        "requests": REQUESTS,
        "clients": CLIENTS,
        "lost": REQUESTS - len(answers),
        "wrong": wrong,
        "requests_per_s": round(REQUESTS / took, 1),
        "median_request_s": round(statistics.median(seconds), 2),
        "slowest_request_s": round(max(seconds), 2),
        "hostile": dict(sorted(counts.items())),
        "memory_after_a_third_mb": memory[0],
        "memory_at_the_end_mb": memory[-1],
        "tracebacks": "".join(server.lines).count("Traceback"),
    }


def _megabytes(pid: int) -> int:
    """Resident memory of a process and of those that it started."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[1] if found else 0) // 1024 + sum(_megabytes(int(child)) for child in children)


if __name__ == "__main__":
    main()
