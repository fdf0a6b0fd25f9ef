"""The images of the page in the docs: python benchmarks/screenshots.py

Starts the page with the models that come with vlabs, and writes `page.png` (a desktop, light) and `page_phone.png` (a
phone's width, dark) to docs/, or to a folder that is named. It wants a Chromium, as the tests of the page do.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from page_server import BROWSER, NO_BROWSER, browsing, open_page, serving  # type: ignore[import-not-found]

from vlabs.errors import UserError, run_cli

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    if BROWSER is None:
        raise UserError(NO_BROWSER)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    with serving() as server, browsing() as browser:
        for path in shoot(browser, server.address, folder):
            print(f"{path} {path.stat().st_size / 1e3:.0f} kB")


def shoot(browser: Any, address: str, folder: Path) -> list[Path]:
    """Write the images of a page that is served at an address."""
    desktop = open_page(browser, address, 1200, 1040)
    phone = open_page(browser, address, 390, 844, color_scheme="dark")  # where the page goes to what it says
    for page in (desktop, phone):
        page.click("#examples button:nth-child(2)")
        page.wait_for_function("document.querySelector('#answers b').innerText.includes('hollow object')")
    desktop.fill("#answers .look input >> nth=0", "30")
    desktop.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    return [_save(page, folder / name) for page, name in ((desktop, "page.png"), (phone, "page_phone.png"))]


def _save(page: Any, path: Path) -> Path:
    page.wait_for_timeout(500)  # what fades in has
    Image.open(io.BytesIO(page.screenshot())).quantize(256, kmeans=2).save(path, optimize=True)
    return path


if __name__ == "__main__":
    run_cli(main)
