"""Random nodes, some of them malformed: a kernel gives what its law gives, or fails where the law fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.runtime_ops.native.conftest import Native, Node, Nodes

FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def agree(native: Native, node: Node) -> None:
    """The kernel gives what the law gives, or fails where the law fails."""
    try:
        expected = node.expected()
    except Exception:  # noqa: BLE001 - a law may raise anything about nonsense
        native.failure(node)
        return
    if any(0 in value.shape for value in expected):
        try:
            native.run(node)
        except Exception:  # noqa: BLE001 - nothing to compare: an empty result or a sentence
            return
    for output, law in zip(native.run(node), expected, strict=True):
        np.testing.assert_array_equal(output, law)


small = st.integers(-1, 4)


@FUZZ
@given(data=st.data())
def test_fuzz_convolution(native: Native, nodes: Nodes, data: st.DataObject) -> None:
    draw = data.draw
    rank, group = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    size = st.integers(1, 5)
    node = nodes.lut_conv(
        np.random.default_rng(draw(st.integers(0, 9))),
        w_shape=[group * draw(size), *(draw(size) for _ in range(rank + 1))],
        spatial=[draw(st.integers(0, 9)) for _ in range(rank)],
        batch=draw(st.integers(0, 2)),
        group=group,
        bits=draw(st.sampled_from([2, 4])),
        dtype=draw(st.sampled_from([np.uint8, np.int8])),
        strides=[draw(st.integers(1, 3)) for _ in range(rank)],
        dilations=[draw(st.integers(1, 3)) for _ in range(rank)],
        pads=[draw(st.integers(0, 3)) for _ in range(2 * rank)],
    )
    for name in draw(st.sets(st.sampled_from(["strides", "dilations", "pads", "w_shape"]), max_size=1)):
        node = node.with_attributes(**{name: draw(st.lists(small, max_size=5))})
    for name in draw(st.sets(st.sampled_from(["group", "bits"]), max_size=1)):
        node = node.with_attributes(**{name: draw(small)})
    agree(native, reshaped(node, draw))


@FUZZ
@given(data=st.data())
def test_fuzz_matrix_product(native: Native, nodes: Nodes, data: st.DataObject) -> None:
    draw = data.draw
    make = draw(st.sampled_from([nodes.lut_matmul, nodes.lut_matmul_to_float]))
    node = make(
        np.random.default_rng(draw(st.integers(0, 9))),
        outer=draw(st.lists(st.integers(0, 3), max_size=3)),
        outputs=draw(st.integers(1, 70)),
        inputs=draw(st.integers(1, 70)),
        bits=draw(st.sampled_from([2, 4])),
        dtype=draw(st.sampled_from([np.uint8, np.int8])),
    )
    agree(native, reshaped(node, draw))


@FUZZ
@given(data=st.data())
def test_fuzz_adaptive(native: Native, nodes: Nodes, data: st.DataObject) -> None:
    draw = data.draw
    node = nodes.adaptive(
        np.random.default_rng(draw(st.integers(0, 9))),
        shape=[draw(st.integers(0, 2)), draw(st.integers(1, 4)), *draw(st.lists(st.integers(0, 9), max_size=3))],
        features=draw(st.integers(1, 7)),
        hidden=draw(st.integers(1, 3)),
        requantize=draw(st.booleans()),
    )
    for name in draw(st.sets(st.sampled_from(["qmin", "qmax", "features"]), max_size=1)):
        node = node.with_attributes(**{name: draw(st.integers(-1, 260))})
    agree(native, reshaped(node, draw))


@FUZZ
@given(data=st.data())
def test_fuzz_border(native: Native, nodes: Nodes, data: st.DataObject) -> None:
    draw = data.draw
    odd = st.sampled_from([1, 3, 5])
    node = nodes.border(
        np.random.default_rng(draw(st.integers(0, 9))),
        shape=[draw(st.integers(0, 2)), draw(st.integers(1, 4)), *draw(st.lists(st.integers(0, 9), max_size=2))],
        window=(draw(odd), draw(odd)),
        rank=draw(st.integers(0, 3)),
        table=draw(st.booleans()),
        zero_point=draw(st.integers(0, 255)),
        qmax=draw(st.sampled_from([3, 15, 255])),
    )
    for name in draw(st.sets(st.sampled_from(["qmin", "qmax", "channels"]), max_size=1)):
        node = node.with_attributes(**{name: draw(st.integers(-1, 260))})
    agree(native, reshaped(node, draw))


@FUZZ
@given(data=st.data())
def test_fuzz_levels(native: Native, nodes: Nodes, data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)) + draw(st.sampled_from([[], [16], [70]]))
    axis = -draw(st.integers(1, len(shape)))
    node = nodes.levels(
        np.random.default_rng(draw(st.integers(0, 9))),
        shape=shape,
        axis=axis,
        channels=draw(st.sampled_from([1, shape[axis]])),
        count=draw(st.integers(1, 17)),
        scale=draw(st.sampled_from([0.001, 0.031, 5.0])),
    )
    if draw(st.integers(0, 4)) == 0:
        node = node.with_attributes(axis=draw(st.integers(-9, 1)))
    if draw(st.integers(0, 4)) == 0:
        node = node.changed(table=node.inputs["table"][:, ::-1].copy())
    agree(native, reshaped(node, draw))


@FUZZ
@given(data=st.data())
def test_fuzz_feedback(native: Native, nodes: Nodes, data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)) + draw(st.sampled_from([[], [16], [70]]))
    cell = draw(st.sampled_from([1, 1, 2, 3])) if len(shape) > 2 else 1
    axis = -3 if cell > 1 else -draw(st.integers(1, len(shape)))
    node = nodes.feedback(
        np.random.default_rng(draw(st.integers(0, 9))),
        shape=[max(size, 1) if i == len(shape) + axis else size for i, size in enumerate(shape)],
        axis=axis,
        rank=draw(st.integers(1, 9)),
        rows=draw(st.sampled_from([None, 1, 2])),
        count=draw(st.integers(2, 17)),
        groups=draw(st.sampled_from([range(8), [0], [2, 5], range(9)])),
        cell=cell,
        scale=draw(st.sampled_from([0.001, 0.031, 5.0])),
    )
    if draw(st.integers(0, 4)) == 0:
        node = node.with_attributes(axis=draw(st.integers(-9, 1)))
    if draw(st.integers(0, 4)) == 0:
        node = node.with_attributes(cell=draw(st.integers(-1, 9)))
    agree(native, reshaped(node, draw))


def reshaped(node: Node, draw: Any) -> Node:
    """Sometimes one input gets another shape."""
    if draw(st.integers(0, 3)) > 0:
        return node
    name = draw(st.sampled_from(sorted(node.inputs)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    return node.changed(**{name: np.resize(node.inputs[name], shape).astype(node.inputs[name].dtype)})
