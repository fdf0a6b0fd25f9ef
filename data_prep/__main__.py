"""`vlabs prepare NAME`, which is `python -m data_prep.NAME`: from raw files to a folder that `data.dir` takes."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from vlabs.errors import UserError, run_cli


def commands() -> dict[str, tuple[str, str, str]]:
    """The module, the purpose and the downloads of every preparation, by name, from the docstrings."""
    found = {}
    for room in ("readers", "scenes"):
        for path in sorted(Path(__file__).parent.joinpath(room).glob("*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            what = next((part for part in doc.split("\n\n") if part.startswith("Download: ")), None)
            if what is not None:
                name = room if path.stem == "__main__" else path.stem
                module = f"data_prep.{room}.{path.stem}"
                found[name] = (module, doc.partition("\n")[0], " ".join(what.removeprefix("Download: ").split()))
    return found


def main() -> None:
    """Run the preparation that the command line names."""
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: vlabs prepare NAME ...   (each has --help)\n")
        for name, (_, sentence, download) in known.items():
            print(f"  {name:16}{sentence.removeprefix('Prepare ')}\n{'':18}Download: {download}")
        return
    if name not in known:
        raise UserError(f"there is no preparation '{name}': choose one of {', '.join(known)}")
    module = importlib.import_module(known[name][0])
    sys.argv = [str(module.__file__), *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    run_cli(main)
