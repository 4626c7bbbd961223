"""statistics.json: read back whole, strict about versions, edges as the histogram has them."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from postquant.calib.histogram import Histogram
from postquant.pipeline.tensor_statistics import (
    GridStatistics,
    OutlineNode,
    Statistics,
    TensorStatistic,
    ValueHistogram,
)
from postquant.runtime_ops.errors import ModelError

STATISTICS = Statistics(
    samples=3,
    tensors=(
        TensorStatistic(
            kind="activation",
            key="größe:0",
            value="größe",
            node="conv",
            bits=4,
            values="border",
            scales=(0.5, 0.5),
            zero_point=2,
            grid=GridStatistics(
                low=-1.0, high=1.0, step=1.0, levels=(-1.0, 0.0, 1.0), thresholds=((-0.5, -0.25), (0.5, 0.5))
            ),
            histogram=ValueHistogram(low=-1.5, high=2.0, width=1.0, zero=1, counts=(1, 2, 3, 4)),
            effect_db=31.5,
        ),
        TensorStatistic(
            kind="weight",
            key="w",
            value="w",
            node="conv",
            bits=8,
            values="int",
            scales=(0.1, 0.25),
            zero_point=0,
            grid=GridStatistics(low=-127.0, high=127.0, step=1.0),
        ),
    ),
    nodes=(
        OutlineNode(name="x", ops=("input",)),
        OutlineNode(name="conv", ops=("Conv", "Relu"), inputs=(0,), wbits=8, weights="int", abits=4, reads=8),
        OutlineNode(name="soft", ops=("Softmax",), inputs=(0, 1), reason="why"),
    ),
)


def test_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_bytes(STATISTICS.to_bytes())
    assert Statistics.load(path) == STATISTICS
    assert json.loads(path.read_bytes())["schema_version"] == 1
    path.write_bytes(Statistics(samples=0).to_bytes())
    assert Statistics.load(path) == Statistics(samples=0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "the statistics are damaged"),
        ("[]", "found none"),
        ('{"schema_version": 2}', "expected schema_version 1, found 2"),
        ('{"schema_version": 1}', "the statistics are damaged"),
        ('{"schema_version": 1, "samples": 1, "nodes": [{"surprise": 1}]}', "the statistics are damaged"),
    ],
)
def test_wrong_files(tmp_path: pathlib.Path, content: str, sentence: str) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=sentence):
        Statistics.load(path)


def test_missing_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be read.*No such file"):
        Statistics.load(tmp_path / "statistics.json")


@pytest.mark.parametrize("shift", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("size", [2, 7, 4000])
def test_edges_are_those_of_the_histogram(shift: float, size: int) -> None:
    values = (np.random.default_rng(1).normal(size=size) + shift).astype(np.float32)
    histogram = Histogram()
    histogram.update(values)
    density = histogram.density(max_bins=64)
    found = ValueHistogram.of(density)
    assert np.array_equal(found.edges(), density.edges)
    assert sum(found.counts) == size
    assert len(found.counts) <= 64
    # The counts are NumPy's, but for values right on an edge, which normal numbers are not.
    expected = np.histogram(values.astype(np.float64), bins=np.unique(density.edges))[0]
    assert [count for count in found.counts if count] == [int(count) for count in expected if count]


def test_every_field_is_documented() -> None:
    text = (pathlib.Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    for cls in (Statistics, TensorStatistic, GridStatistics, ValueHistogram, OutlineNode):
        for field in dataclasses.fields(cls):
            assert f"| `{field.name}` |" in text, f"{cls.__name__}.{field.name} is not in docs/report.md"
