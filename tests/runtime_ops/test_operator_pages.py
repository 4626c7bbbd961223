"""The pages of docs/operators say what the schemas say, and their examples run."""

from __future__ import annotations

import pathlib
import re

import pytest
from onnx.defs import OpSchema

from postquant.runtime_ops.ops import OPERATORS, Operator

PAGES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "operators"
BY_NAME = [pytest.param(operator, id=operator.name) for operator in OPERATORS]
ATTRIBUTE_TYPES = {OpSchema.AttrType.INT: "int", OpSchema.AttrType.INTS: "ints", OpSchema.AttrType.FLOAT: "float"}


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its first two lines."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_there_is_a_page_for_each_operator_and_the_index_lists_them() -> None:
    names = {operator.name for operator in OPERATORS}
    assert {path.stem for path in PAGES.glob("*.md")} == names | {"README"}
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\]\((?:\1)\.md\)", index, re.MULTILINE)) == names


@pytest.mark.parametrize("operator", BY_NAME)
def test_the_tables_are_those_of_the_schema(operator: Operator) -> None:
    page = (PAGES / f"{operator.name}.md").read_text(encoding="utf-8")
    schema = operator.schema()
    types = [p.type_str.removeprefix("tensor(").removesuffix(")") for p in schema.inputs]
    inputs = [(str(i), p.name, kind) for i, (p, kind) in enumerate(zip(schema.inputs, types, strict=True))]
    assert [tuple(row[:3]) for row in rows(page, "Inputs")] == inputs
    attributes = {name: ATTRIBUTE_TYPES[a.type] for name, a in schema.attributes.items()}
    assert {row[0]: row[1] for row in rows(page, "Attributes")} == attributes
    for output in schema.outputs:
        assert f"`{output.name}`" in page


@pytest.mark.parametrize("operator", BY_NAME)
def test_the_example_runs(operator: Operator) -> None:
    page = (PAGES / f"{operator.name}.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert operator.name in example
    assert "assert " in example
    exec(compile(example, f"{operator.name}.md", "exec"), {"__name__": "example"})
