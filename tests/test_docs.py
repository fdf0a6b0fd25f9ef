"""The documentation: pages and notebook are executed in a fresh folder, the site builds, links lead somewhere."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import warm_python
from PIL import Image

ROOT = Path(__file__).parent.parent
# Pages of tables and links, without commands that could run in seconds.
TOLD = (
    "ablations", "benchmarks", "comparison", "faq", "glossary", "index", "install", "notebook", "options", "results",
    "results_classification", "results_photographs", "results_scenes", "security", "steering",
)  # fmt: skip
DOCS = sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem not in TOLD)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/starts").glob("*.md")]
BLOCK = re.compile(r"<!-- (file: (?P<file>\S+)|run) -->\n```\w*\n(?P<body>.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def rendered(tiny_data, tmp_path_factory):
    """What the first command with `data=scenes data.size=tiny` leaves in `data`."""
    from vlabs.data.embedded import scenes_data

    data = tmp_path_factory.mktemp("rendered") / "data"
    shutil.copytree(tiny_data.parent / "raw", data / "scenes-tiny-raw")
    scenes_data("tiny", data / "scenes-tiny", num_workers=0)
    return data


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_page_does_what_it_says(page, rendered, tmp_path):
    if page.stem.startswith("own_"):  # others use images that a fresh clone has
        (tmp_path / "photos").mkdir()
        for n, color in enumerate(["red", "blue", "red"], start=1):
            Image.new("RGB", (40, 32), color).save(tmp_path / f"photos/{n}.png")
    if page.stem == "look":
        from tiny_models import save_tiny

        save_tiny("CLIPModel", tmp_path / "clip", positions=32)
    text = page.read_text(encoding="utf-8")
    blocks, pictures = list(BLOCK.finditer(text)), "vlabs/page/pictures"
    assert blocks
    if "data.size=tiny" in text and page.stem != "training":  # which begins as in a fresh clone
        shutil.copytree(rendered, tmp_path / "data")
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    # `vlabs` and `python` in a page are of this Python.
    warm = shlex.quote(warm_python())
    python = f'vlabs() {{ {warm} -m vlabs.cli "$@"; }}\npython() {{ {warm} "$@"; }}\nset -e\n'
    for block in blocks:
        if block["file"]:
            path = tmp_path / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["body"].replace(pictures, f"{ROOT}/{pictures}"), encoding="utf-8")
        else:
            result = subprocess.run(
                ["bash", "-c", python + block["body"].replace(pictures, f"{ROOT}/{pictures}")],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr


def test_the_site_builds_strictly_and_asks_nothing_of_other_hosts(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site/api/models/index.html").read_text()
    assert "vlabs.models.vlm.VisionLanguageModel.join" in reference
    assert not list(tmp_path.rglob("*.safetensors"))
    elsewhere = r"""(?:https?:)?//"""
    loaded = re.compile(rf'<(?:script|img|iframe)[^>]* src="{elsewhere}|<link[^>]*stylesheet[^>]*href="{elsewhere}')
    for page in (tmp_path / "site").rglob("*.html"):
        assert not loaded.search(page.read_text()), page


def test_every_public_module_is_in_the_reference():
    paths = [path.relative_to(ROOT) for room in ("vlabs", "data_prep") for path in (ROOT / room).rglob("*.py")]
    modules = {".".join(path.with_suffix("").parts) for path in paths if not path.stem.startswith("_")}
    listed = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    missing = sorted(modules - set(listed))
    assert not missing
    assert len(listed) == len(set(listed))
    assert all(f"api/{page.name}" in (ROOT / "mkdocs.yml").read_text() for page in (ROOT / "docs/api").glob("*.md"))


def test_the_config_is_of_few_files():
    assert len([*(ROOT / "conf").rglob("*.yaml")]) <= 90  # near copies are rows of conf/variants.yaml


# What pages once said, and what they say now. Code is left out: it may have to name what others call so.
DIALECT = {
    "in the place of": "instead of",
    "one's own": "your own",
    "everywhere alike": "a uniform map",
    "names what it sees": "after the naming task",
    "colour": "color",
    "optimis": "optimiz",
    "normalis": "normaliz",
    "licence": "license",
    "learnt": "learned",
    "goes on where": "continues where",
    "going on in": "continuing in",
    " a core ": "per core",
    "labelled": "labeled",
}


def test_docstrings_and_messages_have_plain_words():
    said = [
        (path, " ".join(node.value.lower().split()))
        for room in ("vlabs", "data_prep")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    wrong = {word for word in DIALECT if word not in ("licence", "colour")}  # options have both spellings
    assert not [(path, text) for path, text in said if any(word in re.sub(r"`[^`]*`", "", text) for word in wrong)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_have_narrow_code_and_plain_words(page):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 80]
    if page.stem not in ("CONTRIBUTING", "options"):  # which lists some of them; which docstrings make
        prose = re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL).lower()
        assert not {word: better for word, better in DIALECT.items() if word in " ".join(prose.split())}


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    run = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    run.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    shown = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(shown) == 2


def test_every_file_of_tests_is_listed_with_what_it_claims():
    listed = dict(
        re.findall(r"^\| \[\w+\]\((test_\w+\.py)\) \| (.+) \|$", (ROOT / "tests/README.md").read_text(), re.MULTILINE)
    )
    said = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in (ROOT / "tests").glob("test_*.py")}
    assert listed == {name: doc.splitlines()[0] for name, doc in said.items()}


def test_links_and_files_of_the_readme_are_there_and_it_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 100
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_lock_fits_the_requirements_and_names_no_host():
    import tomllib

    from packaging.requirements import Requirement

    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    locked = dict(re.findall(r"^([a-zA-Z0-9._-]+)==([^ ;\\]+)", lock, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(locked[wanted.name.lower()], prereleases=True), line


def test_before_a_commit_what_make_lint_does_is_done():
    import yaml

    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == ["make lint"]
    check = [sys.executable, "-m", "pre_commit", "validate-config"]
    valid = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert valid.returncode == 0, valid.stdout
