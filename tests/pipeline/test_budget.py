"""Budgets as they are written."""

from __future__ import annotations

import pytest

from postquant.pipeline.budget import Budget, BudgetKind
from postquant.pipeline.config import QuantConfig
from postquant.runtime_ops.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "value", "relative"),
    [
        ("size=0.14x", BudgetKind.SIZE, 0.14, True),
        (" size = 2MB ", BudgetKind.SIZE, 2e6, False),
        ("size=1.5MiB", BudgetKind.SIZE, 1.5 * 2**20, False),
        ("size=900000", BudgetKind.SIZE, 9e5, False),
        ("bitops=0.25x", BudgetKind.BITOPS, 0.25, True),
        ("bitops=3e9", BudgetKind.BITOPS, 3e9, False),
        ("sqnr=30", BudgetKind.SQNR, 30.0, False),
        ("sqnr=27.5dB", BudgetKind.SQNR, 27.5, False),
    ],
)
def test_read(text: str, kind: BudgetKind, value: float, relative: bool) -> None:
    assert Budget.read(text) == Budget(kind, value, relative)
    assert QuantConfig(budget=text).budget == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "size",
        "size=",
        "size=-1x",
        "size=0x",
        "size=1TB",
        "sqnr=2x",
        "sqnr=30MB",
        "bitops=1MB",
        "speed=2x",
        "size=1.2.3x",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        Budget.read(text)
    with pytest.raises(ConfigError, match="budget"):
        QuantConfig(budget=text)


def test_relative_limit() -> None:
    assert Budget.read("size=0.5x").limit(300.0) == 150.0
    assert Budget.read("size=100").limit(300.0) == 100.0


def test_widths_that_the_budget_decides_about() -> None:
    with pytest.raises(ConfigError, match="first_last_bits"):
        QuantConfig(budget="size=0.2x", first_last_bits=6)
    with pytest.raises(ConfigError, match="depthwise_bits"):
        QuantConfig(budget="size=0.2x", depthwise_bits=8)
