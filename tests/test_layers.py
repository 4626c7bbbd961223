"""The layers hold: a module imports only from its own or a lower layer, and always absolutely."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("runtime_ops", "passes", "calib", "pipeline")  # lowest first


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Line number and dotted name of everything that ``source`` imports; a relative import starts with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(source: str, layer: str) -> list[str]:
    """Sentences about the imports of ``source``, a module of ``layer``, that break the order."""
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    found = []
    for line, name in imported_modules(source):
        first, *rest = name.split(".")
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}")
        elif first in LAYERS:
            found.append(f"line {line}: {name} is imported as postquant.{name}")
        elif first == "postquant" and (not rest or rest[0] not in allowed):
            found.append(f"line {line}: {layer} may import from {', '.join(allowed)}, not {name}")
    return found


MODULES = [path for layer in LAYERS for path in sorted((REPOSITORY / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_module_respects_the_layers(path: pathlib.Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY).parts[0]) == []


@pytest.mark.parametrize(
    ("layer", "source", "broken"),
    [
        ("passes", "from postquant.runtime_ops import law", 0),
        ("passes", "import numpy as np", 0),
        ("passes", "from postquant.calib.source import Source", 1),
        ("passes", "from postquant import pipeline", 1),
        ("runtime_ops", "def f():\n    import postquant.passes.plan", 1),
        ("calib", "import postquant", 1),
        ("calib", "from . import source", 1),
        ("pipeline", "from passes import plan", 1),
    ],
)
def test_rule_sees_what_it_should(layer: str, source: str, broken: int) -> None:
    assert len(violations(source, layer)) == broken


def test_package_links_reach_the_layers() -> None:
    for layer in LAYERS:
        link = REPOSITORY / "src" / "postquant" / layer
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == REPOSITORY / layer
