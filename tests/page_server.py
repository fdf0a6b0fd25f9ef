"""The page's server in a process of its own, and a browser to look at it with; `benchmarks/page.py` uses both."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import httpx

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
NO_BROWSER = "there is no Chromium here: apt-get install chromium, or name one in the variable CHROMIUM"
# Without the last ones it asks hosts of its maker for updates, at every start.
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def serving(*arguments, python=sys.executable, **environment):
    """A server with what it printed as `address`, `token` and `lines`; it is ended at the end."""
    server = subprocess.Popen(
        [python, "-m", "vlabs.demo_page", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    server.lines = []
    try:
        for line in server.stdout:
            server.lines.append(line)
            if found := re.search(r"(http://[\w.:]+)/(\?token=[\w-]+)?", line):
                server.address, server.token = found[1], found[2] or ""
                break
        else:
            raise RuntimeError("".join(server.lines))
        # It must not wait for somebody to read what it says.
        threading.Thread(target=lambda: server.lines.extend(server.stdout), daemon=True).start()
        yield server
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def browsing():
    """A new, empty headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address, width=1280, height=860, **options):
    """The page, ready to be used; what it asks of other hosts is in `page.elsewhere`."""
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    page.set_default_timeout(10_000)
    page.elsewhere = []
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((address, "data:", "blob:")) else page.elsewhere.append(request.url)
        ),
    )
    page.goto(address)
    page.wait_for_selector("#ask")
    page.wait_for_selector("#answers .card")  # of the first image to begin with
    return page


def give_picture(page, path):
    """Upload an image as somebody who chose a file."""
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files("#picture input[type=file]", str(path))


def upload(client, content):
    """Upload an image as a program does; returns its name."""
    answer = client.post("/gradio_api/upload", files={"files": ("picture.jpg", content)})
    answer.raise_for_status()
    return answer.json()[0]


def function_of(client, name):
    """The number of a function in the form."""
    found = client.get("/config").json()["dependencies"]
    return next(one["id"] for one in found if one["api_name"] == name)


def request_of(number, session, *values):
    """What asks for a function."""
    return {"fn_index": number, "data": list(values), "session_hash": session}


def listen(client, session):
    """The messages about a session's requests, until its last one is done."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}, timeout=60) as stream:
        for line in stream.iter_lines():
            message = json.loads(line[6:]) if line.startswith("data: ") else {}
            yield message
            if message.get("msg") in ("process_completed", "close_stream"):
                return


class Hostile:
    """Traffic that the page must not be harmed by, until the context ends.

    Attributes:
        counts: how often what was tried, with the status that came.
    """

    def __init__(self, address, content, seed):
        self.address, self.content, self.random = address, content, random.Random(seed)
        self.counts = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join(60)

    def _run(self):
        with httpx.Client(base_url=self.address, timeout=60) as client:
            name, ask = upload(client, self.content), function_of(client, "ask")
            kinds = (self._direct, self._unheard, self._cancelled, self._odd, self._broken, self._large, self._stolen)
            while not self._ended.is_set():
                kind = self.random.choice(kinds)
                status = kind(client, ask, [name, "Which color is the star?", "norm", 0.5, "What is it?", 1, "none"])
                key = f"{kind.__name__[1:]} {status}"
                self.counts[key] = self.counts.get(key, 0) + 1
                self._ended.wait(0.02)

    def _session(self):
        return f"hostile{self.random.randrange(10**12)}"

    def _direct(self, client, ask, values):
        """Past the line, with an α of its own."""
        path = self.random.choice(("run/ask", "api/ask", "run/predict", "call/ask", "call/v2/ask"))
        body = request_of(ask, self._session(), *values)
        return client.post(f"/gradio_api/{path}", json=body).status_code

    def _unheard(self, client, ask, values):
        """A request that nobody listens for."""
        return client.post("/gradio_api/queue/join", json=request_of(ask, self._session(), *values)).status_code

    def _cancelled(self, client, ask, values):
        """Somebody who goes away while it is worked on."""
        session = self._session()
        answer = client.post("/gradio_api/queue/join", json=request_of(ask, session, *values))
        if answer.status_code == 200:
            for message in listen(client, session):
                if message.get("msg") == "process_starts":
                    break
        return answer.status_code

    def _odd(self, client, ask, values):
        """Values of the wrong kind, and too many of them."""
        odd = self.random.choice((None, [], {"a": [1]}, "\ud800", True, 1e308, "x" * 5000, float("nan")))
        values[self.random.randrange(len(values))] = odd
        values += [odd] * self.random.choice((0, 0, 3))
        body = json.dumps(request_of(ask, self._session(), *values))
        return client.post("/gradio_api/queue/join", content=body).status_code

    def _broken(self, client, ask, values):
        """An upload that breaks off."""
        host, port = self.address.removeprefix("http://").split(":")
        head = (
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 8000000\r\n"
            "Content-Type: multipart/form-data; boundary=xyz\r\n\r\n--xyz\r\n"
            'Content-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        )
        with suppress(OSError), socket.create_connection((host, int(port)), 10) as line:
            line.sendall(head.encode() + os.urandom(3_000_000))
        return "sent"

    def _large(self, client, ask, values):
        """A body above any limit."""
        with suppress(httpx.TransportError):
            return client.post("/gradio_api/queue/join", content=b'{"data": "' + b"x" * 3_000_000).status_code
        return "closed"

    def _stolen(self, client, ask, values):
        """A file that was not uploaded."""
        return client.get("/gradio_api/file=/etc/hostname").status_code
