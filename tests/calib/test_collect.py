"""One pass over the data gives every tensor's statistics, with flat memory."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from postquant.calib.collect import collect, subsampling_note
from postquant.calib.input_spec import InputSpec, Sample
from postquant.calib.open_source import open_source
from postquant.calib.statistics import Bounds, TensorStatistics
from postquant.runtime_ops.errors import CalibrationError

SPEC = (InputSpec("x", np.dtype(np.float32), (None, 4)),)
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def run(sample: Sample) -> dict[str, Any]:
    x = sample["x"].astype(np.float32)
    return {"double": 2 * x, "relu": np.maximum(x, 0)}


def test_statistics_of_a_real_session() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] a, float[N, 4] b)'
        " { a = Exp(x) b = Relu(x) }"
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run_session(sample: Sample) -> dict[str, Any]:
        return dict(zip(("a", "b"), session.run(None, sample), strict=True))

    calls = []
    found = collect(
        run_session,
        open_source(X, SPEC),
        ["b", "a", "x"],
        bounds={"b": Bounds(low=0.0)},
        progress=lambda done, total: calls.append((done, total)),
    )
    assert list(found) == ["b", "a", "x"]
    assert calls == [(i + 1, 6) for i in range(6)]
    assert found["x"].observed == (X.min(), X.max())
    assert found["b"].bounds == Bounds(low=0.0)
    assert found["a"].high == pytest.approx(np.exp(X.max()))
    assert found["b"].mean_high == pytest.approx(np.maximum(X.max(axis=1), 0).mean())
    assert subsampling_note(found.values()) is None


def test_order_of_samples_does_not_matter() -> None:
    forwards = collect(run, open_source(X, SPEC), ["double", "relu"])
    backwards = collect(run, open_source(X[::-1].copy(), SPEC), ["double", "relu"])
    assert forwards == backwards


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_activation_names_tensor_and_sample(bad: float) -> None:
    def broken(sample: Sample) -> dict[str, Any]:
        tensors = run(sample)
        if np.array_equal(sample["x"][0], X[4]):
            tensors["relu"][0, 2] = bad
        return tensors

    with pytest.raises(CalibrationError, match="tensor 'relu', sample 4"):
        collect(broken, open_source(X, SPEC), ["double", "relu"], histogram=False)


def test_subsampling_is_noted() -> None:
    found = collect(run, open_source(X, SPEC), ["double"], max_elements_per_tensor=2)
    assert found["double"].observed == (2 * X.min(), 2 * X.max())
    note = subsampling_note(found.values())
    assert note is not None
    assert note == "the histogram of double was fed an even sample of its values, not all"
    assert "double" in note


def test_missing_tensor() -> None:
    with pytest.raises(KeyError, match="other"):
        collect(run, open_source(X, SPEC), ["other"])


def test_memory_does_not_depend_on_the_number_of_samples() -> None:
    size = 1 << 18
    spec = (InputSpec("x", np.dtype(np.float32), (None, 1)),)

    def big(sample: Sample) -> dict[str, Any]:
        rng = np.random.default_rng(int(sample["x"][0, 0]))
        return {"t": rng.normal(size=size).astype(np.float32)}

    def feeds(count: int) -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"x": np.full((1, 1), i, np.float32)}

    def peak(count: int) -> int:
        source = open_source(feeds(count), spec)
        tracemalloc.start()
        found = collect(big, source, ["t"])
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(found["t"], TensorStatistics)
        return top

    few, many = peak(3), peak(24)
    assert many < 1.05 * few
