"""The page itself: a form by Gradio, and what `vlabs.page.answers` says. Importing this imports Gradio."""

from __future__ import annotations

import html
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlabs.attention.maps import default_map
from vlabs.page.answers import LEAST_KEPT, Page
from vlabs.page.connection import Connection
from vlabs.page.hosts import Hosts, in_address, is_loopback
from vlabs.page.line import Line
from vlabs.page.server import make_app

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI

_WAITING = 100  # requests in line; more are told to come back
_CONNECTIONS = 200  # that are worked for at once; each may hold a picture that somebody is slow to take
_CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 16px; margin-bottom: 16px; }
.card, .picture { max-width: 420px; margin: 0; }
.card img, .picture img { width: 100%; border-radius: 6px; display: block; }
.card ol { list-style: none; margin: 6px 0 0; padding: 0; }
.card li { position: relative; padding: 1px 6px; font-size: 14px; display: flex; justify-content: space-between; }
.card .bar { position: absolute; inset: 1px auto 1px 0; background: var(--primary-200); border-radius: 3px; }
.card .text, .card .score { position: relative; z-index: 1; }
.card .score { font-variant-numeric: tabular-nums; margin-left: 8px; }
.card .other, .warning { color: #b45309; font-size: 13px; margin: 2px 0 0; }
.scale { display: inline-block; width: 80px; height: 10px; border-radius: 3px;
  background: linear-gradient(90deg, #00224e, #575d6d, #a59c74, #fee838); }
.legend { color: var(--body-text-color-subdued); font-size: 13px; margin-top: 8px; }
.error { color: #b91c1c; font-weight: 600; }
"""
_FONTS = ["system-ui", "sans-serif"]


def build(page: Page, title: str, examples: Sequence[tuple[Path, str]], no_search: str) -> gr.Blocks:
    """The page.

    Args:
        page: what answers.
        title: a line about the model.
        examples: pictures to begin with, each with questions.
        no_search: why there is no search, where there is none.
    """
    model, alpha = page.predictor.model, page.predictor.alpha
    # Values come and go as they are: what a client sends is looked at by the page and by nothing of Gradio's.
    raw: dict[str, Any] = {"preprocess": False, "postprocess": False}
    with gr.Blocks(title="vlabs", analytics_enabled=False) as blocks:
        gr.Markdown(f"## vlabs\n{title}")
        training = html.escape(page.predictor.checkpoint.training)
        gr.HTML(f"<p>The training of this model: {training}.</p>", elem_id="about")
        with gr.Tab("Ask"), gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard"], label="Picture", height=220, elem_id="picture"
                )
                questions = gr.Textbox(label="Questions, one a line", lines=3, elem_id="questions")
                with gr.Accordion("Where it looks", open=True):
                    map_name = gr.Radio(
                        page.maps,
                        value=default_map(model),
                        label="Map",
                        elem_id="map",
                        info="What says where it looks.",
                    )
                    strength = gr.Slider(
                        0, page.most_alpha, value=alpha or 0, label="α, strength of the top-down signal",
                        visible=alpha is not None, elem_id="alpha", info="0: no top-down signal.",
                    )  # fmt: skip
                    other = gr.Textbox(
                        label="ξ of another question", visible=model.prior is not None, elem_id="other",
                        placeholder="empty: every question steers by its own ξ",
                        info="ξ is what a question asks the image encoder to look for.",
                    )  # fmt: skip
                    share = gr.Slider(
                        LEAST_KEPT, 1, value=model.vision.keep, label="Share of the patches that are looked at twice",
                        visible=not model.vision.needs_all, elem_id="keep", info="Those most like ξ; fewer are faster.",
                    )  # fmt: skip
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=5):
                answers = gr.HTML(elem_id="answers")
                if examples:
                    begins = [(_file(page.uploads.keep(path)), text) for path, text in examples]
                    shown = gr.Dataset(
                        components=[picture, questions], samples=[[None, ""] for _ in begins],
                        label="Pictures to begin with", samples_per_page=12, type="index",
                    )  # fmt: skip
                    shown.samples = [list(one) for one in begins]
        given = [picture, questions, map_name, strength, other, share]

        def ask(picture: Any, questions: Any, map_name: Any, strength: Any, other: Any, share: Any) -> str:
            name = picture.get("path") if isinstance(picture, dict) else picture
            strength = strength if alpha is not None else None
            return page.ask(name, questions, map_name, strength, other, None if model.vision.needs_all else share)

        if examples:

            def begin(number: Any, *how: Any) -> tuple[Any, str, str]:
                if type(number) is not int or not 0 <= number < len(begins):
                    return None, "", ""
                file, text = begins[number]
                return file, text, ask(file, text, *how) if text else ""

            def first(*how: Any) -> tuple[Any, str, str]:
                return begin(0, *how)

            how, all_of_it = [map_name, strength, other, share], [picture, questions, answers]
            shown.click(begin, [shown, *how], all_of_it, api_visibility="private", show_progress="hidden", **raw)
            blocks.load(first, how, all_of_it, api_visibility="private", show_progress="hidden", **raw)
        button.click(ask, given, answers, api_name="ask", **raw)
        questions.submit(ask, given, answers, api_visibility="private", **raw)
        for control in (map_name, strength, share):
            event = control.release if isinstance(control, gr.Slider) else control.input

            def again(*values: Any) -> str:
                return ask(*values) if values[0] and values[1] else ""

            event(again, given, answers, api_visibility="private", show_progress="hidden", **raw)
        with gr.Tab("Search"):
            for training in dict.fromkeys(search.checkpoint.training for search in page.searches.values()):
                gr.HTML(f"<p>The training of the model that searches: {html.escape(training)}.</p>")
            if page.searches:
                with gr.Row():
                    query = gr.Textbox(
                        label="Text", scale=4, elem_id="query", placeholder="A purple star right of a cross."
                    )
                    names = list(page.searches)
                    folder = gr.Dropdown(names, value=names[0], label="Folder", scale=2)
                    count = gr.Slider(1, 24, value=6, step=1, label="Pictures", scale=1)
                search = gr.Button("Search", variant="primary", elem_id="search")
                found = gr.HTML(elem_id="found")
                search.click(page.find, [folder, query, count], found, api_name="find", **raw)
                query.submit(page.find, [folder, query, count], found, api_visibility="private", **raw)
            else:
                gr.Markdown(no_search)
    return blocks


def _file(name: str) -> dict[str, Any]:
    """A picture as Gradio's form has it."""
    return {"path": name, "url": f"/gradio_api/file={name}", "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def serve(page: Page, blocks: gr.Blocks, listener: socket.socket, host: str, others: Sequence[str], ready: Any) -> None:
    """Serve the page until Ctrl-C.

    Args:
        page, blocks: what answers, and the form.
        listener: where, bound already.
        host: that it is bound to; where others reach it, they need a token.
        others: more names that the page may be asked by.
        ready: is called with the address once it answers.
    """
    port = listener.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    # All in the background of the process: Gradio's own server, queue and files are not used.
    form = gr.mount_gradio_app(
        FastAPI(), blocks, "/", footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False,
        mcp_server=False, css=_CSS, theme=gr.themes.Default(font=_FONTS, font_mono=["monospace"]),
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
