"""One tiny corpus and one tiny trained run for all tests, and the real command line in a fresh folder."""

import atexit
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before anything of the hub is imported, which reads it once: no test waits for hosts that it must not need.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_MODEL = [
    "model.vision.patch_size=8", "model.vision.embed_dim=16", "model.vision.depth=2", "model.vision.num_heads=2",
    "model.text.hidden_size=16", "model.text.num_hidden_layers=1", "model.text.num_attention_heads=2",
    "model.text.intermediate_size=32", "model.fusion.width=16", "model.fusion.depth=1", "model.fusion.num_heads=2",
]  # fmt: skip

# Figures and grounding after each validation, with `tiny_options`.
LOOKS = ["callbacks.predictions.every_n_validations=1", "callbacks.grounding.every_n_validations=1"]


# Files whose tests take longest: they go first, so that at the end no process is left alone with one of them.
LONG = [
    "test_retrieval", "test_docs", "test_resume", "test_page", "test_train", "test_wandb", "test_benchmarks",
    "test_devices", "test_wrong_input", "test_report", "test_evaluate_grounding", "test_hub", "test_use",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def clean_environment(home):
    """Of a user without network, W&B account or GPU."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_"))}
    return clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}


def start_server() -> Path:
    """Start what `warm.py` serves, until this process ends; returns what stands for `python`."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))  # short: a socket's path may have about a hundred characters
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, python = Path(__file__).parent / "warm.py", folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", str(program), str(folder)])} "$@"\n')
    python.chmod(0o700)
    server = subprocess.Popen(
        [sys.executable, program, "serve", folder], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=clean_environment(folder) | {"TMPDIR": str(folder)},
    )  # fmt: skip
    _servers.append(server)  # it ends with this process, which holds its standard input
    return python


_servers: list[subprocess.Popen] = []


def pytest_configure(config):
    """One server for all workers, which starts while they collect."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ["VLABS_TESTS_PYTHON"] = str(start_server())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: some tests wait for servers, browsers and processes that end."""
    return len(os.sched_getaffinity(0)) + 1


@functools.cache
def warm_python() -> str:
    """What stands for `python` before `-m`: a new process, forked from one that has the libraries imported."""
    return os.environ.get("VLABS_TESTS_PYTHON") or str(start_server())


def command(module, *arguments, cwd, **environment):
    """Run `python -m module` as a user without network, W&B account or GPU would."""
    # The hub's library reads the environment when it is imported.
    python = sys.executable if any(name.startswith("HF_") for name in environment) else warm_python()
    return subprocess.run(
        [python, "-m", module, *map(str, arguments)],
        cwd=cwd, env=clean_environment(cwd) | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def assert_one_line_error(result, *parts):
    """Exit status not 0, and one `error:` line that has all parts and is no traceback."""
    assert "Error executing job" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


def areas_by_hand(order, score):
    """Areas under a score, in percent, while patches are taken away, first the first of an order and then the last."""
    shares = (0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95)
    found = []
    for way in (order, order[::-1]):
        curve = [score(way[: round(share * len(way))]) for share in shares]
        steps = zip(shares, shares[1:], curve, curve[1:], strict=False)
        found.append(sum((b - a) * (one + other) / 2 for a, b, one, other in steps) / 0.95)
    return found


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder that is made once, by the first worker that needs it: `made("corpus", make)` after `make(folder)`."""
    from vlabs.utils.files import locked

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make) -> Path:
        folder, whole = base / name, base / f"{name}-made"
        with locked(base, "", wait=True, name=f"{name}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_data(made) -> Path:
    """The prepared folder of the tiny corpus, made by the real preparation."""
    from data_prep.engine.pipeline import Options, prepare
    from data_prep.readers.vqav2 import VQAv2
    from data_prep.scenes.corpus import make_scenes

    def make(folder):
        make_scenes("tiny", folder / "raw", num_workers=1)
        prepare(VQAv2(folder / "raw"), folder / "prepared", Options(min_answer_count=1))

    return made("corpus", make) / "prepared"


@pytest.fixture(scope="session")
def tiny_options(tiny_data) -> list[str]:
    """Overrides for a training of seconds, without figures and grounding (`LOOKS`)."""
    return [
        "task=vqa", "data=scenes", "data.size=tiny", f"data.dir={tiny_data}", "data.image_size=32",
        "data.batch_size=32", "data.questions_per_image=4", "data.num_workers=0", "data.minival_images=4",
        "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "callbacks.predictions.num_images=1", "callbacks.grounding.num_texts=30",
        *(f"callbacks.{name}.every_n_validations=0" for name in ("predictions", "grounding")),
        f"callbacks.grounding.instances={tiny_data.parent / 'raw/annotations.zip'}", *TINY_MODEL,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tiny_options, made):
    """A finished run folder with W&B offline, figures and grounding, and what its command printed."""

    def make(folder):
        result = command("vlabs.train", *tiny_options, *LOOKS, "hydra.run.dir=run", cwd=folder)
        assert result.returncode == 0, result.stderr
        (folder / "printed.json").write_text(json.dumps({"stdout": result.stdout, "stderr": result.stderr}))

    folder = made("run", make)
    return folder / "run", SimpleNamespace(**json.loads((folder / "printed.json").read_text()))


@pytest.fixture
def in_process(monkeypatch, capfd):
    """Run a Hydra program's main in this process, as `python -m` would: seconds less for each wrong input."""
    import importlib

    from hydra.core.global_hydra import GlobalHydra

    from vlabs.utils import plugins

    def run(module, arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, arguments)])
        GlobalHydra.instance().clear()
        program = importlib.import_module(module)
        code = 0
        try:
            program.main()
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    yield run
    plugins.imported.clear()
