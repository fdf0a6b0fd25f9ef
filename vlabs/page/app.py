"""The page: a Gradio form for `vlabs.page.answers`. Importing this module imports Gradio."""

from __future__ import annotations

import html
import json
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlabs.attention import LOOK_MAPS, MAPS, VIEWS
from vlabs.attention.maps import default_map
from vlabs.errors import printable
from vlabs.page.about import About
from vlabs.page.answers import NO_VIEW, Page
from vlabs.page.connection import Connection
from vlabs.page.hosts import Hosts, in_address, is_loopback
from vlabs.page.line import Line
from vlabs.page.server import make_app

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI

_WAITING = 100  # largest number of requests in the queue; more are refused
_CONNECTIONS = 200  # largest number of open connections; each may hold an image for a slow client
_PAST = 12  # answers that a tab remembers
# For answers: the values of sliders become CSS variables, and a download link takes the map of its card.
_SCRIPT = """
element.addEventListener("input", ({target}) => {
  element.style.setProperty("--" + target.name, target.value);
  for (const one of element.querySelectorAll(`[name=${target.name}]`)) one.value = target.value;
});
element.addEventListener("click", ({target}) => {
  if (target.className === "save") target.href = target.closest("figure").querySelector("img").src;
});
"""
# The history stays in its browser tab: all values of the form with the answers, newest first.
_REMEMBER = """(...all) => {
  const cards = new DOMParser().parseFromString(all.at(-1), "text/html").querySelectorAll(".card");
  if (!cards.length) return;
  const said = Array.from(cards, (card) => card.querySelector("b").textContent + " " +
    card.querySelector(".text").textContent);
  globalThis.asked = [{shown: {url: cards[0].querySelector("img").src}, said: said.join("; "), all},
    ...(globalThis.asked ?? [])].slice(0, MOST);
  if (innerWidth < 700) document.querySelector("#answers").scrollIntoView({behavior: "smooth"});
  return {__type__: "update", samples: asked.map(({shown, said}) => [shown, said])};
}""".replace("MOST", str(_PAST))
_PRIOR = "- **ξ** is what a question asks the image encoder to look for: one vector, computed from the text."
_ALPHA = "- **α** is how strongly the patches that are similar to ξ are fed back, for a second look at the image."
_MAP = "- A **map** shows where the model looked, in one of several senses:"
_FONTS = ["system-ui", "sans-serif"]
# Gradio passes values through unchanged: only the page checks and reads what a client sends.
_RAW: dict[str, Any] = {"preprocess": False, "postprocess": False}
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(
    page: Page, model: About, searcher: About | None, examples: Sequence[tuple[Path, str]], texts: Sequence[str]
) -> gr.Blocks:
    """Build the page.

    Args:
        page: answers the requests.
        model: the model that answers questions.
        searcher: the model that searches, if any.
        examples: example images, each with questions.
        texts: example texts for the search.
    """
    with gr.Blocks(title=f"vlabs: {model.name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# vlabs\nAsk about an image. The question tells the image encoder what to look for "
            "([AbSViT](https://arxiv.org/abs/2303.13043)), and the page shows where it looked."
        )
        with gr.Tab("Ask"):
            _show_about(model, "answers here")
            _ask(page, [(_file(page.uploads.keep(path)), text) for path, text in examples])
        with gr.Tab("Search"):
            if searcher is not None:
                _show_about(searcher, "searches here")
                _search(page, texts)
            else:
                gr.Markdown(
                    "There is nothing to search: start with `--search-ckpt` of a model trained on captions and "
                    "`--images FOLDER`."
                )
        with gr.Tab("Look"):
            _look(page)
    return blocks


def _show_about(model: About, does: str) -> None:
    said = f"The model <b>{html.escape(model.name)}</b> {does}. Its training: {html.escape(model.training)}."
    gr.HTML(f"<p>{said}</p><p>{html.escape(model.limits)}</p>", elem_classes="about")
    with gr.Accordion(f"The card of {model.name}: how it was made, how good it is, its limits", open=False):
        gr.Markdown(model.card, elem_classes="model")


def _ask(page: Page, begins: Sequence[tuple[dict[str, Any], str]]) -> None:
    """The tab for questions; `begins` are example images with questions, and the first is answered at load."""
    model, alpha = page.predictor.model, page.predictor.alpha
    examples = gr.Dataset(
        components=["image"], samples=[[None] for _ in begins], type="index", samples_per_page=24,
        label="Examples: click one to ask", visible=bool(begins), elem_id="examples",
    )  # fmt: skip
    examples.samples = [[file] for file, _ in begins]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="Image", height=220, elem_id="picture"
            )
            questions = gr.Textbox(label="Questions, one per line", lines=2, elem_id="questions")
            button = gr.Button("Ask", variant="primary", elem_id="ask")
            how = _how(page)
        with gr.Column(scale=5, min_width=300):
            answers = gr.HTML(elem_id="answers", js_on_load=_SCRIPT)
            with gr.Accordion(f"History of this tab: the last {_PAST}; click one to show it again", open=False):
                past = gr.Dataset(
                    components=["image", "textbox"], headers=["map", "questions and answers"], samples=[],
                    type="index", show_label=False, elem_id="past",
                )  # fmt: skip
    given = [picture, questions, *how]

    def ask(
        picture: Any, questions: Any, map_name: Any, strength: Any, other: Any, share: Any, second_look: Any
    ) -> str:
        name = picture.get("path") if isinstance(picture, dict) else picture
        strength = strength if alpha is not None else None
        share = None if model.vision.needs_all else share
        return page.ask(name, questions, map_name, strength, other, share, second_look)

    def again(*values: Any) -> str:
        return ask(*values) if values[0] and values[1] else ""

    def begin(number: Any, typed: Any, *how: Any) -> tuple[Any, Any, str]:
        if type(number) is not int or not 0 <= number < len(begins):
            return None, "", ""
        file, text = begins[number][0], begins[number][1] or typed
        return file, text, again(file, text, *how)

    if begins:  # the first example is answered once, for all visitors
        picture.value, questions.value, answers.value = begin(0, "", *(control.value for control in how))
    for event in (
        examples.click(begin, [examples, questions, *how], [picture, questions, answers], **_QUIET, **_RAW),
        button.click(ask, given, answers, api_name="ask", **_RAW),
        questions.submit(ask, given, answers, api_visibility="private", **_RAW),
    ):
        event.then(None, [*given, answers], past, js=_REMEMBER, **_QUIET)
    for control in how:
        if not isinstance(control, gr.Textbox):
            changed = control.release if isinstance(control, gr.Slider) else control.input
            changed(again, given, answers, **_QUIET, **_RAW)
    past.click(None, past, [*given, answers], js="(number) => asked[number].all", **_QUIET)


def _how(page: Page) -> list[Any]:
    """Advanced controls, folded: map, α, ξ of another question, share of the patches, a second look."""
    model, alpha = page.predictor.model, page.predictor.alpha
    with gr.Accordion("Where it looks: maps, α and ξ", open=False, elem_id="how"):
        gr.Markdown("\n".join([_PRIOR] * (model.prior is not None) + [_ALPHA] * (alpha is not None) + [_MAP]))
        return [
            gr.Radio(
                [(f"{name}: {MAPS[name]}", name) for name in page.maps], value=default_map(model), label="Map",
                elem_id="map",
            ),
            gr.Slider(
                0, page.most_alpha, value=alpha or 0, label="α, strength of the top-down signal",
                visible=alpha is not None, elem_id="alpha", info="0: no top-down signal.",
            ),
            gr.Textbox(
                label="ξ of another question", visible=model.prior is not None, elem_id="other",
                placeholder="empty: each question steers with its own ξ",
                info="The answer of the model if it is told to look for something else.",
            ),
            gr.Slider(
                page.least_kept, 1, value=model.vision.keep, label="Share of the patches in the second pass",
                visible=not model.vision.needs_all, elem_id="keep", info="Those most similar to ξ; fewer are faster.",
            ),
            gr.Radio(
                [("none", NO_VIEW), *((f"{name}: {what}", name) for name, what in VIEWS.items())], value=NO_VIEW,
                label="A second look", elem_id="second", info="The model answers again; both answers are joined.",
            ),
        ]  # fmt: skip


def _search(page: Page, texts: Sequence[str]) -> None:
    """The tab for searching images; `texts` are examples."""
    with gr.Row():
        query = gr.Textbox(label="Text", scale=4, min_width=300, elem_id="query")
        names = list(page.searches)
        folder = gr.Dropdown(names, value=names[0], label="Folder", scale=2)
        count = gr.Slider(1, page.limits.pictures, value=6, step=1, label="Images", scale=2)
    examples = gr.Dataset(
        components=["textbox"], samples=[[text] for text in texts], label="Examples: click one to search",
        visible=bool(texts), elem_id="texts",
    )  # fmt: skip
    button = gr.Button("Search", variant="primary", elem_id="search")
    found = gr.HTML(elem_id="found", js_on_load=_SCRIPT)
    given = [folder, query, count]
    button.click(page.find, given, found, api_name="find", **_RAW)
    query.submit(page.find, given, found, api_visibility="private", **_RAW)
    chosen = examples.click(None, examples, query, js=f"(number) => {json.dumps(texts)}[number]", **_QUIET)
    chosen.then(page.find, given, found, api_visibility="private", **_RAW)


def _look(page: Page) -> None:
    """The tab for a model of transformers."""
    looker = page.looker
    if looker is None:
        gr.Markdown(
            "There is no model to look into: start with `--look openai/clip-vit-base-patch32`, or another CLIP, "
            "SigLIP, BLIP or ViLT of transformers."
        )
        return
    what = "Questions" if looker.looks.answers else "Texts"
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML(f"<p>Where does <b>{html.escape(printable(looker.name))}</b> look?</p>", elem_classes="about")
            picture = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="Image", height=220, elem_id="looked-image"
            )
            texts = gr.Textbox(label=f"{what}, one per line", lines=2, elem_id="looked-texts")
            chosen = gr.Radio(
                [(f"{name}: {LOOK_MAPS[name]}", name) for name in looker.maps], value=looker.maps[0], label="Map"
            )
            button = gr.Button("Look", variant="primary", elem_id="look")
        with gr.Column(scale=5, min_width=300):
            seen = gr.HTML(elem_id="looked", js_on_load=_SCRIPT)

    def look(picture: Any, texts: Any, map_name: Any) -> str:
        return page.look(picture.get("path") if isinstance(picture, dict) else picture, texts, map_name)

    given = [picture, texts, chosen]
    button.click(look, given, seen, api_name="look", **_RAW)
    texts.submit(look, given, seen, api_visibility="private", **_RAW)


def _file(name: str) -> dict[str, Any]:
    """An image in the form that Gradio's page uses."""
    return {"path": name, "url": f"/gradio_api/file={name}", "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def serve(page: Page, blocks: gr.Blocks, listener: socket.socket, host: str, others: Sequence[str], ready: Any) -> None:
    """Serve the page until Ctrl-C.

    Args:
        page, blocks: the page, and its form.
        listener: a bound socket.
        host: the host that it is bound to; if other machines can reach it, they need a token.
        others: further names of the page, see `Hosts`.
        ready: called with the address when the page is ready.
    """
    port = listener.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    # Gradio is used only for the form: its own server, queue and file routes are not.
    theme = gr.themes.Default(primary_hue="indigo", font=_FONTS, font_mono=["monospace"])
    form = gr.mount_gradio_app(
        FastAPI(), blocks, "/", footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False,
        mcp_server=False, css_paths=Path(__file__).with_name("page.css"), theme=theme,
    )  # fmt: skip
    functions = {n: (one.fn, len(one.inputs)) for n, one in blocks.fns.items() if one.fn is not None}
    line = Line(_WAITING)
    app = make_app(form, functions, line, page.uploads, Hosts(host, port, others), token)
    config = uvicorn.Config(
        app, http=Connection, ws="none", log_level="error", server_header=False, timeout_graceful_shutdown=1,
        limit_concurrency=_CONNECTIONS, backlog=_CONNECTIONS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    running = threading.Thread(target=server.run, args=([listener],), daemon=True)
    with ExitStack() as at_end:
        at_end.callback(running.join, 3)
        at_end.callback(setattr, server, "should_exit", True)
        running.start()
        name = "localhost" if host in ("", "0.0.0.0", "::") else in_address(host)
        ready(f"http://{name}:{port}/{'' if token is None else f'?token={token}'}")
        line.work()
