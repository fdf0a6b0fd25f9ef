"""The page itself, by Gradio: a form and what `vlabs.page.answers` says. Importing this imports Gradio."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlabs.attention.maps import MAPS, default_map
from vlabs.page.answers import Page

# Read when Gradio is imported: uploads lie in a folder of this process's own, and nobody is told that it runs.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="vlabs-page-")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

# Seconds: how often uploads are looked through, and how old they get.
_LOOK, _KEEP = 60, 600
_WAITING = 100  # requests in line; more are told to come back
_CSS = """
.cards { display: flex; flex-wrap: wrap; gap: 16px; margin-bottom: 16px; }
.card { flex: 0 1 30%; min-width: 170px; max-width: 260px; margin: 0; }
.card img { width: 100%; border-radius: 6px; display: block; }
.card ol { list-style: none; margin: 6px 0 0; padding: 0; }
.card li { position: relative; padding: 1px 6px; font-size: 14px; display: flex; justify-content: space-between; }
.card .bar { position: absolute; inset: 1px auto 1px 0; background: var(--primary-200); border-radius: 3px; }
.card .text, .card .score { position: relative; z-index: 1; }
.card .score { font-variant-numeric: tabular-nums; margin-left: 8px; }
.card .other { color: #b45309; font-size: 13px; margin: 2px 0 0; }
.legend { color: var(--body-text-color-subdued); font-size: 13px; margin-top: 8px; }
.error { color: #b91c1c; font-weight: 600; }
"""
_FONTS = ["system-ui", "sans-serif"]


def _path(payload: Any) -> str | None:
    """The file of an upload, which Gradio itself would decode before anything is known of its size."""
    return None if payload is None else str(payload.path)


def build(page: Page, title: str, examples: Sequence[tuple[Path, str]], no_search: str) -> gr.Blocks:
    """The page.

    Args:
        page: what answers.
        title: a line about the model.
        examples: pictures to begin with, each with questions.
        no_search: why there is no search, where there is none.
    """
    model, alpha = page.predictor.model, page.predictor.alpha
    one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # α is the model's: one request at a time
    with gr.Blocks(title="vlabs", analytics_enabled=False, delete_cache=(_LOOK, _KEEP)) as blocks:
        gr.Markdown(f"## vlabs\n{title}")
        with gr.Tab("Ask"), gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard"], label="Picture", height=220, elem_id="picture"
                )
                picture.preprocess = _path  # type: ignore[method-assign,assignment]
                questions = gr.Textbox(label="Questions, one a line", lines=3, elem_id="questions")
                with gr.Accordion("Where it looks", open=True):
                    known = [name for name in MAPS if name != "weights" or model.prior is not None]
                    map_name = gr.Radio(known, value=default_map(model), label="Map", elem_id="map")
                    strength = gr.Slider(
                        0, 2 * (alpha or 1), value=alpha or 0, label="α, strength of the top-down signal",
                        visible=alpha is not None, elem_id="alpha",
                    )  # fmt: skip
                    other = gr.Textbox(
                        label="ξ of another question", visible=model.prior is not None, elem_id="other",
                        placeholder="empty: every question steers by its own ξ",
                    )  # fmt: skip
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=5):
                answers = gr.HTML(elem_id="answers")
                if examples:
                    rows = [[str(path), text] for path, text in examples]
                    gr.Examples(rows, [picture, questions], label="Pictures to begin with", examples_per_page=12)
        given = [picture, questions, map_name, strength, other]

        def ask(picture: str | None, questions: str, map_name: str, strength: float, other: str) -> str:
            return page.ask(picture, questions, map_name, strength if alpha is not None else None, other)

        button.click(ask, given, answers, api_name="ask", **one)
        questions.submit(ask, given, answers, api_visibility="private", **one)
        for control in (map_name, strength):
            event = control.release if isinstance(control, gr.Slider) else control.input

            def again(*values: Any) -> str:
                return ask(*values) if values[0] is not None and values[1].strip() else ""

            event(again, given, answers, api_visibility="private", show_progress="hidden", **one)
        with gr.Tab("Search"):
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
                search.click(page.find, [folder, query, count], found, api_name="find", **one)
                query.submit(page.find, [folder, query, count], found, api_visibility="private", **one)
            else:
                gr.Markdown(no_search)
    return blocks.queue(max_size=_WAITING)


def serve(blocks: gr.Blocks, host: str, port: int | None, megabytes: float, ready: Any) -> None:
    """Serve the page until Ctrl-C; uploads are removed at the end.

    Args:
        host, port: where; any port from 7860 on if not given.
        megabytes: the largest upload.
        ready: is called with the address once it answers.
    """
    with ExitStack() as at_end:
        at_end.callback(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            max_file_size=int(megabytes * 2**20), footer_links=[], run_history=False, css=_CSS,
            theme=gr.themes.Default(font=_FONTS, font_mono=["monospace"]),
        )  # fmt: skip
        at_end.callback(blocks.close, verbose=False)
        ready(address)
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        ended.wait()
