"""What the linter cannot say: a file is one idea, introduced by its docstring."""

import ast
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("runtime_ops", "passes", "calib", "pipeline", "src", "tests", "examples", "bench")
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if "__pycache__" not in path.parts
]
LONGEST = 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_is_short_and_says_what_it_is_for(path: pathlib.Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(source)), "the module docstring is missing"
    assert path.stem not in {"utils", "helpers", "misc", "common"}, "a name says what the file is for"
