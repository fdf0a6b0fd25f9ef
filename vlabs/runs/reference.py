"""All options, for `--help` and the page docs/options.md, read from the source.

The sentence of an option is in the docstring (`Args` or `Attributes`) of the class or function that a config's
`_target_` names, its type is in the signature (`vlabs.utils.options`), and its value in the config. The source is
parsed, because importing it would take seconds.

    python -m vlabs.runs.reference > docs/options.md
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from vlabs import attention
from vlabs.runs.groups import choices
from vlabs.utils import options
from vlabs.utils.options import as_given, in_words

_COLUMN = 44  # the column where sentences begin
_PARTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("Training: options of no group", "train", "", ("",)),
    ("Tasks", "train", "task", ()),
    ("Recipes", "train", "task/recipe", ("finetune",)),
    ("Data", "train", "data", ()),
    ("Models", "train", "model", ("mini", "classifier", "segmenter")),
    ("Image encoders", "train", "model/vision", ("mini", "base")),
    ("Text encoders", "train", "model/text", ("mini", "roberta_base")),
    ("Fusion", "train", "model/fusion", ("base",)),
    ("Ways to steer", "train", "model/topdown", ()),
    ("Callbacks", "train", "callbacks", ()),
    ("Trainer", "train", "trainer", ("default",)),
    ("Loggers", "train", "logger", ()),
    ("Evaluation: options of no group", "evaluate", "", ("",)),
    ("Evaluations", "evaluate", "evaluation", ()),
    ("Rankers", "evaluate", "ranker", ()),
)
"""Parts of the reference page: title, program, group, and the choices that together have all options (empty: all)."""
_INTRODUCTION = """# Options

Every option of every group. `vlabs train --help` and `vlabs evaluate --help` print the options of your choices, with
their values. An option that the config of a choice does not list takes a plus: `+OPTION=VALUE`. This page is generated:
`python -m vlabs.runs.reference > docs/options.md`.
"""
logging.getLogger("griffe").setLevel(logging.CRITICAL)  # it warns about docstrings with two arguments on a line


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        sentence: its meaning.
        values: the allowed values in words; "" if any value is allowed.
    """

    sentence: str
    values: str

    def __str__(self) -> str:
        return f"{self.sentence} ({self.values})" if self.sentence and self.values else self.sentence or self.values


@dataclass(frozen=True)
class Section:
    """The options of one class or function.

    Attributes:
        name: the part of the config, such as `task.recipe`.
        target: import path of the class or function; "" for options of the program.
        options: options and their values, by name within the section.
    """

    name: str
    target: str
    options: dict[str, tuple[Option, Any]]


def help_text(config_name: str, overrides: Sequence[str], config_dir: str) -> str:
    """The text of `--help`: the groups and their choices, then all options of the current choices.

    Args:
        config_name: the program's config.
        overrides: the overrides of the command line.
        config_dir: folder of the configs.
    """
    config = _composed(config_name, overrides, config_dir)
    width = min(shutil.get_terminal_size((100, 0)).columns, 120)
    lines = [str(config.hydra.help.header).strip(), "", "Groups, one choice each (* is chosen now):", ""]
    chosen = {name.removeprefix("evaluation@"): str(choice) for name, choice in config.hydra.runtime.choices.items()}
    for group, names in _groups(list(config.hydra.runtime.choices)):
        marked = ", ".join(f"{name}*" if name == chosen.get(group) else name for name in names)
        lines += textwrap.wrap(marked, width, initial_indent=f"  {group + '=':16}", subsequent_indent=" " * 18)
    lines += ["", "Options of these choices, with their current values (an option that is not listed takes a +):"]
    for section in sections(config):
        lines += ["", section.name or "(no group)"]
        for name, (option, value) in section.options.items():
            start = f"  {f'{section.name}.{name}'.lstrip('.')}={_short(value)}"
            if len(start) >= _COLUMN or not str(option):
                lines.append(start)
                start = ""
            lines += textwrap.wrap(
                str(option), width, initial_indent=f"{start:{_COLUMN}}", subsequent_indent=" " * _COLUMN
            )
    return "\n".join(lines)


def page(config_dir: str) -> str:
    """The reference page in Markdown: all options of all choices of all groups, each once.

    Args:
        config_dir: folder of the configs.
    """
    lines = [_INTRODUCTION]
    for title, program, group, names in _PARTS:
        chosen = names or tuple(choices(group))
        several = len(chosen) > 1
        lines += [f"## {title}", ""]
        lines += [f"| option | value | meaning |{' of |' if several else ''}", "|---" * (3 + several) + "|"]
        for (name, said), values in _by_option(program, group, chosen, config_dir).items():
            shown = " or ".join(f"`{value}`" for value in dict.fromkeys(values.values()))
            of_choices = f" {'all' if len(values) == len(chosen) else ', '.join(values)} |" if several else ""
            lines.append(f"| `{name}` | {shown} | {said} |{of_choices}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _by_option(
    program: str, group: str, chosen: Sequence[str], config_dir: str
) -> dict[tuple[str, str], dict[str, str]]:
    """The values of a group's options, by name and sentence, then by choice."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    part = group.replace("evaluation", "task").replace("model/topdown", "model/vision/topdown").replace("/", ".")
    for choice in chosen:
        whole = f"[{choice}]" if group == "callbacks" else choice
        given = [f"{group.replace('evaluation', 'evaluation@task')}={whole}"] if group else []
        for section in sections(_composed(program, given, config_dir)):
            if not _is_of(section.name, part):
                continue
            for name, (option, value) in section.options.items():
                said = str(option).replace("|", "\\|")
                found.setdefault((f"{section.name}.{name}".lstrip("."), said), {})[choice] = _short(value)
    return found


def _is_of(section: str, part: str) -> bool:
    """Whether a section belongs to a part of the reference page, and has no part of its own."""
    elsewhere = ("task.recipe", "model.vision", "model.text", "model.fusion")
    return section == part or (part != "" and section.startswith(f"{part}.") and not section.startswith(elsewhere))


def _composed(program: str, overrides: Sequence[str], config_dir: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir, version_base="1.3"):
        return compose(program, list(overrides), return_hydra_config=True)


def sections(config: DictConfig) -> Iterator[Section]:
    """The options of a composed config, the program's own first."""
    content: Any = OmegaConf.to_container(config, resolve=False)
    content.pop("hydra", None)
    own = dict(_known("vlabs.runs.values.ProgramOptions", content))
    yield Section("", "", own)
    for name in ("task", "data", "model", *content):
        is_listed = any(one.startswith(f"{name}.") for one in own)
        if isinstance(part := content.pop(name, None), dict) and not is_listed:
            yield from _sections(name, part, "vlabs.runs.values.Ranker" if name == "ranker" else "")


def _sections(name: str, part: dict[str, Any], owner: str = "") -> Iterator[Section]:
    target = str(part.get("_target_") or owner)
    found = dict(_known(target, part))
    if found:
        yield Section(name, target, found)
    for inner, value in part.items():
        if isinstance(value, dict) and not any(one.startswith(f"{inner}.") for one in found):
            yield from _sections(f"{name}.{inner}", value)


def _known(target: str, part: dict[str, Any]) -> Iterator[tuple[str, tuple[Option, Any]]]:
    """The options of a part, without those of its inner sections."""
    known = options_of(target) if target else {}
    for name, value in part.items():
        if str(name).startswith("_"):
            continue
        if not isinstance(value, dict):
            yield str(name), (known.get(str(name), Option("", "")), value)
        elif "_target_" not in value and name in known:
            kinds = options_of(_kind_of(target, str(name)))
            for inner, one in value.items():
                yield f"{name}.{inner}", (kinds.get(str(inner), known[str(name)]), one)


@functools.cache
def options_of(target: str) -> dict[str, Option]:
    """The options of a class, or of a function and its returned class, by name; empty if the source is not found.

    Args:
        target: import path, as in `_target_`.
    """
    found = _find(target)
    if found is None:
        return {}
    if isinstance(found, griffe.Function):
        return _merged(options_of(_resolve(found, str(found.returns))), _declared(found.parameters, found))
    known: dict[str, Option] = {}
    for base in found.bases:
        known = _merged(known, options_of(_resolve(found, str(base))))
    hands_on = found.members.get("hands_on")
    for name in re.findall(r"\w+", str(hands_on.value)) if isinstance(hands_on, griffe.Attribute) else ():
        known = _merged(known, options_of(_resolve(found, name)))
    maker = found.members.get("__init__")
    if isinstance(maker, griffe.Function):
        return _merged(known, _declared(maker.parameters, found, maker))
    fields = [one for one in found.members.values() if isinstance(one, griffe.Attribute) and one.annotation is not None]
    fields = [one for one in fields if "ClassVar" not in str(one.annotation) and "property" not in one.labels]
    return _merged(known, _declared(fields, found))


def _merged(known: dict[str, Option], more: dict[str, Option]) -> dict[str, Option]:
    """Merge the options of a base with those of a subclass. A sentence such as "as in Base" does not replace any."""
    kept = {
        name: Option(known[name].sentence, option.values)
        for name, option in more.items()
        if name in known and (not option.sentence or option.sentence.startswith(("As in", "As for", "Of ")))
    }
    return known | more | kept


def _declared(arguments: Any, *of: griffe.Object) -> dict[str, Option]:
    """Arguments or fields as options, with their sentences from docstrings."""
    said: dict[str, str] = {}
    for one in of:
        for section in one.docstring.parse("google") if one.docstring else ():
            if section.kind.value in ("parameters", "attributes"):
                said |= {name: item.description for item in section.value for name in item.name.split(", ")}
    names = [one for one in arguments if one.name != "self" and not one.name.startswith("_")]
    return {
        one.name: Option(_first_sentence(said.get(one.name, "")), _values(str(one.annotation)))
        for one in names
        if "variadic" not in str(getattr(one, "kind", ""))
    }


def _first_sentence(text: str) -> str:
    plain = " ".join(text.split()).replace("`", "")
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        plain = re.sub(rf"\b{python}\b", yaml, plain)
    first = re.split(r"(?<!\be\.g)(?<!\bEq)\.(?=\s|$)", plain)[0]
    is_name = text.startswith("`") or not re.match(r"[a-z]+[ ,;(]", first)
    return first if is_name else first[:1].upper() + first[1:]


def _values(annotation: str) -> str:
    """The values that an annotation allows, in words; "" if there is no limit."""
    annotation = re.sub(r"^dict\[str, (.+?)\]", r"\1", annotation)
    try:
        said = in_words(eval(annotation, vars(options) | vars(attention) | {"Path": str}))
    except (NameError, TypeError, SyntaxError):
        return ""
    return said if re.search(r"one of|least|above|[\[(]\d", said) else ""


def _kind_of(target: str, name: str) -> str:
    """The annotated class of the argument `name` of a class or function."""
    found = _find(target)
    maker = found.members.get("__init__", found) if isinstance(found, griffe.Class) else found
    for one in getattr(maker, "parameters", None) or getattr(maker, "attributes", {}).values():
        if one.name == name and found is not None:
            return _resolve(found, str(one.annotation).split(" ")[0])
    return _kind_of(_resolve(found, str(found.returns)), name) if isinstance(found, griffe.Function) else ""


def _find(path: str) -> griffe.Class | griffe.Function | None:
    module, _, name = path.rpartition(".")
    found = _module(module) if module else None
    one = None if found is None else found.members.get(name)
    if isinstance(one, griffe.Alias):
        return _find(one.target_path)
    return one if isinstance(one, griffe.Class | griffe.Function) else None


def _resolve(within: griffe.Object, name: str) -> str:
    try:
        return within.resolve(name)
    except griffe.NameResolutionError:
        return ""


@functools.cache
def _module(name: str) -> griffe.Module | None:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # for a top-level name this imports nothing
    places = list(spec.submodule_search_locations or ()) if spec else []
    stem = Path(places[0], *rest) if places else Path(spec.origin if spec and spec.origin else top).with_suffix("")
    for file in (stem / "__init__.py", stem.with_suffix(".py")):
        if file.is_file():
            return griffe.visit(name, file, file.read_text(encoding="utf-8"))
    return None


def _groups(chosen: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The groups of a program, with all their choices. Of Hydra's own, only the launcher is a choice to make."""
    if "experiment" in chosen:  # a program that trains
        yield "callbacks", ["[default]*", *(f"[default,{one}]" for one in choices("callbacks") if one != "default")]
        yield "hydra/launcher", ["basic", *choices("hydra/launcher")]
    for name in sorted(name for name in chosen if not name.startswith("hydra/")):
        group = name.partition("@")[0]
        names = choices(group)
        if len(names) > 1 and "base" not in group.split("/"):
            yield name.removeprefix("evaluation@"), names


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(as_given, value))}]"
    return as_given(value)


if __name__ == "__main__":
    from vlabs.runs.groups import config_dir

    print(page(config_dir()), end="")
