"""The page's server in a process of its own, and a browser to look at it with; `benchmarks/page.py` uses both."""

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
NO_BROWSER = "there is no Chromium here: apt-get install chromium, or name one in the variable CHROMIUM"
# Without the last ones it asks hosts of its maker for updates, at every start.
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def serving(*arguments, **environment):
    """A server, with the address that it printed as `address` and its lines as `lines`; it is ended at the end."""
    server = subprocess.Popen(
        [sys.executable, "-m", "vlabs.demo_page", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    server.lines = []
    try:
        for line in server.stdout:
            server.lines.append(line)
            if found := re.search(r"http://[\w.:]+", line):
                server.address = found[0]
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


def open_page(browser, address):
    """The page, ready to be used; what it asks of other hosts is in `page.elsewhere`."""
    page = browser.new_page(viewport={"width": 1280, "height": 860})
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
    return page


def give_picture(page, path):
    """Upload a picture as somebody who chose a file."""
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files("#picture input[type=file]", str(path))
