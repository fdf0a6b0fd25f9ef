"""The choices of config groups: the files of `conf`, and the rows of `conf/variants.yaml`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from vlabs.errors import UserError

VARIANTS = "variants.yaml"
_PACKAGES = {"experiment": "_global_", "model/topdown": "model"}
"""The place of a group's options in the config, if it is not the group's name."""


def config_dir() -> str:
    """The folder of the configs: `vlabs/conf` if installed, `conf` beside `vlabs` in a checkout."""
    here = Path(__file__).resolve().parent.parent
    for path in (here / "conf", here.parent / "conf"):
        if (path / "train.yaml").is_file():
            return str(path)
    raise UserError(f"the configs are missing from the installation at {here}: install vlabs again")


def choices(group: str) -> list[str]:
    """The choices of a group, such as `model/vision`; empty if there is no such group."""
    files = (path.stem for path in Path(config_dir(), group).glob("*.yaml"))
    return sorted({*files, *_variants().get(group, {})})


@functools.cache
def _variants() -> dict[str, dict[str, Any]]:
    content: Any = OmegaConf.to_container(OmegaConf.load(Path(config_dir(), VARIANTS)), resolve=False)
    return dict(content)


def _register() -> None:
    """Register the rows of `conf/variants.yaml` with Hydra, so that they can be chosen like files."""
    for group, rows in _variants().items():
        for name, row in rows.items():
            options = dict(row)
            overrides = [{f"override {other}": choice} for other, choice in options.pop("override", {}).items()]
            like = [options.pop("like")] if "like" in options else []
            node = {"defaults": [*like, *overrides, "_self_"], **options}
            package = _PACKAGES.get(group)
            ConfigStore.instance().store(name=name, group=group, node=node, package=package, provider=VARIANTS)


_register()
