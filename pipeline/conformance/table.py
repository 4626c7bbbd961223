"""A comparison as a table for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from postquant.pipeline.conformance.result import Result, Status

_ROWS = 60
_STYLES = {Status.EQUAL: "green", Status.TIES: "green", Status.MISSING: "dim"}


def conformance_table(result: Result) -> Table:
    """The tensors that were dumped, in the order of computation; the first ones of many, and all that depart."""
    table = Table(box=None, pad_edge=False)
    for column in ("tensor", "operator", "result", "codes", "ties", "wrong", "worst", "rule"):
        number = column in ("codes", "ties", "wrong", "worst")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    dumped = [tensor for tensor in result.tensors if tensor.status is not Status.MISSING]
    for index, tensor in enumerate(dumped):
        if index >= _ROWS and not tensor.failed:
            continue
        table.add_row(
            Text(tensor.tensor.codes),
            tensor.tensor.operator,
            Text(tensor.status.value, style=_STYLES.get(tensor.status, "bold red")),
            *(str(number) for number in (tensor.codes, tensor.ties, tensor.mismatches, tensor.worst)),
            tensor.fits[0].rule.value if tensor.fits else "",
        )
    return table
