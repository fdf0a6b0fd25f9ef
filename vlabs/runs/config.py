"""Run Hydra programs: paths need no quotes, and every error is one sentence."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from vlabs.errors import UserError, fail, fault, foreseen, run_cli
from vlabs.runs.folders import remove_empty, will_make
from vlabs.runs.groups import choices, config_dir
from vlabs.runs.trusted import check_config
from vlabs.runs.values import check_values, may_be_new
from vlabs.utils.files import replacing
from vlabs.utils.options import HYDRAS
from vlabs.utils.plugins import import_modules


def run_hydra(
    main: Callable[[DictConfig], Any],
    config_name: str,
    renamed: Mapping[str, str] | None = None,
    prepare: Callable[[list[str]], list[str]] = list,
    check_first: Callable[[DictConfig], None] | None = None,
) -> None:
    """Run `main(config)` as a Hydra program. Every error becomes one line and exit status 1.

    Args:
        main: the function to run.
        config_name: name of its config file.
        renamed: groups with a shorter name on the command line: `{"task": "evaluation@task"}`.
        prepare: turns the arguments of the command line into Hydra's.
        check_first: checks a config without importing anything large, before all else; not the configs of a sweep.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them, so that we can
    renamed = renamed or {}

    def tell(error: Exception) -> NoReturn:
        text = _sentence(error)
        if text and isinstance(error, OSError) and (option := _option_of(error)):
            text = f"{option}: {text}"
        for short, group in renamed.items():
            text = text and text.replace(f"there is no {group.split('@')[0]}=", f"there is no {short}=")
        fail(error, text)

    @functools.wraps(main)
    def guarded(config: DictConfig) -> Any:
        will_make(HydraConfig.get().runtime.output_dir)  # by Hydra, just now
        try:
            with open_dict(config):  # `import` belongs to this command line, not to the run's config
                modules = config.pop("import", None) or []
            import_modules([modules] if isinstance(modules, str) else modules)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                if check_first is not None:
                    check_first(config)
                check(config)  # before anything is written; in a sweep each run checks its own config
            return main(config)
        except Exception as error:
            tell(error)  # here, because Hydra adds its own lines to exceptions that reach it

    program = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(guarded)

    def run() -> None:
        if {"-h", "--help"} & {*sys.argv[1:]}:
            try:
                _print_help(config_name, [_rename(item, renamed) for item in sys.argv[1:]])
            except Exception as error:
                tell(error)
            return
        given = hydra_arguments([_rename(item, renamed) for item in prepare(_without_dashes(sys.argv[1:]))])
        sys.argv[1:] = check_config(given, config_name, Path(config_dir()))
        try:
            for item in given:
                if named := re.match(r"\+*hydra\.(?:run|sweep)\.dir=(.+)", item):
                    will_make(path_of(named[1]))
            program()
        except Exception as error:
            tell(error)
        finally:
            remove_empty()  # a start that was refused leaves nothing behind

    run_cli(run)


def _print_help(config_name: str, given: Sequence[str]) -> None:
    from vlabs.runs.reference import help_text

    chosen = [item for item in given if re.match(r"[\w/@.]+=", item) and not item.startswith(("resume=", "import="))]
    if {"-m", "--multirun"} & {*given}:  # options that are swept over have no single value
        chosen = [item for item in chosen if "," not in item and "(" not in item]
    print(help_text(config_name, chosen, config_dir()))


def _without_dashes(arguments: Sequence[str]) -> list[str]:
    """Turn `--ckpt RUN` and `--ckpt=RUN` into `ckpt=RUN`, likewise any other option that is not a flag of Hydra's."""
    flags = get_args_parser()._option_string_actions
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[a-z]\w*", name) or name in flags:
            result.append(argument)
            continue
        if not equals and not (value := next(rest, "")):
            raise UserError(f"{name} has no value: pass {name.removeprefix('--')}=VALUE")
        result.append(f"{name.removeprefix('--')}={value}")
    return result


def _rename(argument: str, renamed: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return f"{renamed[name]}={value}" if equals and name in renamed else argument


_PATHS = re.compile(
    r"\+{0,2}(?:.*\.)?(?:ckpt|init|resume|dir|raw_dir|subdir|tokenizer|instances|several|imagenet_c|human_maps"
    r"|name_or_path|weights|sets\.[^.]+)"
)
"""Options whose value is or may be a path."""


_WITH_VALUE = (
    *("--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"),
    *("--info", "-i", "--experimental-rerun"),
)
"""Hydra's flags whose value is the next argument."""


def hydra_quoted(value: str | Path) -> str:
    """Quote a string, such as a path, so that Hydra reads it back unchanged in an override."""
    return QuotedString(str(value), Quote.single).with_quotes()


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Quote the paths of a command line for Hydra: `ckpt=runs/lr=0.1` becomes `ckpt='runs/lr=0.1'`.

    A value that exists on disk is always a path. Otherwise a value that Hydra can read stays, with quotes, escapes and
    `${...}`, and with `-m` a comma separates the values of a sweep. `~` is the home folder. Flags may stand between
    options; Hydra wants them together, so they are moved to the front.
    """
    sweeping = any(argument in ("-m", "--multirun") for argument in arguments)
    flags: list[str] = []
    result: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or before in _WITH_VALUE:
            flags.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if equals and _PATHS.fullmatch(name) and value:
            may = sweeping and not name.startswith("hydra.")  # options of hydra have one value for the whole sweep
            several = may and "," in value and not _is_there(value) and not value.startswith(("choice(", "["))
            values = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", value) if several else [value]
            argument = f"{name}={','.join(_as_path(name, one, may) for one in values)}"
        result.append(argument)
    return flags + result


def as_given(argument: str) -> str:
    """Remove the quotes that `hydra_arguments` has put around the path of an override."""
    name, equals, value = argument.partition("=")
    plain_value = path_of(value) if value.startswith("'") else value
    return f"{name}{equals}{plain_value}" if hydra_quoted(plain_value) == value else argument


def _as_path(name: str, value: str, sweeping: bool) -> str:
    if _is_there(value):
        return hydra_quoted(value.replace("${", "\\${"))
    if value.startswith("~"):
        value = os.path.expanduser(value)
    try:
        read = OverridesParser.create().parse_override(f"{name}={value}").value()
    except HydraException:
        return hydra_quoted(value)
    written = isinstance(read, str) and (read == value or re.search(r"['\"\\]", value))
    keeps = read is None or written or (sweeping and isinstance(read, Sweep))
    return value if keeps else hydra_quoted(value)


def _is_there(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False


def path_of(value: str) -> str:
    """The path in the value of an option, without Hydra's quotes and with `~` expanded."""
    if not value or _is_there(value):
        return value
    read = OverridesParser.create().parse_override(f"path={_as_path('path', value, sweeping=False)}").value()
    return "" if read is None else str(read)


def check(config: DictConfig) -> None:
    """Check the values of options before anything is made.

    Raises:
        UserError: an option has an invalid value.
    """
    content = OmegaConf.to_container(config)
    if HydraConfig.initialized():
        _check_new(content, HydraConfig.get().overrides.task)
        _check_variant(content, HydraConfig.get().runtime.choices)
    check_values(content)
    from vlabs.runs.trainer import check_options  # here, because it imports Lightning, which --help does not need

    check_options(plain(config.trainer))


def _check_new(content: Any, overrides: Sequence[str]) -> None:
    """Raise a UserError for a new top-level option that nothing uses, such as +max_epochs=3."""
    for name in (found[1] for item in overrides if (found := re.match(r"\+{1,2}(\w+)(?:\.[\w.]+)?=", item))):
        is_known = name in _own_names() or (Path(config_dir()) / name).is_dir() or f"${{{name}" in json.dumps(content)
        if not is_known:
            groups = [group for group, part in content.items() if isinstance(part, dict) and name in part]
            of = f": pass {groups[0]}.{name}=..." if groups else ", and nothing uses it: leave it out"
            raise UserError(f"there is no option '{name}'{of}")


def _check_variant(content: Any, chosen: Mapping[str, str]) -> None:
    """Raise a UserError where a variant sets losses of ξ (`conf/task/base/losses.yaml`) that the task does not have."""
    if chosen.get("model/topdown") == "absvit_released" and "region_prior_temperature" not in content["task"]:
        raise UserError(
            f"model/topdown=absvit_released is the released vision-language code, and sets losses of ξ that "
            f"task={chosen.get('task')} does not have: choose another variant, such as absvit"
        )


@functools.cache
def _own_names() -> set[str]:
    """The top-level options and sections of all programs."""
    files = [OmegaConf.load(Path(config_dir()) / f"{program}.yaml") for program in ("train", "evaluate")]
    return {"import"} | {str(name) for file in files for name in file}


def explain(error: BaseException) -> str:
    """Describe any error in one sentence."""
    return _sentence(error) or fault(error)


def is_fault(error: BaseException) -> bool:
    """Whether an error is a bug in vlabs, which is shown with its traceback."""
    return _sentence(error) is None


def _sentence(error: BaseException) -> str | None:
    """The sentence for an error in an option or outside vlabs, with the valid choices for a wrong name; else None."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            parent = cause.parent_node
            key = cause.full_key or str(cause.key)
            valid = sorted({str(name) for name in parent} - {*HYDRAS}) if OmegaConf.is_dict(parent) else []
            if valid:
                where = key.rsplit(".", 1)[0] if "." in key else "the config"
                plus = f" (a new one takes a plus: +{key}=...)" if may_be_new(key, parent) else ""
                return f"there is no option '{key}'{_nearest(key, parent)}: {where} has {', '.join(valid)}{plus}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: pass {error.full_key}=..."
    if isinstance(error, InterpolationKeyError):
        return f"{' '.join(str(error).split())}: correct what is in ${{...}}; a folder may not be called so"
    if isinstance(error, OverrideParseException):
        return _unread(error.override)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return _wrong_group(str(error))
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run"):
        return "--cfg and --info print one config, not a sweep's: leave out -m"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        sentence = foreseen(error)
        return _of_the_trainer(sentence) if sentence and sentence.startswith("trainer: ") else sentence
    missing = re.search(
        r"Could not find '(.+)/(.+?)'\s+Available options in '.+?':\s+(.+?)\s+Config search", str(error), re.S
    )
    if missing:
        group, choice, names = missing.groups()
        return f"there is no {group}={choice}: choose one of {', '.join(names.split())}"
    # For a group with several choices at once, Hydra does not list the available ones.
    if unloaded := re.search(r"Could not load '(.+)/(.+?)'", str(error)):
        group, choice = unloaded.groups()
        return f"there is no {group}={choice}: choose one of {', '.join(choices(group))}"
    if unmatched := re.search(r"Could not override '([^']+)'\.\s+No match in the defaults list", str(error)):
        name = unmatched[1]
        return (
            f"{name}=...: the config of a run has no groups to choose from: pass its options, as its config.yaml "
            f"names them, or, where it has none yet, add a group's with +{name}=CHOICE"
        )
    if isinstance(error, InstantiationException):
        place = re.search(r"^full_key: (\S+)", str(error), re.M)
        said = (foreseen(chain[-1]) or str(chain[-1])).removeprefix("trainer: ")
        return f"{place[1]}: {said}" if place else said
    return re.sub(r"\s+", " ", str(error).replace("Set the environment variable HYDRA_FULL_ERROR=1", ""))


def _nearest(key: str, within: Any) -> str:
    """The options of a config whose names are most similar to one that does not exist."""

    def names(part: Any, start: str = "") -> Iterator[str]:
        for name, value in part.items() if isinstance(part, dict) else ():
            yield f"{start}{name}"
            yield from names(value, f"{start}{name}.")

    root = OmegaConf.to_container(within._get_root(), resolve=False)
    known = [name for name in names(root) if not name.startswith("hydra.")]
    section, _, last = key.rpartition(".")
    here = [name for name in known if name.rpartition(".")[0] == section]
    found = difflib.get_close_matches(key, here, 1, 0.75)
    found = found or [name for name in known if name.rpartition(".")[2] == last]
    found = found or [name for name in known if difflib.get_close_matches(last, [name.rpartition(".")[2]], 1, 0.75)]
    return f" (did you mean {' or '.join(found[:3])}?)" if found else ""


def _of_the_trainer(sentence: str) -> str:
    from vlabs.runs.trainer import named

    return named(sentence)


def _option_of(error: OSError) -> str:
    """The option of the command line whose path a system error is about, if any."""
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if equals and _PATHS.fullmatch(name) and isinstance(error.filename, str):
            path, about = Path(os.path.abspath(path_of(value))), Path(os.path.abspath(error.filename))
            if path.is_relative_to(about) or about.is_relative_to(path):
                return f"{name}={path_of(value)}"
    return ""


def _wrong_group(message: str) -> str:
    """A message for a group whose choice is not a name; Hydra's own message does not name the group."""
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        folder = Path(config_dir()) / name.lstrip("+").split("@")[0]
        if equals and folder.is_dir() and not re.fullmatch(r"\[.*\]|[A-Za-z]\w*", value.replace("null", "")):
            if not name:
                return _unread(argument.removeprefix("="))
            names = ", ".join(choices(folder.relative_to(config_dir()).as_posix()))
            return f"{argument}: {name} is a group of options, choose one of {names}"
    return message


def _unread(override: str) -> str:
    """A message for an override that Hydra cannot read."""
    name, equals, value = override.partition("=")
    if not equals:
        return f"'{override}' is not an option: write NAME=VALUE"
    quoted = f"{name}={hydra_quoted(value)}"
    quoted = shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
    return f"{override}: this value cannot be read; if it is a string, put it in quotes: {quoted}"


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved config as plain data."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


# Options that always name a folder; and options that name a file or folder if it exists.
_FOLDERS = re.compile(r"data\.(raw_)?dir|data\.sets\..*")
_MAY_BE_PATHS = re.compile(r"init|.*\.(tokenizer|name_or_path|weights|instances)")


def recorded(config: DictConfig) -> DictConfig:
    """The config that a run keeps: resolved, with absolute paths so that it works from any folder, and without options
    that belong to one start only. Sizes that depend on the data are not filled in yet.
    """

    def whole(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: whole(one, f"{name}.{key}" if name else str(key)) for key, one in value.items()}
        if not isinstance(value, str) or not value:
            return value
        may_be = "/" in value or _MAY_BE_PATHS.fullmatch(name)
        if _FOLDERS.fullmatch(name) or (may_be and os.path.exists(value)):
            return os.path.abspath(value)
        return value

    content = {name: value for name, value in plain(config).items() if name not in ("plan", "resume")}
    return as_config(whole(content) | {"plan": False, "resume": None})


def as_config(content: Any) -> DictConfig:
    """Plain data as a config in which all strings are literal: `${...}` in a folder's name is not an interpolation."""

    def escaped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escaped(one) for key, one in value.items()}
        if isinstance(value, list):
            return [escaped(one) for one in value]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return OmegaConf.create(escaped(content))


def save_config(config: DictConfig, path: Path) -> None:
    """Write a resolved config, completely or not at all."""
    with replacing(path) as partial:
        OmegaConf.save(as_config(plain(config)), partial)


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    return shlex.join(["vlabs", Path(sys.argv[0]).stem, *sys.argv[1:]])
