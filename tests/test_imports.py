"""Imports go one way: a module of a room imports only what CONTRIBUTING.md says that it may."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each room imports of ours, beside itself.
BASE = ["vlabs.errors", "vlabs.utils"]
ROOMS = {
    "vlabs/errors.py": [],
    "vlabs/utils": ["vlabs.errors"],
    "vlabs/models": BASE,
    "vlabs/metrics": [*BASE, "vlabs.data"],
    "vlabs/data": BASE,
    "vlabs/tasks": [*BASE, "vlabs.data", "vlabs.models", "vlabs.metrics", "vlabs.checkpoints", "vlabs.ranking"],
    "data_prep/engine": [*BASE, "vlabs.data", "vlabs.metrics"],
    "data_prep/readers": [*BASE, "vlabs.data", "vlabs.metrics", "data_prep.engine"],
    "data_prep/scenes": [*BASE, "vlabs.data", "vlabs.metrics", "data_prep.engine", "data_prep.readers"],
}
FRAMEWORKS = ("pytorch_lightning", "lightning_fabric", "hydra", "omegaconf")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in ("vlabs", "data_prep")}
    return found - {"vlabs", "data_prep"}


def files(place: str) -> list[Path]:
    return [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))


def is_of(name: str, rooms: list[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("place", ROOMS)
def test_a_room_imports_what_lies_before_it(place):
    allowed = [*ROOMS[place], place.removesuffix(".py").replace("/", ".")]
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(place)
        for name in imports(path)
        if is_of(name, ["vlabs", "data_prep"]) and not is_of(name, allowed)
    }
    assert not wrong


def test_no_two_modules_import_each_other():
    paths = [path for place in ("vlabs", "data_prep") for path in files(place)]
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports(path) for path in paths}

    def reaches(name: str, wanted: str, seen: set[str]) -> bool:
        for one in graph.get(name, set()) - seen:
            seen.add(one)
            if one == wanted or reaches(one, wanted, seen):
                return True
        return False

    assert not [name for name in graph if name.startswith("data_prep.") and reaches(name, name, set())]


def test_models_know_no_framework_and_one_door_leads_to_the_preparations():
    assert not {
        (path.name, name) for path in files("vlabs/models") for name in imports(path) if is_of(name, [*FRAMEWORKS])
    }
    assert not [path for path in files("vlabs") if any(is_of(name, ["data_prep"]) for name in imports(path))]
    named = [
        path.name for path in files("vlabs") if "import_module" in path.read_text() and "data_prep" in path.read_text()
    ]
    assert named == ["cli.py", "embedded.py"]  # the command, and what is rendered on first use
