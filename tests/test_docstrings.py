"""The examples in docstrings are true."""

import doctest
import importlib
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("runtime_ops", "passes", "calib", "pipeline")
MODULES = [
    ".".join(("postquant", *path.relative_to(REPOSITORY).with_suffix("").parts))
    for layer in LAYERS
    for path in sorted((REPOSITORY / layer).rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0, capsys.readouterr().out
