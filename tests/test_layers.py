"""Each layer imports only those above it in the table of docs/design.md."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def test_no_layer_imports_one_below_it() -> None:
    layers = re.findall(r"^\| `(\w+)/`", (_ROOT / "docs/design.md").read_text(), re.M)
    package = _ROOT / "shmepoch"
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(layers) == {"native", *packages}
    wrong = []
    for path in package.rglob("*.py"):
        layer, *inside = path.relative_to(package).parts
        below = layers[layers.index(layer) + 1 :] if inside else layers
        imported = re.findall(r"^ *(?:from|import) shmepoch\.(\w+)", path.read_text(), re.M)
        # `__init__` imports all of them, and `__main__` starts the command.
        if inside or not layer.startswith("__"):
            wrong += [(path, name) for name in imported if name in below]
    assert wrong == []
