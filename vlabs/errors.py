"""Errors for users: one line on standard error, an exit status that is not 0, and no traceback.

A `UserError` is raised by vlabs. Messages of the system, torch, Lightning or another library become one line in
`foreseen`, for all commands. Everything else is a bug of vlabs and keeps its traceback; VLABS_DEBUG=1 always shows it.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import os
import re
import select
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or option and says what to do."""


def printable(text: str) -> str:
    """A text that is safe for a terminal: control characters and invalid characters are escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def show(text: object, **options: Any) -> None:
    """Print text that may contain names, answers or texts of data and checkpoints; each line is made `printable`.

    Args:
        text: the text.
        options: of `print`.
    """
    print("\n".join(printable(line) for line in str(text).split("\n")), **options)


def one_line(message: str) -> str:
    """A message without line breaks and control characters; for an error from a loader process, only its message."""
    return printable(" ".join(_said(message)[1].split()))


def fault(error: BaseException) -> str:
    """The message of an unforeseen error."""
    return f"{type(error).__name__}: {error} (a bug in vlabs: please report it with its traceback)"


def exit_with(message: str, status: int = 1) -> NoReturn:
    """Print `error: message` on one line of standard error and exit. If several processes fail in the same way, only
    the one that started the others prints.
    """
    parent = os.getppid()
    for _ in range(50 if int(os.environ.get("LOCAL_RANK") or 0) > 0 else 0):
        time.sleep(0.1)
        if os.getppid() != parent:
            sys.exit(status)
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def chain_of(error: BaseException) -> list[BaseException]:
    """An error, and those that it was raised from or while they were handled; the first one is last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def fail(error: BaseException, sentence: str | None) -> NoReturn:
    """Explain an error, and exit with a status that is not 0.

    Args:
        sentence: the result of `foreseen`; None for a bug of vlabs, which is shown with its traceback.
    """
    if any(isinstance(one, BrokenPipeError) for one in chain_of(error)) and _has_no_reader():
        # Nobody reads the output any more, as in `vlabs predict ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + 13)
    if sentence is None or os.environ.get("VLABS_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    else:  # hide messages of half-made objects of libraries when they are deleted
        sys.unraisablehook = lambda _: None
    exit_with(sentence or fault(error))


def run_cli(main: Callable[[], None]) -> None:
    """Run a command. Every error becomes one line and exit status 1; Ctrl-C is status 130, SIGTERM 143, SIGHUP 129."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # a stream of another kind
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if "" not in sys.path:
        sys.path.append("")  # the current folder, for modules that the user names; after all others
    argparse.ArgumentParser.error = _refuse  # type: ignore[method-assign,assignment]  # Hydra's too
    sys.argv[1:] = [_at_home(argument) for argument in sys.argv[1:]]
    try:
        try:
            with _ended_by_signals():
                main()
        finally:
            if sys.stdout is not None:  # it may be closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(error, foreseen(error))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP unless it is ignored (nohup), end a command as Ctrl-C does, with all clean-up.

    Lightning does not end an evaluation for SIGTERM unless there was a handler before.
    """
    process, known = os.getpid(), []

    def end(number: int, _: Any) -> None:
        if os.getpid() != process:  # forked from it, such as a loader process: nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGHUP:
            write_to_no_terminal()
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopped: {signal.Signals(number).name}\n".encode())
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        known = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for number in known:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in known:
            signal.signal(number, signal.SIG_DFL)


def write_to_no_terminal() -> None:
    """Redirect output to /dev/null if the terminal is gone, because writing to it would raise an error."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def foreseen(error: BaseException) -> str | None:
    """A sentence for an error outside of vlabs: input, files, memory, the machine, a library's options.

    Returns:
        The sentence, or None for other errors.
    """
    name, text = _said(str(error))
    kinds = {kind.__name__ for kind in type(error).__mro__} | _bases(name)
    # Errors of libraries are recognized by the library's name, so that none has to be imported.
    modules = [kind.__module__ for kind in type(error).__mro__]
    # A signal handler of torch raises it wherever the process is, even in a library that makes another error of it.
    if died := next((one for one in map(str, chain_of(error)) if _LOADER.search(one)), ""):
        return _LOADER_DIED.format(died)
    if kinds & {"ConnectionError", "EOFError", "FileNotFoundError"} and _while_receiving_a_batch(error):
        return _LOADER_DIED.format(_of_the_system(error, text))
    if text.startswith("Too many open files"):  # as torch says it of loader processes
        return f"too many open files: {_REMEDY[errno.EMFILE]}"
    if "UserError" in kinds:
        return text
    if "MemoryError" in kinds or "OutOfMemoryError" in kinds or _MEMORY.search(text):
        return (
            f"memory ran out ({text}): process less at a time (train: a smaller data.batch_size, with "
            "trainer.accumulate_grad_batches=N for the same step; evaluate: data.eval_batch_size), or use the CPU"
        )
    if isinstance(error, OSError) or "OSError" in kinds:
        return _of_the_system(error, text)
    if "UnicodeError" in kinds:
        return f"a text is not UTF-8 ({text}): write it in UTF-8"
    if "ModuleNotFoundError" in kinds and (missing := re.search(r"No module named '(?!vlabs|data_prep)(.+?)'", text)):
        return (
            f"the package {missing[1]} is missing: pip install it, run in the folder of {missing[1].split('.')[0]}.py "
            "if it is yours, or correct the name"
        )
    if "BrokenProcessPool" in kinds:
        return f"a process died ({text}): if memory ran out, pass a smaller --num-workers"
    for start, sentence in _LIBRARIES:
        if any(f"{module}.".startswith(f"{start}.") for module in modules):
            return sentence.format(text)
    if _CUDA.search(text):
        return f"the GPU cannot be used ({text}): pass trainer.accelerator=cpu, or --device cpu"
    if "MisconfigurationException" in kinds or _raised_in(error, "pytorch_lightning", "lightning_fabric"):
        return f"{'logger' if _raised_in(error, *_LOGGERS) else 'trainer'}: {text}"
    return None


_LOGGERS = ("pytorch_lightning.loggers", "lightning_fabric.loggers")
_LOADER = re.compile(r"DataLoader (worker \(pid|timed out)")
_LOADER_DIED = "a loader process died ({}): if memory or /dev/shm ran out, pass a smaller data.num_workers"
_MEMORY = re.compile(r"out of memory|n't allocate memory|not enough memory|annot allocate memory", re.I)
_CUDA = re.compile(r"CUDA error|NVIDIA driver|CUDA driver|cuDNN error|NCCL|not compiled with CUDA")
_DAMAGED = "a file is damaged or of another kind ({}): make it again, or name another (VLABS_DEBUG=1 shows which)"
_LIBRARIES = (
    ("torch._dynamo", "torch.compile does not work here ({}): pass task.compile=false"),
    ("torch._inductor", "torch.compile does not work here ({}): pass task.compile=false"),
    ("torch.distributed", "the processes of a run do not reach each other ({}): see trainer.devices and MASTER_PORT"),
    ("wandb", "W&B: {}; pass logger=csv to go without it, or logger.mode=offline"),
    ("pydantic_core", "an option or an environment variable is wrong ({})"),
    ("huggingface_hub", "the hub: {}; without network, name a local folder"),
    ("httpx", "the network: {}; without network, name a local folder"),
    ("requests", "the network: {}; without network, name a local folder"),
    *((name, _DAMAGED) for name in ("json", "lzma", "pickle", "_pickle", "pyarrow", "safetensors_rust", "tarfile")),
    *((name, _DAMAGED) for name in ("safetensors", "yaml", "zipfile", "zlib")),
)
_REMEDY = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EACCES: "name another place, or change its rights",
    errno.EPERM: "name another place, or change its rights",
    errno.EROFS: "name another place",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "name another place",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another place",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EMFILE: "raise `ulimit -n`, or pass fewer loader processes",
    errno.EADDRINUSE: "name another port",
}


def _of_the_system(error: BaseException, text: str) -> str:
    """The file, the system's message, and what to do."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None)
    if reason is None:  # of a library, or passed on by a loader process
        found = re.search(r"\[Errno (\d+)\]", text)
        number = int(found[1]) if found else None
        said = re.sub(r"\[Errno \d+\] ", "", text) or type(error).__name__
    else:
        names = [os.fsdecode(name) for name in (getattr(error, "filename", None),) if isinstance(name, str | bytes)]
        said = ": ".join([*names, str(reason)])
    remedy = _REMEDY.get(number or 0)
    return f"{said}: {remedy}" if remedy else said


def _said(message: str) -> tuple[str, str]:
    """Name and message of an error; the name is "" unless a loader process passed the error on with its traceback."""
    if passed := re.match(r"Caught (\w+) in .*\nOriginal Traceback", message):
        last = list(re.finditer(rf"^(?:[\w.]+\.)?{passed[1]}(?:: |$)", message, re.M))
        return passed[1], message[last[-1].end() :].strip() if last else message
    return "", message.rsplit("vlabs.errors.UserError: ", 1)[-1]


def _bases(name: str) -> set[str]:
    kind = getattr(builtins, name, None)
    return {base.__name__ for base in kind.__mro__} if isinstance(kind, type) else {name}


def _while_receiving_a_batch(error: BaseException) -> bool:
    """Whether an error was raised while a batch came from a loader process, which can break off before torch knows that
    the process died.
    """
    frames = set(_frames(error))
    return "torch.utils.data.dataloader" in frames and any(one.startswith("multiprocessing.") for one in frames)


def _raised_in(error: BaseException, *packages: str) -> bool:
    """Whether an error was raised in a package, or in a part of it."""
    last = ([""] + list(_frames(error)))[-1]
    return any(f"{last}.".startswith(f"{package}.") for package in packages)


def _frames(error: BaseException) -> Iterator[str]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield str(frame.f_globals.get("__name__", ""))


def _has_no_reader() -> bool:
    """Whether the standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replace argparse's own method, which prints the usage first."""
    exit_with(f"{message} (--help lists all options)", 2)


def _at_home(argument: str) -> str:
    """Expand `~` in `--ckpt=~/run`, as the shell does in `--ckpt ~/run`."""
    name, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"--[\w-]+", name) and value.startswith("~/"):
        return f"{name}={Path(value).expanduser()}"
    return argument
