"""A model card, filled from a run folder and a checkpoint: data, metrics, command, license."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.errors import UserError
from vlabs.utils.plain import parse_config, parse_json, read_text

_PIPELINES = {"vqa": "visual-question-answering", "classify": "image-classification"}
_USES = {
    "vqa": 'vlabs.load("{name}").answer("picture.jpg", ["What is it?"])',
    "snli_ve": 'vlabs.load("{name}").answer("picture.jpg", ["A dog is asleep."])',
    "nlvr2": 'vlabs.load("{name}").answer(["left.jpg", "right.jpg"], ["Both pictures show a dog."])',
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(
    checkpoint: Checkpoint,
    run: Path | None,
    name: str,
    license: str | None = None,
    metrics: Sequence[Path] = (),
    picture: str | None = None,
) -> ModelCard:
    """Write the card of a model.

    Args:
        checkpoint: the model.
        run: its run folder, if it has one.
        name: the name by which it will be loaded: `user/name`, or a folder.
        license: its license by the hub's names, e.g. `apache-2.0`; None if unknown.
        metrics: `metrics.json` files of `vlabs evaluate`, or folders with one.
        picture: a file beside the card that it shows.

    Raises:
        UserError: a file of metrics cannot be read.
    """
    summary, environment = (_read(run / file) for file in ("summary.json", "environment.json")) if run else ({}, {})
    found = [_metrics(path) for path in metrics]
    last = str(checkpoint.data.get("name") or "?")
    best = {key.removeprefix("best/"): value for key, value in summary.items() if key.startswith("best/")}
    results = [
        EvalResult(
            task_type=_PIPELINES.get(checkpoint.task, checkpoint.task),
            dataset_type=str(values.get("data") or last),
            dataset_name=f"{values.get('data') or last} ({values.get('split', 'val')})",
            metric_type=key,
            metric_value=round(value, 4),
        )
        for values in found
        for key, value in values.items()
        if isinstance(value, float)
    ]
    base = _base(run)
    data = ModelCardData(
        license=license,
        base_model=[weights for weights in base.values() if _HUB_NAME.fullmatch(weights)] or None,
        library_name="vlabs",
        pipeline_tag=_PIPELINES.get(checkpoint.task),
        tags=["vlabs", "absvit", checkpoint.task],
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )
    network: Any = checkpoint.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    lines = [
        f"# {name.rsplit('/', 1)[-1]}",
        "",
        f"A {type(network).__name__} of vlabs for the task `{checkpoint.task}`, {parameters / 1e6:.1f} M parameters.",
        "",
        "```python",
        "import vlabs",
        "",
        _USES.get(checkpoint.task, 'vlabs.VisionLanguageModel.from_pretrained("{name}")').format(name=name),
        "```",
        "",
        *([f"![An example]({picture})", ""] if picture else []),
        "## Training",
        "",
        f"- data: {checkpoint.training}",
    ]
    lines += [f"- {part} started from: `{weights}`" for part, weights in base.items()]
    if "command" in summary:
        lines.append(f"- command: `{summary['command']}`")
    if isinstance(summary.get("steps"), int):
        lines.append(f"- {summary['steps']:,} steps, {summary.get('epochs', '?')} epochs")
    if environment:
        packages = environment.get("packages") or {}
        versions = ", ".join(f"{one} {packages[one]}" for one in ("torch", "timm", "transformers") if one in packages)
        lines.append(f"- with vlabs {environment.get('vlabs', '?')}, {versions}, on {environment.get('device', '?')}")
    lines += ["", "## Metrics", ""]
    rows = [("val, best of training", key, value) for key, value in best.items() if isinstance(value, float)]
    rows += [
        (f"{values.get('data', '')} {values.get('split', '')}".strip(), key, value)
        for values in found
        for key, value in values.items()
        if isinstance(value, float)
    ]
    lines += ["| on | metric | value |", "| --- | --- | --- |"] if rows else ["None were measured."]
    lines += [f"| {on} | {key} | {value:.2f} |" for on, key, value in rows]
    lines += [
        "",
        "## Input",
        "",
        f"Images of {checkpoint.preprocessing.image_size} pixels per side; `preprocessing.json` and `tokenizer.json` "
        "define how images and texts are read. Nothing in these files is executed when they are loaded.",
        "",
        "## Limits",
        "",
        _limits(checkpoint),
        "",
        f"License: {license or 'unknown; ask who trained it'}.",
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _base(run: Path | None) -> dict[str, str]:
    """The weights that a run started from, by part: the encoders, or `model` for those of `init=`."""
    if run is None or not (path := run / "config.yaml").is_file():
        return {}
    try:
        config = parse_config(read_text(path), str(path))
    except UserError:
        return {}
    if isinstance(init := config.get("init"), str):
        return {"model": Path(init).name if Path(init).is_absolute() else init}
    model = config.get("model")
    parts = model if isinstance(model, dict) else {}
    found = {
        part: options.get(option)
        for part, option in (("vision", "weights"), ("text", "name_or_path"))
        if isinstance(options := parts.get(part), dict)
    }
    # Where a local file lay is nobody's business.
    return {
        part: Path(name).name if Path(name).is_absolute() else name
        for part, name in found.items()
        if isinstance(name, str)
    }


def _limits(checkpoint: Checkpoint) -> str:
    """What follows from how a model was made; the page shows it beside answers."""
    side, names = checkpoint.preprocessing.image_size, len(checkpoint.preprocessing.names)
    chosen = (
        f"It always chooses among {names:,} {'answers' if checkpoint.task == 'vqa' else 'names'}. " if names else ""
    )
    return (
        f"Its training: {checkpoint.training}. How good it is on other images and texts was not measured unless a "
        f"table says so. {chosen}It sees an image as {side} × {side} pixels, so that small things are lost."
    )


def _metrics(path: Path) -> dict[str, Any]:
    path = path / "metrics.json" if path.is_dir() else path
    found = _read(path)
    if not found:
        raise UserError(f"--metrics {path}: there are no metrics of `vlabs evaluate` in it")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_text(path), str(path), finite=False)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
