"""Borders from weights: the explicit matrix of the layer, and how much the rounding error of its output falls."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.border_terms import BorderTerms, border_of
from postquant.calib.layers import Layer
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.rounding_border import RoundingBorder
from postquant.runtime_ops.spec import QuantSpec

Doubles = np.ndarray[Any, np.dtype[np.float64]]

# Everything, with one strength for all channels.
EVERYTHING = BorderTerms(strength=1.0, density=0.0, energy=1.0, largest_rank=1.0)
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((4, 3, 3, 3), {"pads": [2, 2, 2, 2]}),
    "uneven kernel": ((4, 3, 2, 3), {"pads": [2, 2, 2, 2]}),
    "grouped": ((4, 3, 3, 3), {"pads": [2, 2, 2, 2], "group": 2}),
    "depthwise": ((4, 1, 3, 3), {"pads": [2, 2, 2, 2], "group": 4}),
    "dilated": ((4, 3, 2, 2), {"pads": [4, 4, 4, 4], "dilations": [2, 1]}),
    "strided": ((4, 3, 3, 3), {"pads": [2, 2, 2, 2], "strides": [2, 2]}),
    "pointwise": ((4, 3, 1, 1), {}),
    "one dimension": ((4, 3, 3), {"pads": [2, 2]}),
}


def layer_of(op_type: str, shape: tuple[int, ...], **attributes: Any) -> Layer:
    node = onnx.helper.make_node(op_type, ["x", "w"], ["y"], name="node", **attributes)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    weight = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), "w")
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    layer = Layer.of(next(iter(ir.from_proto(onnx.helper.make_model(graph)).graph)))
    assert layer is not None
    return layer


def matrix_of(layer: Layer, weight: Doubles, size: tuple[int, ...]) -> Doubles:
    """(outputs, C, *size): what each element of an input of that size adds to each output, by unit impulses."""
    shape = (layer.in_channels, *size)
    columns = []
    for index in itertools.product(*(range(n) for n in shape)):
        impulse = np.zeros((1, *shape), np.float32)
        impulse[(0, *index)] = 1
        rows = layer.rows(impulse).astype(np.float64)
        columns.append(np.einsum("pgk,gkm->pgm", rows, layer.matrix(weight)).reshape(-1))
    return np.stack(columns, axis=-1).reshape(-1, *shape)


def real_coefficients(border: RoundingBorder) -> tuple[Doubles, Doubles]:
    """(C, kh, kw) and (C, C) per unit of a residual."""
    window = border.window * (border.window_scale.astype(np.float64) * 128)[:, None, None]
    left = border.left * (border.left_scale.astype(np.float64) * 128)[:, None]
    right = border.right * border.right_scale.astype(np.float64)[:, None]
    return window, right @ left


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_coefficients_are_those_of_the_explicit_matrix(kind: str) -> None:
    shape, attributes = CONVOLUTIONS[kind]
    layer = layer_of("Conv", shape, **attributes)
    weight = np.random.default_rng(0).standard_normal(shape)
    found = border_of(layer, weight, EVERYTHING)
    assert found is not None
    window, across = real_coefficients(found.border)
    size = (11,) * (len(shape) - 2)
    full = matrix_of(layer, weight, size).reshape(-1, layer.in_channels, *((1,) * (4 - len(shape))), *size)
    # Two neighbouring phases of a stride in each direction, away from the edges.
    middle = [(s // 2,) if s == 1 else (s // 2, s // 2 + 1) for s in full.shape[2:]]
    places = list(itertools.product(*middle))
    own = np.stack([np.square(full[:, :, y, x]).sum(0) for y, x in places])
    for dy, dx in itertools.product(*(range(-(k // 2), k // 2 + 1) for k in window.shape[1:])):
        terms = np.stack([(full[:, :, y, x] * full[:, :, y + dy, x + dx]).sum(0) for y, x in places])
        expected = terms.sum(0) / own.sum(0)
        centre = (dy, dx) == (0, 0)
        if centre:  # what the low rank has put onto the diagonal is taken out
            got = window[:, window.shape[1] // 2, window.shape[2] // 2]
            np.testing.assert_allclose(got, -np.diag(across), atol=0.02)
        else:
            got = window[:, dy + window.shape[1] // 2, dx + window.shape[2] // 2]
            np.testing.assert_allclose(got, expected, atol=0.01)
    same = np.stack([np.einsum("oc,od->cd", full[:, :, y, x], full[:, :, y, x]) for y, x in places]).sum(0)
    expected = same / np.diag(same)[:, None]
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(across - np.diag(np.diag(across)), expected, atol=0.03)
    assert bool(found.border.rank) == (kind != "depthwise")


@pytest.mark.parametrize(("op_type", "attributes"), [("Gemm", {"transB": 1}), ("Gemm", {}), ("MatMul", {})])
def test_products_of_matrices_have_terms_across_channels_only(op_type: str, attributes: dict[str, Any]) -> None:
    shape = (5, 7) if attributes else (7, 5)
    layer = layer_of(op_type, shape, **attributes)
    weight = np.random.default_rng(1).standard_normal(shape)
    found = border_of(layer, weight, EVERYTHING)
    assert found is not None
    window, across = real_coefficients(found.border)
    matrix = weight if attributes else weight.T
    gram = matrix.T @ matrix
    expected = gram / np.diag(gram)[:, None]
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(across + np.diag(window[:, 0, 0]), expected, atol=0.03)


def test_a_layer_without_such_terms_has_no_border() -> None:
    layer = layer_of("Conv", (4, 1, 1, 1), group=4)
    assert border_of(layer, np.ones((4, 1, 1, 1)), BorderTerms()) is None
    layer = layer_of("Conv", (4, 3, 3, 3))
    assert border_of(layer, np.zeros((4, 3, 3, 3)), BorderTerms()) is None
    assert border_of(layer, np.ones((4, 3, 3, 3)), BorderTerms(near=False, across=False)) is None


def test_dead_channels_are_rounded_to_nearest() -> None:
    layer = layer_of("Conv", (4, 3, 3, 3))
    weight = np.random.default_rng(2).standard_normal((4, 3, 3, 3))
    weight[:, 1] = 0
    found = border_of(layer, weight, BorderTerms())
    assert found is not None
    window, across = real_coefficients(found.border)
    assert not window[1].any()
    assert not across[1].any()


def test_the_rank_keeps_the_energy_that_is_asked_for() -> None:
    layer = layer_of("Conv", (8, 16, 1, 1))
    weight = np.random.default_rng(3).standard_normal((8, 16, 1, 1))
    ranks = []
    for energy in (0.3, 0.6, 0.9):
        found = border_of(layer, weight, BorderTerms(energy=energy, largest_rank=1.0))
        assert found is not None
        ranks.append(found.border.rank)
    assert ranks == sorted(set(ranks))
    limited = border_of(layer, weight, BorderTerms(energy=1.0, largest_rank=0.25))
    assert limited is not None
    assert limited.border.rank == 4


@pytest.mark.parametrize("kind", ["plain", "grouped", "depthwise", "pointwise", "strided"])
def test_the_output_error_falls_as_expected(kind: str) -> None:
    """Independent, evenly spread residuals: the theory's own assumption."""
    shape, attributes = CONVOLUTIONS[kind]
    shape = (8 if kind != "depthwise" else 4, *shape[1:])
    layer = layer_of("Conv", shape, **attributes)
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(shape)
    terms = BorderTerms(density=1.0, energy=1.0, largest_rank=1.0)
    found = border_of(layer, weight, terms)
    assert found is not None
    x = rng.uniform(1, 14, (2, layer.in_channels, 24, 24)).astype(np.float32)
    nearest = TensorQuantizer(QuantSpec(4, False, False), np.array(1, np.float32), np.array(0, np.int32))
    bordered = TensorQuantizer(nearest.spec, nearest.scale, nearest.zero_point, border=found.border)
    errors = []
    for quantizer in (nearest, bordered):
        rows = layer.rows(quantizer.simulate(x) - x).astype(np.float64)
        errors.append(float(np.square(np.einsum("pgk,gkm->pgm", rows, layer.matrix(weight))).sum()))
    gain = 1 - errors[1] / errors[0]
    assert 0.6 * found.gain < gain < 1.4 * found.gain
    assert gain > 0.03
