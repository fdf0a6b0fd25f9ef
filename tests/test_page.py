"""The web page: in a real browser, under many clients at once, and given what it must refuse."""

import concurrent.futures
import html
import io
import re
import struct
import zlib

import pytest
from conftest import assert_one_line_error, command
from page_server import BROWSER, NO_BROWSER, browsing, give_picture, open_page, serving
from PIL import Image

import vlabs
from vlabs.errors import UserError
from vlabs.page.answers import Page, example_pictures
from vlabs.page.uploads import Limits, read_upload

PICTURES = example_pictures()
QUESTIONS = ["What color is the hollow object?", "Which color is the star?"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page of the models that come with vlabs."""
    folder = tmp_path_factory.mktemp("page")
    with serving("--index", folder / "index", HOME=str(folder), TMPDIR=str(folder)) as started:
        started.folder = folder
        yield started


@pytest.fixture(scope="module")
def predictor():
    return vlabs.load("scenes")


@pytest.fixture(scope="module")
def in_page(predictor):
    """The page's answers without its server."""
    return Page(predictor, {}, Limits(megabytes=1, megapixels=1, questions=3, characters=60))


@pytest.fixture
def browser():
    if BROWSER is None:
        pytest.skip(NO_BROWSER)
    with browsing() as opened:
        yield opened


def best(predictor, question, **options):
    return predictor.answer(PICTURES[1], [question], **options)[0].answers[0][0]


def test_a_browser_asks_searches_and_sees_what_a_wrong_prior_does(server, predictor, browser, tmp_path):
    page = open_page(browser, server.address)
    (tmp_path / "notes.png").write_text("not a picture")
    give_picture(page, tmp_path / "notes.png")
    page.fill("#questions textarea", "\n".join(QUESTIONS))
    page.click("#ask")
    page.wait_for_selector("#answers .error")
    said = page.inner_text("#answers .error")
    assert "no picture that is known here" in said
    assert "\n" not in said
    # The next picture replaces it.
    page.click("#picture button[aria-label='Remove Image']")
    give_picture(page, PICTURES[1])
    page.click("#ask")
    page.wait_for_selector("#answers .card")
    cards = page.query_selector_all("#answers .card")
    assert [card.query_selector("b").inner_text() for card in cards] == QUESTIONS
    assert [card.query_selector(".text").inner_text() for card in cards] == [best(predictor, q) for q in QUESTIONS]
    maps = [card.query_selector("img").get_attribute("src") for card in cards]
    assert maps[0] != maps[1]
    # Another question's ξ: the cards below are what the model says under it.
    other = "What shape is the blue object?"
    page.fill("#other textarea, #other input", other)
    page.click("#ask")
    page.wait_for_selector("#answers .other")
    last = page.query_selector_all("#answers .card")[-1]
    assert last.query_selector(".text").inner_text() == best(predictor, QUESTIONS[1], prior_of=other)
    assert last.query_selector(".text").inner_text() != best(predictor, QUESTIONS[1])
    # Another map of the same answers, without asking anew.
    page.click("#map label:has-text('norm')")
    page.wait_for_function("document.querySelector('#answers .legend').innerText.includes('norm')")
    page.click("button[role=tab]:has-text('Search')")
    page.fill("#query textarea, #query input", "A small hollow green cross lies left of a large blue cross.")
    page.click("#search")
    page.wait_for_selector("#found .card")
    assert page.inner_text("#found .card figcaption").split()[1] == PICTURES[1].name
    assert page.elsewhere == []


def test_fifty_requests_of_eight_clients_are_all_answered_and_none_is_mixed_up(server, predictor):
    from gradio_client import Client, handle_file

    asked = [(n % len(PICTURES), QUESTIONS[n % 2]) for n in range(50)]
    clients = [Client(server.address, verbose=False) for _ in range(8)]

    def ask(n):
        picture, question = asked[n]
        return clients[n % 8].predict(handle_file(PICTURES[picture]), question, "weights", 10, "", api_name="/ask")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(50)))
    for (picture, question), answer in zip(asked, answers, strict=True):
        expected = predictor.answer(PICTURES[picture], [question])[0]
        assert re.findall(r"class='text'>([^<]*)<", answer) == [html.escape(text) for text, _ in expected.answers]


def test_a_file_above_the_limit_is_not_taken_and_uploads_go_with_the_server(tmp_path):
    import httpx

    with serving("--max-megabytes", 0.1, HOME=str(tmp_path), TMPDIR=str(tmp_path)) as small:
        taken = [
            httpx.post(f"{small.address}/gradio_api/upload", files={"files": ("a.png", bytes(size))}).status_code
            for size in (50_000, 500_000)
        ]
        assert taken == [200, 413]
        folder = next(tmp_path.glob("vlabs-page-*"))
        assert [path for path in folder.rglob("*") if path.name == "a.png"]
        assert small.address.startswith("http://127.0.0.1:")
    assert not folder.exists()
    assert not list(tmp_path.rglob("a.png"))


def png_of(width, height):
    """A small PNG file that says it has so many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(1200, 1000), "1200 x 1000 pixels"),
        (png_of(90_000, 90_000), "million pixels"),
        (png_of(100, 100), "no whole picture"),
        (PICTURES[0].read_bytes()[:800], "no whole picture"),
        (b"%PDF-1.4", "JPEG, PNG"),
        (b"", "JPEG, PNG"),
        (bytes(2**20 + 1), "1.0 MB"),
    ],
    ids=["pixels", "bomb", "png without pixels", "truncated", "pdf", "empty", "bytes"],
)
def test_pictures_that_are_too_large_or_none_are_one_line(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_upload(tmp_path / "file", Limits(megabytes=1, megapixels=1))


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "phone.jpg", exif=exif)
    assert read_upload(tmp_path / "phone.jpg", Limits()).size == (20, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": None}, "no picture yet"),
        ({"questions": " \n "}, "no question yet"),
        ({"questions": "Why?\n" * 4}, "4 questions, and 3"),
        ({"questions": "w" * 61}, "61 characters"),
        ({"other": "w" * 61}, "61 characters"),
        ({"picture": "/nowhere.png"}, "no longer here"),
    ],
)
def test_what_cannot_be_answered_is_one_line(in_page, change, message):
    asked = {"picture": str(PICTURES[0]), "questions": "Why?", "map_name": "weights", "alpha": None, "other": ""}
    said = in_page.ask(**asked | change)
    assert said.startswith("<p class='error'")
    assert message in said


def test_what_a_user_types_is_text_and_no_html(in_page):
    said = in_page.ask(str(PICTURES[0]), "<script>alert(1)</script>", "norm", 3.0, "<b>x</b>")
    assert "<script>" not in said
    assert "&lt;script&gt;" in said
    assert "&lt;b&gt;x&lt;/b&gt;" in said


def test_alpha_of_a_request_is_gone_with_it(in_page, predictor):
    arguments = str(PICTURES[0]), QUESTIONS[1], "norm"
    before = in_page.ask(*arguments, None, "")
    assert in_page.ask(*arguments, 0.0, "") != before
    assert in_page.ask(*arguments, None, "") == before
    assert in_page.ask(*arguments, predictor.alpha, "") == before


def test_wrong_options_are_one_line(tiny_run, tmp_path):
    for arguments, parts in (
        (["--images", "."], ["--search-ckpt"]),
        (["--pictures", "nowhere"], ["--pictures nowhere"]),
        (["--max-megapixels", 0], ["--max-megapixels"]),
        (["--ckpt", "nowhere"], ["nowhere"]),
        (["--host", "192.0.2.1"], ["--host 192.0.2.1", "name another"]),
        (["--port", 99999], ["--port 99999"]),
    ):
        assert_one_line_error(command("vlabs.demo_page", *arguments, cwd=tmp_path), *parts)
    assert not list(tmp_path.glob("vlabs-page-*"))


def test_a_colored_rectangle_is_shown_at_a_size_for_people(in_page, tmp_path):
    Image.new("RGB", (32, 24), "red").save(tmp_path / "tiny.png")
    said = in_page.ask(str(tmp_path / "tiny.png"), "What is it?", "weights", None, "")
    import base64

    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^']*)'", said)[1])))
    assert shown.size == (448, 448)
