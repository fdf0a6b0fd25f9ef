"""The web page: in a real browser, under many clients and hostile ones at once, and given what it must refuse."""

import argparse
import base64
import concurrent.futures
import html
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import assert_one_line_error, command, warm_python
from page_server import BROWSER, NO_BROWSER, Hostile, browsing, function_of, give_picture, listen, open_page

from page_server import request_of, serving, upload  # isort: skip
from PIL import Image
from tiny_models import save_tiny

import vlabs
from vlabs.demo_page import _QUESTIONS, _searches
from vlabs.errors import UserError
from vlabs.look import load
from vlabs.page.about import about
from vlabs.page.answers import Page, example_pictures, questions_beside
from vlabs.page.decoder import Decoder, decode
from vlabs.page.hosts import Hosts
from vlabs.page.line import Line
from vlabs.page.server import Gate
from vlabs.page.uploads import KEPT, Limits, Uploads, own_folder

PICTURES = example_pictures()
CONTENTS = [path.read_bytes() for path in PICTURES]
QUESTIONS = ["What color is the hollow object?", "Which color is the star?"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP."""
    return save_tiny("CLIPModel", tmp_path_factory.mktemp("clip"), positions=16)


@pytest.fixture(scope="module")
def server(tmp_path_factory, clip):
    """The page of the models that come with vlabs, and of a CLIP."""
    folder = tmp_path_factory.mktemp("page")
    with serving(
        "--index", folder / "index", "--look", clip, python=warm_python(), HOME=str(folder), TMPDIR=str(folder)
    ) as started:
        started.folder = folder
        yield started
        started.terminate()
        assert started.wait(90) == 128 + signal.SIGTERM
        assert "Traceback" not in "".join(started.lines)
    # The first three are of the home folder, the last one is torch's.
    known = ("index", ".cache", ".config", "torchinductor")
    assert not [path.name for path in folder.iterdir() if not path.name.startswith(known)]


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.address, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def predictor():
    return vlabs.load("scenes")


@pytest.fixture(scope="module")
def in_page(predictor, clip, tmp_path_factory):
    """The page's answers without its server."""
    uploads = Uploads(tmp_path_factory.mktemp("uploads"), Limits(megabytes=1, megapixels=1, questions=3, characters=60))
    decoder = Decoder(1, 5)
    page = Page(predictor, {}, uploads, decoder, looker=load(str(clip), device="cpu"))
    page.picture = uploads.keep(PICTURES[0])
    yield page
    decoder.close()


@pytest.fixture
def browser():
    if BROWSER is None:
        pytest.skip(NO_BROWSER)
    with browsing() as opened:
        yield opened


def best(predictor, question, **options):
    return predictor.answer(PICTURES[1], [question], **options)[0].answers[0][0]


def said_of(answer):
    return re.findall(r"class='text'>([^<]*)<", answer)


def test_a_browser_asks_searches_and_sees_what_a_wrong_prior_does(server, predictor, browser, tmp_path):
    page = open_page(browser, server.address)
    (tmp_path / "notes.png").write_text("not a picture")
    give_picture(page, tmp_path / "notes.png")
    page.fill("#questions textarea", "\n".join(QUESTIONS))
    page.click("#ask")
    page.wait_for_selector("#answers .error")
    said = page.inner_text("#answers .error")
    assert "not an image of a known format" in said
    assert "\n" not in said
    # One of the images to begin with replaces it, and is answered by that click.
    page.click("#examples button:nth-child(2)")
    page.wait_for_selector("#answers .card")
    assert page.input_value("#questions textarea").splitlines() == QUESTIONS
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth == 64")
    cards = page.query_selector_all("#answers .card")
    assert [card.query_selector("b").inner_text() for card in cards] == QUESTIONS
    assert [card.query_selector(".text").inner_text() for card in cards] == [best(predictor, q) for q in QUESTIONS]
    maps = [card.query_selector("img").get_attribute("src") for card in cards]
    assert maps[0] != maps[1]
    # Another question's ξ, and an image of your own: the cards below are what the model says under it.
    page.click("#picture button[aria-label='Remove Image']")
    give_picture(page, PICTURES[1])
    other = "What shape is the blue object?"
    page.click("#how button")
    page.fill("#other textarea, #other input", other)
    page.click("#ask")
    page.wait_for_selector("#answers .other")
    last = page.query_selector_all("#answers .card")[-1]
    assert last.query_selector(".text").inner_text() == best(predictor, QUESTIONS[1], prior_of=other)
    assert last.query_selector(".text").inner_text() != best(predictor, QUESTIONS[1])
    assert "knows nothing about photographs" in page.inner_text("#answers .warning")
    # Another map of the same answers, without asking anew.
    page.click("#map label:has-text('norm')")
    page.wait_for_function("document.querySelector('#answers .legend').innerText.includes('norm')")
    page.click("button[role=tab]:has-text('Search')")
    page.fill("#query textarea, #query input", "A small hollow green cross lies left of a large blue cross.")
    page.click("#search")
    page.wait_for_selector("#found .card")
    assert page.inner_text("#found .card figcaption").split()[1] == PICTURES[1].name
    assert "A small hollow green cross" in page.inner_text("#found")
    assert "scenes_search" in page.inner_text(".about >> visible=true")
    page.click("#texts button:nth-child(1)")
    page.wait_for_function("document.querySelector('#found').innerText.includes('A purple star')")
    page.click("button[role=tab]:has-text('Look')")
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files("#looked-image input[type=file]", str(PICTURES[0]))
    page.fill("#looked-texts textarea", "a red square\na blue circle")
    page.click("#look")
    page.wait_for_selector("#looked .card:nth-child(2)")
    assert page.inner_text("#looked .card:nth-child(2) b") == "a blue circle"
    assert "relevance" in page.inner_text("#looked .legend")
    assert page.elsewhere == []


def test_the_first_image_is_answered_before_anybody_asks_and_what_was_asked_in_a_tab_can_be_had_again(
    server, predictor, browser
):
    asked = []
    page = open_page(browser, server.address)
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    page.reload()
    page.wait_for_selector("#answers .card")
    first = page.inner_text("#answers .card .text")
    question = page.inner_text("#answers .card b")
    assert first == predictor.answer(PICTURES[0], [question])[0].answers[0][0]
    assert asked == []
    for n in (2, 3):
        page.click(f"#examples button:nth-child({n})")
        expected = _QUESTIONS[n - 1].splitlines()[0]
        page.wait_for_function("text => document.querySelector('#answers b')?.innerText == text", arg=expected)
    page.click("text=History of this tab")
    rows = page.locator("#past tbody tr")
    rows.nth(1).wait_for()
    assert rows.count() == 2
    before = len(asked)
    rows.nth(1).click()
    page.wait_for_function("text => document.querySelector('#answers b')?.innerText == text", arg=QUESTIONS[0])
    assert page.input_value("#questions textarea").splitlines() == QUESTIONS
    assert len(asked) == before
    # The map is drawn aside, all maps together, and a link saves it.
    page.locator("#answers .look").first.scroll_into_view_if_needed()
    map_ = page.locator("#answers .look").first.bounding_box()
    for share, act in ((0.1, page.mouse.down), (0.5, page.mouse.up)):
        page.mouse.move(map_["x"] + share * map_["width"], map_["y"] + 0.2 * map_["height"])
        act()
    at = "n => getComputedStyle(document.querySelectorAll('#answers .look img')[n]).clipPath"
    assert [page.evaluate(at, n) for n in (0, 1)] == ["inset(0px 0px 0px 50%)"] * 2
    page.fill("#answers .legend input", "0.5")
    assert page.evaluate("getComputedStyle(document.querySelector('#answers .look img')).opacity") == "0.5"
    with page.expect_download() as saved:
        page.click("#answers .save >> nth=0")
    assert saved.value.suggested_filename == "What-color-is-the-hollow-object.jpg"
    assert Image.open(saved.value.path()).size == (448, 448)


# The contrast of a text with the page, as WCAG has it.
CONTRAST = """selector => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  const light = color => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = Array.from(canvas.getImageData(0, 0, 1, 1).data, v => ((v / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const both = [document.querySelector(selector), document.body].map(getComputedStyle);
  const [text, page] = [light(both[0].color), light(both[1].backgroundColor)];
  return Math.max(text, page) / Math.min(text, page);
}"""


def test_on_a_phone_nothing_is_wider_than_it_and_all_can_be_read_in_light_and_dark(server, browser):
    wide, behind = "document.documentElement.scrollWidth", "getComputedStyle(document.body).backgroundColor"
    chosen = open_page(browser, f"{server.address}/?__theme=dark", color_scheme="light")
    assert max(Image.open(io.BytesIO(chosen.screenshot())).convert("RGB").getpixel((5, 5))) < 50
    chosen.close()
    for scheme in ("light", "dark"):
        page = open_page(browser, server.address, 390, 844, color_scheme=scheme)
        page.fill("#questions textarea", "Is the zebra red?")
        page.click("#ask")
        page.wait_for_selector("#answers .card .warning")
        for closed in page.locator("button.label-wrap:visible").all():
            closed.click()
        assert (page.evaluate(behind) == "rgb(255, 255, 255)") == (scheme == "light")
        for selector in ("#answers b", "#answers .text", "#answers .legend", "#answers .warning", ".about"):
            assert page.evaluate(CONTRAST, selector) > 4.5, selector
        assert page.evaluate(wide) <= 390
        page.click("button[role=tab]:has-text('Search')")
        page.click("#texts button:nth-child(1)")
        page.wait_for_selector("#found .card")
        assert page.evaluate(wide) <= 390
        page.close()


def test_the_images_of_the_docs_are_made_by_a_command_and_small(server, browser, tmp_path):
    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    from screenshots import shoot

    made = shoot(browser, server.address, tmp_path)
    assert [Image.open(path).size for path in made] == [(1200, 1040), (390, 844)]
    assert max(path.stat().st_size for path in made) < 150_000


def test_a_card_says_what_a_model_was_trained_on_and_does_not_know(predictor, tmp_path):
    packaged = about(predictor.checkpoint, "scenes")
    assert "nothing about photographs" in packaged.limits
    assert packaged.limits.split()[0] == "It"
    assert "| val | 93.0 |" in packaged.card
    assert "](scenes_vit.md)" not in packaged.card
    # Of a run, what its folder says.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "summary.json").write_text('{"best/val/accuracy": 12.25, "command": "vlabs train"}')
    file = tmp_path / "checkpoints" / "best.safetensors"
    file.write_bytes(predictor.checkpoint.path.read_bytes())
    run = about(vlabs.load(file).checkpoint, file)
    assert run.limits.startswith(f"Its training: {packaged.training}")
    assert "It sees an image as 64 × 64 pixels" in run.limits
    assert run.training == packaged.training
    assert run.training in run.card
    assert "| val, best of training | val/accuracy | 12.25 |" in run.card


def test_no_request_is_lost_or_mixed_up_while_others_go_past_the_line_break_off_and_send_nonsense(server, predictor):
    from gradio_client import Client, handle_file

    others = ("", "", "", "Is it red?")
    asked = [(n % len(PICTURES), QUESTIONS[n % 2], (0.0, 4.0, 10.0)[n % 3], others[n % 4]) for n in range(42)]

    def ask(person):
        client = Client(server.address, verbose=False)
        found = []
        for picture, question, alpha, other in asked[person::6]:
            given = handle_file(PICTURES[picture]), question, "weights", alpha, other, 1
            found.append(client.predict(*given, api_name="/ask"))
        return found

    with (
        Hostile(server.address, CONTENTS[3], 0) as hostile,
        Hostile(server.address, CONTENTS[4], 1) as more,
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        answers = list(pool.map(ask, range(6)))
    for n, (picture, question, alpha, other) in enumerate(asked):
        answer = answers[n % 6][n // 6]
        expected = predictor.answer(PICTURES[picture], [question], alpha=alpha)[0].answers
        for one in [other] if other else []:
            expected += predictor.answer(PICTURES[picture], [question], alpha=alpha, prior_of=one)[0].answers
        assert said_of(answer) == [html.escape(text) for text, _ in expected]
    counts = hostile.counts | more.counts
    assert {"direct 404", "cancelled 200", "unheard 200", "broken sent", "stolen 404"} <= set(counts)
    assert not [key for key in counts if key.split()[1].startswith("5")]


def test_only_images_that_were_uploaded_are_read_and_others_are_not_told_apart(server, client, tmp_path):
    secret = tmp_path / "secret.jpg"
    Image.new("RGB", (9, 9), "red").save(secret)
    number = function_of(client, "ask")
    folder = next(server.folder.glob("vlabs-page-*"))
    uploaded = upload(client, CONTENTS[0])
    (folder / ("ab" * 16)).symlink_to(secret)
    places = [
        str(secret), "/nowhere.jpg", "/etc/passwd", f"../{folder.name}/{uploaded}", str(folder / uploaded), "ab" * 16,
        "/proc/self/environ", "file:///etc/passwd", "http://127.0.0.1/x.jpg", uploaded + "\0", "", "cd" * 16,
    ]  # fmt: skip
    said = set()
    for n, place in enumerate(places):
        for given in ({"path": place}, {"path": place, "meta": {"_type": "gradio.FileData"}, "url": place}, place):
            body = request_of(number, f"reader{n}", given, "What is it?", "norm", 10, "", 1, "none")
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
            said.add(list(listen(client, f"reader{n}"))[-1]["output"]["data"][0])
    assert said == {"<p class='error' role='alert'>the image is no longer here: upload it again</p>"}
    answers = {client.get(f"/gradio_api/file={place}").text for place in places if "\0" not in place}
    assert answers == {'{"detail":"the image is no longer here: upload it again"}'}
    assert client.get(f"/gradio_api/file={uploaded}").content == CONTENTS[0]


def test_what_the_form_does_not_need_is_not_there(client):
    for method, path in (
        *(("POST", f"/gradio_api/{name}") for name in (
            "run/ask", "run/predict", "api/ask", "api/predict/", "call/ask", "call/v2/ask", "component_server", "reset",
            "stream/x", "process_recording", "vibe-code", "vibe-edit",
        )),
        *(("GET", f"/gradio_api/{name}") for name in (
            "proxy=http://127.0.0.1/", "file/etc/passwd", "startup-events", "dev/reload", "queue/status", "token",
            "user", "custom_component/x/client/component/y.js", "deep_link", "openapi.json", "heartbeat/x", "app_id",
            "runs", "upload_progress?upload_id=x", "call/ask/x", "profiling/summary",
        )),
        *(("GET", f"/{name}") for name in (
            "monitoring", "login", "logout", "docs", "openapi.json", "robots.txt", "pwa_icon", "svelte/x.js", "config/",
            "static/../routes.py", "static/%2e%2e/%2e%2e/routes.py", "assets/%2e%2e/share.html", "assets//etc/passwd",
        )),
        ("POST", "/login"), ("PUT", "/config"), ("DELETE", "/gradio_api/upload"), ("OPTIONS", "/gradio_api/queue/join"),
    ):  # fmt: skip
        assert client.request(method, path).status_code == 404, (method, path)
    shown = client.get("/").text + client.get("/config").text + client.get("/gradio_api/info").text
    assert str(PICTURES[0].parent) not in shown
    assert "vlabs-page-" not in shown
    # What would lead elsewhere in Gradio's own form is not passed on.
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    assert "evil" not in client.get("/?deep_link=../../x&__theme=evil", headers=forged).text


def test_every_answer_says_what_a_browser_may_do_with_it(client):
    for path in ("/", "/config", "/gradio_api/info", "/nowhere", "/static/js/iframeResizer.contentWindow.min.js"):
        headers = client.get(path, headers={"Origin": str(client.base_url)}).headers
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control")]
        policy = headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "script-src 'self'" in policy
        assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


LOCAL, LAN, ALL = ("127.0.0.1", 7860), ("192.168.1.5", 7860), ("0.0.0.0", 7860)


@pytest.mark.parametrize(
    ("bound", "known", "unknown"),
    [
        (
            LOCAL,
            ["127.0.0.1:7860", "localhost:7860", "LOCALHOST:7860", "[::1]:7860"],
            ["evil.example", "evil.example:7860", "127.0.0.1", "localhost:80", "localhost.evil.example:7860", "",
             "localhost:7860.evil.example", "localhost:7860:7860", "127.0.0.1.nip.io:7860", "127.0.0.1:78600",
             "localhost :7860", "localhost:7860/", "user@localhost:7860", "0.0.0.0:7860", "192.168.1.5:7860"],
        ),
        (LAN, ["192.168.1.5:7860"], ["localhost:7860", "192.168.1.6:7860", "192.168.1.5"]),
        (ALL, ["10.0.0.3:7860", "localhost:8080", "[fe80::1]:7860"], ["evil.example:7860", "999.1.1.1:7860"]),
    ],
)  # fmt: skip
def test_the_page_is_known_by_the_names_it_has_and_by_no_other(bound, known, unknown):
    hosts = Hosts(*bound, ["name.example", "other.example:444"])
    assert all(name in hosts for name in (*known, "name.example", "Name.example:1", "other.example:444"))
    assert not [name for name in (*unknown, "other.example", "x.name.example", "name.example.") if name in hosts]


async def _answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"access-control-allow-origin", b"*")]})
    await send({"type": "http.response.body", "body": b"in"})


async def _status(token, path="/", **headers):
    transport = httpx.ASGITransport(Gate(_answer, Hosts(*LOCAL), token))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7860") as client:
        return (await client.get(path, headers=headers)).status_code


@pytest.mark.parametrize(
    ("token", "path", "headers", "status"),
    [
        (None, "/", {}, 200),
        (None, "/", {"Host": "evil.example:7860"}, 421),
        (None, "/config", {"Origin": "http://localhost:7860"}, 200),
        (None, "/config", {"Origin": "http://evil.example"}, 403),
        (None, "/config", {"Origin": "http://localhost:3000"}, 403),
        (None, "/config", {"Origin": "null"}, 403),
        (None, "/config", {"Origin": ""}, 403),
        (None, "/config", {"Sec-Fetch-Site": "cross-site"}, 403),
        (None, "/config", {"Sec-Fetch-Site": "same-site"}, 403),
        (None, "/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        (None, "/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ("secret", "/", {}, 401),
        ("secret", "/?token=secre", {}, 401),
        ("secret", "/?token=%F0%9F%98%80", {}, 401),
        ("secret", "/?token=secret", {}, 200),
        ("secret", "/config", {"Cookie": "vlabs-page-7860=secret"}, 200),
        ("secret", "/config", {"Cookie": "vlabs-page-7861=secret"}, 401),
        ("secret", "/config", {"Cookie": "vlabs-page-7860="}, 401),
    ],
)
def test_who_comes_from_elsewhere_or_without_the_token_is_refused(token, path, headers, status):
    import asyncio

    assert asyncio.run(_status(token, path, **headers)) == status


def test_a_page_for_others_asks_for_its_token_and_keeps_it_in_a_cookie(tmp_path, browser):
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    with serving("--host", "0.0.0.0", "--port", 0, python=warm_python(), **environment) as open_to_all:
        assert "everyone who knows this address" in "".join(open_to_all.lines)
        with httpx.Client(base_url=open_to_all.address) as client:
            assert client.get("/").status_code == 401
            assert client.get("/config").status_code == 401
            answer = client.get(f"/{open_to_all.token}")
            cookie = answer.headers["set-cookie"].lower()
            assert "httponly" in cookie
            assert "samesite=strict" in cookie
            assert client.get("/config").status_code == 200
        page = open_page(browser, f"{open_to_all.address}/{open_to_all.token}")
        assert page.url == f"{open_to_all.address}/"
        assert list(tmp_path.glob("vlabs-page-*"))
        open_to_all.send_signal(signal.SIGHUP)  # the terminal is closed
        assert open_to_all.wait(90) == 128 + signal.SIGHUP
    assert not list(tmp_path.glob("vlabs-page-*"))


JOIN = "/gradio_api/queue/join"


def test_a_request_that_is_none_is_one_sentence(server, client):
    number = function_of(client, "ask")
    good = request_of(number, "session", None, "Why?", "norm", 1, "", 1, "none")
    for body in (
        b"", b"[" * 60_000, b"{" * 60_000, b'"text"', b"\xff\xfe", b'{"data": 1e999999',
        json.dumps(good)[:-1].encode(),
        *(json.dumps(good | change).encode() for change in (
            {"fn_index": None}, {"fn_index": 10**30}, {"fn_index": -1}, {"fn_index": "1"}, {"fn_index": True},
            {"data": None}, {"data": []}, {"data": [1] * 8}, {"data": {"0": 1}}, {"session_hash": None},
            {"session_hash": "../x"}, {"session_hash": "x" * 65}, {"session_hash": ["a"]}, {"session_hash": "\ud800"},
        )),
    ):  # fmt: skip
        answer = client.post(JOIN, content=body)
        assert answer.status_code in (400, 422), body[:80]
        assert "\n" not in answer.json()["detail"]
    for url in (JOIN, "/gradio_api/cancel"):
        assert client.post(url, content=b"[" + b"[]," * 2**15).status_code == 413  # values take much more than text
        assert client.post(url, content=(b" " * 2**14 for _ in range(40))).status_code == 413  # no length is announced
    form = "multipart/form-data; boundary=x"
    for kind, body in (
        (form, b"--x\r\nContent-Disposition: form-data\r\n\r\n"), (form, b"\0" * 500), (form, b""),
        ("text/plain", b"x"), ("multipart/form-data", b"x"),
        (form, b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--x--\r\n'),
        (form, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 5000 + b"\r\n--x--\r\n"),
    ):  # fmt: skip
        answer = client.post("/gradio_api/upload", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400, body[:80]
    for query in ("", "?session_hash=x", "?session_hash=%00", "?session_hash=" + "x" * 5000):
        assert client.get(f"/gradio_api/queue/data{query}").status_code in (404, 422)
    assert "Traceback" not in "".join(server.lines)


def test_uploads_are_bounded_and_nothing_of_them_or_of_broken_ones_stays(tmp_path):
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    with (
        serving("--max-megabytes", 0.1, python=warm_python(), **environment) as small,
        httpx.Client(base_url=small.address) as client,
    ):
        taken = [
            client.post("/gradio_api/upload", files={"files": ("a.png", bytes(size))}).status_code
            for size in (50_000, 500_000)
        ]
        assert taken == [200, 413]
        folder = next(tmp_path.glob("vlabs-page-*"))
        assert [path.stat().st_size for path in folder.glob("[!.]*") if path.is_file()] == [50_000]
        hostile = Hostile(small.address, b"", 0)
        for _ in range(3):
            hostile._broken(client, 0, [])
        assert client.get("/config").status_code == 200
        assert [path.stat().st_size for path in folder.glob("[!.]*") if path.is_file()] == [50_000]
        assert small.address.startswith("http://127.0.0.1:")
        small.kill()
        small.wait()
    assert folder.exists()
    # The next one removes what the killed one left, and what it makes itself.
    other = tmp_path / "vlabs-page-of-a-user"
    other.mkdir()
    with serving(python=warm_python(), **environment) as started:
        with httpx.Client(base_url=started.address) as client:
            upload(client, CONTENTS[0])
        started.send_signal(signal.SIGINT)
        assert started.wait(90) == 130
    assert [path.name for path in tmp_path.glob("vlabs-page-*")] == [other.name]


def test_connections_that_ask_nothing_are_in_nobodys_way(server):
    host, port = server.address.removeprefix("http://").split(":")
    opened = [socket.create_connection((host, int(port)), 5) for _ in range(250)]
    for one in opened:
        with suppress(OSError):
            one.sendall(b"GET / HT")
    assert httpx.get(f"{server.address}/config", timeout=20).status_code == 200
    time.sleep(0.5)
    closed = 0
    for one in opened:
        one.setblocking(False)
        try:
            closed += one.recv(1) == b""
        except BlockingIOError:
            pass
        except ConnectionError:
            closed += 1
        one.close()
    assert closed >= 140


def test_a_folder_of_any_name_is_searched_and_an_index_of_another_model_is_not(tmp_path):
    folder = tmp_path / "\udcff<b>"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    given = {"search_ckpt": "scenes_search", "images": [str(folder)], "index": tmp_path / "index", "device": "cpu"}
    arguments = argparse.Namespace(**given, tokenizer=None, on_bad="error")
    next(iter(_searches(arguments, True))).encode()  # as the form does
    index = next((tmp_path / "index").glob("*/*.safetensors"))
    with safetensors.safe_open(index, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    said = "holds no images as this model sees them: remove it"
    of_another = (({}, said), ({"cls": torch.zeros(1, 3)}, said), ({"cls": tensors["cls"] * torch.nan}, "not finite"))
    for other, message in of_another:
        safetensors.torch.save_file(tensors | other if other else {}, index, metadata=metadata)
        with pytest.raises(UserError, match=message):
            _searches(arguments, True)


def test_an_upload_folder_that_somebody_removed_is_one_line(tmp_path):
    uploads = Uploads(tmp_path / "folder", Limits())
    for _ in range(2):
        with pytest.raises(UserError, match="no room for the image"):
            uploads.take(b"picture")


def test_an_upload_is_gone_after_ten_minutes_and_a_full_folder_takes_no_more(tmp_path, monkeypatch):
    uploads = Uploads(tmp_path, Limits(megabytes=0.001))
    name, now = uploads.take(b"picture"), time.monotonic()
    assert uploads.read(name) == b"picture"
    small = tmp_path.parent / f"{tmp_path.name}.png"
    small.write_bytes(b"example")
    kept = uploads.keep(small)
    monkeypatch.setattr(time, "monotonic", lambda: now + KEPT + 1)
    with pytest.raises(UserError, match="no longer here"):
        uploads.read(name)
    uploads.remove_old()
    assert not list(tmp_path.iterdir())
    assert uploads.read(kept) == b"example"
    for _ in range(100):
        uploads.take(bytes(1048))
    with pytest.raises(UserError, match="try again"):
        uploads.take(bytes(1000))
    assert KEPT < 600


def test_a_folder_that_another_page_works_in_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    program = "from vlabs.page.uploads import own_folder\nwith own_folder() as f: print(f, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    there = other.stdout.readline().strip()
    with own_folder() as own:
        assert own.stat().st_mode & 0o077 == 0
        assert os.path.exists(there)
    assert not own.exists()
    other.kill()
    other.wait()
    with own_folder():
        assert not os.path.exists(there)
    monkeypatch.undo()


def png_of(width, height):
    """A small PNG file that says it has so many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def of_many_scans(scans, side):
    """A small progressive JPEG that is drawn so often."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * scans + content[-2:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(1200, 1000), "1200 x 1000 pixels"),
        (png_of(90_000, 90_000), "million pixels"),
        (png_of(100, 100), "not a complete image"),
        (CONTENTS[0][:800], "not a complete image"),
        (b"%PDF-1.4", "JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "JPEG, PNG"),
        (b"", "JPEG, PNG"),
    ],
    ids=["pixels", "bomb", "png without pixels", "truncated", "pdf", "eps", "empty"],
)
def test_images_that_are_too_large_or_none_are_one_line(content, message):
    with pytest.raises(UserError, match=message):
        decode(content, 1)


def test_an_image_is_turned_as_its_camera_says():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), 30).size == (20, 40)


def test_an_image_that_takes_too_long_is_given_up_and_the_next_is_decoded():
    decoder = Decoder(megapixels=30, seconds=1)
    decoder.decode(CONTENTS[0])
    first = decoder._process.pid
    began = time.monotonic()
    with pytest.raises(UserError, match="more than 1 s"):
        decoder.decode(of_many_scans(2000, 3000))
    assert time.monotonic() - began < 3
    assert np.array_equal(decoder.decode(CONTENTS[0]), decode(CONTENTS[0], 30))
    assert decoder._process.pid != first
    # And where the process ends by itself.
    decoder._process.kill()
    decoder._process.wait()
    assert decoder.decode(CONTENTS[1]).size == (64, 64)
    process = decoder._process
    decoder.close()
    assert process.poll() is not None


def test_the_process_that_decodes_ends_with_the_one_that_asked_and_takes_no_more_memory_than_it_may():
    program = (
        "import os\nfrom vlabs.page.decoder import Decoder, _MEMORY\nd = Decoder(1, 5)\nd._running()\n"
        "print(d._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(started.stdout)
    limits = ""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/limits") as file:
                limits = file.read()
            time.sleep(0.05)
        except OSError:
            break
    else:
        raise AssertionError("it is still there")
    assert not limits or re.search(r"Max address space +\d{9} ", limits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": None}, "no image yet"),
        ({"picture": ["a"]}, "no longer here"),
        ({"picture": "/nowhere.png"}, "no longer here"),
        ({"questions": " \n "}, "no question yet"),
        ({"questions": None}, "no question yet"),
        ({"questions": 7}, "must be a text"),
        ({"questions": ["Why?"]}, "must be a text"),
        ({"questions": "Why \ud800?"}, "not valid Unicode"),
        ({"questions": "Why?\n" * 4}, "4 questions, but only 3"),
        ({"questions": "w" * 61}, "61 characters"),
        ({"other": "w" * 61}, "61 characters"),
        ({"other": {"a": 1}}, "must be a text"),
        ({"other": "\udc80"}, "not valid Unicode"),
        *(({"alpha": value}, "α must be a number from 0 to 20") for value in (
            float("nan"), float("inf"), -1, 1e308, 10**400, "3", True, [], {"a": 1},
        )),
        *(({"keep": value}, "share of the patches must be") for value in (0, 1.5, "1", True, float("nan"))),
        *(({"second_look": value}, "look is one of none, crop, masked") for value in ("zoom", 1, ["crop"], {})),
        *(({"map_name": value}, "no such map") for value in ("heat", None, 3, ["norm"], {}, "\ud800")),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line(in_page, change, message):
    asked = {"picture": in_page.picture, "questions": "Why?", "map_name": "weights", "alpha": None, "other": ""}
    said = in_page.ask(**asked | change)
    assert said.startswith("<p class='error'")
    assert message in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": None}, "no image yet"),
        ({"texts": " "}, "no text yet"),
        ({"texts": ["a"]}, "must be a text"),
        ({"texts": "a red square " * 4 + "a a a"}, "17 tokens"),
        ({"map_name": ["relevance"]}, "no such map"),
        ({"map_name": "fusion"}, "no such map"),
    ],
)
def test_what_cannot_be_looked_for_is_one_line(in_page, change, message):
    asked = {"picture": in_page.picture, "texts": "a red square", "map_name": "relevance"}
    assert in_page.look(**asked).count("<figure class='card'") == 1
    said = in_page.look(**asked | change)
    assert said.startswith("<p class='error'")
    assert message in said


def test_a_search_that_cannot_be_done_is_one_line(client):
    number = function_of(client, "find")
    for n, (folder, query, count, message) in enumerate(
        (
            ("/etc", "a cross", 3, "no such folder"),
            (None, "a cross", 3, "no such folder"),
            (["scenes"], "a cross", 3, "no such folder"),
            ("scenes", "", 3, "no text"),
            ("scenes", None, 3, "no text"),
            ("scenes", "\ud800", 3, "not valid Unicode"),
            ("scenes", "w" * 501, 3, "501 characters"),
            *(("scenes", "a cross", count, "number of images must be") for count in (0, 25, -1, "3", None, True, [3])),
        )
    ):
        body = json.dumps(request_of(number, f"finder{n}", folder, query, count))
        assert client.post(JOIN, content=body).status_code == 200
        assert message in list(listen(client, f"finder{n}"))[-1]["output"]["data"][0]


def test_what_a_user_types_is_text_and_no_html(in_page):
    said = in_page.ask(in_page.picture, "<script>alert(1)</script>", "norm", 3.0, "<b>x</b>")
    assert "<script>" not in said
    assert "&lt;script&gt;" in said
    assert "&lt;b&gt;x&lt;/b&gt;" in said


def test_a_second_look_is_shown_beside_the_first(in_page, predictor):
    said = in_page.ask(in_page.picture, QUESTIONS[1], "norm", None, "", None, "crop")
    before, after = re.search("<i>at first</i>(.*?)</div>.*<i>after a second look</i>(.*?)</div>", said).groups()
    found = predictor.answer(Image.open(PICTURES[0]), [QUESTIONS[1]], map_name="norm", second_look="crop")[0]
    for shown, answers in ((before, found.before), (after, found.answers)):
        assert re.findall("'score'>(.*?)<", shown) == [f"{share:.1%}" for _, share in answers]
    assert "at first" not in in_page.ask(in_page.picture, QUESTIONS[1], "norm", None, "", None, "none")


def test_alpha_and_keep_of_a_request_are_of_that_request_alone(in_page, predictor):
    arguments = in_page.picture, QUESTIONS[1], "norm"
    before = in_page.ask(*arguments, None, "")
    assert in_page.ask(*arguments, 0.0, "") != before
    assert in_page.ask(*arguments, None, "") == before
    assert in_page.ask(*arguments, predictor.alpha, "") == before
    assert in_page.ask(*arguments, None, "", 0.25) != before
    assert in_page.ask(*arguments, None, "", 1) == before == in_page.ask(*arguments, None, "")


def test_two_threads_ask_one_model_with_other_alphas_priors_and_maps(predictor):
    def ask(alpha, other, map_name):
        answer = predictor.answer(PICTURES[1], QUESTIONS, map_name=map_name, alpha=alpha, prior_of=other)
        return [one.answers for one in answer], [one.map.tolist() for one in answer]

    kinds = [(None, None, "gradient"), (0.0, None, "norm"), (3.0, "Is it red?", "rollout"), (20.0, None, "cls")]
    alone = [ask(*kind) for kind in kinds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: ask(*kinds[n % 4]), range(40)))
    assert together == alone * 10


@pytest.mark.parametrize("alpha", [float("nan"), float("-inf"), 10**400, "3", True])
def test_an_alpha_that_is_no_number_is_refused(predictor, alpha):
    with pytest.raises(UserError, match="alpha must be a number"):
        predictor.answer(PICTURES[1], ["Why?"], alpha=alpha)
    with pytest.raises(UserError, match="no map 'heat'"):
        predictor.answer(PICTURES[1], ["Why?"], map_name="heat")


def test_the_line_works_on_what_somebody_waits_for_one_at_a_time_and_in_order():
    import asyncio

    line, begun, at_work = Line(4), [], threading.Semaphore(1)

    def job(name):
        def work():
            assert at_work.acquire(blocking=False)
            begun.append(name)
            time.sleep(0.05)
            at_work.release()
            return [name]

        return work

    threading.Thread(target=line.work, daemon=True).start()

    async def results(session):
        return [m["output"]["data"] async for m in line.listen(session) if m["msg"] == "process_completed"]

    async def gone(session):
        async for message in line.listen(session):
            if message["msg"] == "process_starts":
                return

    async def run():
        for n in range(9):  # nobody listens for these, and they are in nobody's way
            line.join(f"unheard{n}", job("unheard"))
        line.join("a", job("a1"))
        line.join("b", job("b1"))
        line.join("a", job("a2"))
        assert await asyncio.gather(results("a"), results("b")) == [[["a1"], ["a2"]], [["b1"]]]
        gone_job = line.join("gone", job("gone1"))
        line.join("gone", job("gone2"))
        await gone("gone")
        line.leave("someone", gone_job)
        line.join("d", job("d"))
        assert await results("d") == [["d"]]
        assert not line.knows("d")
        assert not line.knows("unheard0")

    asyncio.run(run())
    assert begun == ["a1", "b1", "a2", "gone1", "d"]


def test_a_full_line_takes_no_more():
    import asyncio

    line = Line(2)

    async def run():
        listening = []
        for session in ("a", "b"):
            line.join(session, list)
            listening.append(asyncio.create_task(anext(line.listen(session))))
            await listening[-1]
        with pytest.raises(UserError, match="2 requests are already waiting"):
            line.join("c", list)

    asyncio.run(run())


def test_an_example_of_your_own_has_the_questions_of_the_text_beside_it(tmp_path):
    assert questions_beside(tmp_path / "street.jpg") == ""
    (tmp_path / "street.txt").write_text("Is it open?\nWhat is left of it?\n", encoding="utf-8-sig")
    assert questions_beside(tmp_path / "street.jpg") == "Is it open?\nWhat is left of it?"


def test_wrong_options_are_one_line(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "street.jpg").write_bytes(CONTENTS[0])
    (tmp_path / "own" / "street.txt").write_bytes(b"\xff")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "street.jpg").write_bytes(CONTENTS[0][:-500])
    for arguments, parts in (
        (["--pictures", "own"], ["own/street.txt", "UTF-8"]),
        (["--pictures", "cut"], ["cut/street.jpg", "not a whole image"]),
        (["--images", "."], ["--search-ckpt"]),
        (["--pictures", "nowhere"], ["--pictures nowhere"]),
        (["--max-megapixels", 0], ["--max-megapixels"]),
        (["--max-megabytes", "inf"], ["--max-megabytes"]),
        (["--ckpt", "nowhere"], ["nowhere"]),
        (["--host", "192.0.2.1"], ["--host 192.0.2.1", "name another"]),
        (["--host", "a" * 70 + ".example"], ["--host aaa", "name another"]),
        (["--port", 99999], ["--port", "99999"]),
        (["--allow-host", "http://name.example/"], ["--allow-host http://name.example/"]),
        (["--allow-host", "*"], ["--allow-host *"]),
    ):
        assert_one_line_error(command("vlabs.demo_page", *arguments, cwd=tmp_path), *parts)
    assert not list(tmp_path.glob("vlabs-page-*"))


def test_a_colored_rectangle_is_shown_at_a_size_for_people(in_page):
    file = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(file, "PNG")
    said = in_page.ask(in_page.uploads.take(file.getvalue()), "What is it?", "weights", None, "")
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"src='data:image/jpeg;base64,([^']*)'", said)[1])))
    assert shown.size == (448, 336)  # all of it


def test_a_photograph_is_shown_whole_and_at_its_own_size_with_what_the_model_was_trained_on(in_page):
    file = io.BytesIO()
    Image.new("RGB", (1200, 800), "red").save(file, "JPEG")
    said = in_page.ask(in_page.uploads.take(file.getvalue()), "Is the zebra red?", "fusion", None, "")
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in re.findall(r"base64,([\w+/=]*)", said)]
    assert sizes == [(1024, 683)] * 2  # the image, and the map over it
    assert "its training never had: zebra" in said
    assert "need not sum to 100%" in said
    assert in_page.predictor.checkpoint.training.endswith("vqa on scenes (160,000 questions, 20,000 images)")
