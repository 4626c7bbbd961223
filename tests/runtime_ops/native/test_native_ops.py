"""The operators with packed weights equal the NumPy law: instruction sets, threads, run-time weights, branches."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.runtime_ops.native.conftest import Native, Node, Nodes

SETS = ["baseline", "neondot", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx", ""]


def lut_nodes(nodes: Nodes) -> dict[str, Node]:
    """Cases of all of them: tails of every tile, both types, both widths."""
    rng = np.random.default_rng(0)
    made: dict[str, Node] = {}
    for dtype in (np.uint8, np.int8):
        for bits in (4, 2):
            options: dict[str, Any] = {"bits": bits, "dtype": dtype}
            tag = f"{np.dtype(dtype).name}_{bits}"
            made |= {
                f"conv_{tag}": nodes.lut_conv(rng, pads=[1, 1, 1, 1], batch=2, **options),
                f"conv_wide_{tag}": nodes.lut_conv(rng, w_shape=(67, 33, 3, 3), spatial=(9, 11), **options),
                f"conv_strided_{tag}": nodes.lut_conv(
                    rng,
                    w_shape=(9, 5, 3, 2),
                    spatial=(13, 12),
                    strides=[2, 3],
                    dilations=[2, 1],
                    pads=[2, 0, 1, 3],
                    **options,
                ),
                f"conv_point_{tag}": nodes.lut_conv(rng, w_shape=(33, 65, 1, 1), spatial=(5, 7), batch=3, **options),
                f"conv_group_{tag}": nodes.lut_conv(rng, w_shape=(6, 2, 3, 3), group=3, pads=[1] * 4, **options),
                f"conv_depthwise_{tag}": nodes.lut_conv(
                    rng, w_shape=(19, 1, 3, 3), group=19, spatial=(10, 9), pads=[1] * 4, strides=[2, 2], **options
                ),
                f"conv_line_{tag}": nodes.lut_conv(
                    rng, w_shape=(8, 3, 5), spatial=(17,), batch=2, pads=[2, 2], strides=[2], **options
                ),
                f"matmul_{tag}": nodes.lut_matmul(rng, outer=(3, 5), outputs=70, inputs=37, **options),
                f"matmul_row_{tag}": nodes.lut_matmul(rng, outer=(1,), outputs=65, inputs=131, **options),
                f"matmul_vector_{tag}": nodes.lut_matmul(rng, outer=(), outputs=3, inputs=1, **options),
                f"matmul_many_{tag}": nodes.lut_matmul(rng, outer=(130,), outputs=129, inputs=64, **options),
                f"float_{tag}": nodes.lut_matmul_to_float(rng, outer=(3, 5), outputs=70, inputs=37, **options),
                f"float_row_{tag}": nodes.lut_matmul_to_float(rng, outer=(1,), outputs=65, inputs=131, **options),
                f"float_vector_{tag}": nodes.lut_matmul_to_float(rng, outer=(), outputs=3, inputs=1, **options),
                f"float_many_{tag}": nodes.lut_matmul_to_float(rng, outer=(130,), outputs=129, inputs=64, **options),
            }
    return made


@pytest.mark.parametrize("isa", SETS)
def test_lut_equals_the_law(native: Native, nodes: Nodes, isa: str, tmp_path: pathlib.Path) -> None:
    made = lut_nodes(nodes)
    native.check(native.run_apart(made, tmp_path, isa=isa, threads=(1, 2))[0], made)


def test_zero_samples_give_zero_samples(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    conv = nodes.lut_conv(rng, batch=0)
    assert native.run(conv)[0].shape == (0, 5, 5, 4)
    matmul = nodes.lut_matmul(rng, outer=(0, 3))
    assert native.run(matmul)[0].shape == (0, 3, 5)
    floats = nodes.lut_matmul_to_float(rng, outer=(0, 3))
    assert native.run(floats)[0].shape == (0, 3, 5)


@pytest.mark.parametrize("kind", ["lut_matmul", "lut_matmul_to_float"])
def test_everything_may_be_computed_at_run_time(
    native: Native, nodes: Nodes, rng: np.random.Generator, kind: str
) -> None:
    make = getattr(nodes, kind)
    node = make(rng)
    node = node.changed(fed=set(node.inputs))
    session = native.session(node.model())
    other = make(rng)
    for each in (node, node, node.changed(codes=other.inputs["codes"]), node.changed(table=other.inputs["table"])):
        again = each.changed(x=make(rng).inputs["x"])
        np.testing.assert_array_equal(session.run(None, again.feeds)[0], again.expected()[0])


def test_a_step_computed_at_run_time(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    node = nodes.lut_conv(rng, w_shape=(9, 4, 3, 3), pads=[1] * 4)
    session = native.session(node.changed(fed={"x", "x_scale", "x_zero_point"}).model())
    for step in (0.02, 0.5, 1e-6):
        for zero in (0, 7, 255):
            each = node.changed(
                fed={"x", "x_scale", "x_zero_point"},
                x_scale=np.asarray(step, np.float32),
                x_zero_point=np.asarray(zero, np.uint8),
            )
            np.testing.assert_array_equal(session.run(None, each.feeds)[0], each.expected()[0])


@pytest.mark.parametrize("rank", [1, 2])
def test_shapes_are_inferred(native: Native, nodes: Nodes, rng: np.random.Generator, rank: int) -> None:
    node = nodes.lut_conv(
        rng, w_shape=(5, 3, 3, 3)[: 2 + rank], spatial=(7, 6)[:rank], strides=[2] * rank, pads=[1] * (2 * rank)
    )
    session = native.session(node.model(ranks_only=False))
    assert session.get_outputs()[0].shape == list(node.expected()[0].shape)
    matmul = nodes.lut_matmul(rng, outer=(4, 3))
    assert native.session(matmul.model(ranks_only=False)).get_outputs()[0].shape == [4, 3, 5]
    for dtype in (np.uint8, np.int8):
        floats = nodes.lut_matmul_to_float(rng, outer=(4, 3), dtype=dtype)
        (result,) = native.session(floats.model(ranks_only=False)).get_outputs()
        assert (result.shape, result.type) == ([4, 3, 5], "tensor(float)")


def test_unknown_sizes_stay_unknown(
    native: Native, nodes: Nodes, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime compares what was inferred with what comes, and warns."""
    names = ("lut_conv", "lut_matmul", "lut_matmul_to_float", "adaptive", "border", "levels", "feedback")
    for node in (getattr(nodes, name)(rng) for name in names):
        session = native.session(node.model(), severity=2)
        for output in session.get_outputs():
            assert all(size is None or isinstance(size, str) or size > 0 for size in output.shape)
        session.run(None, node.feeds)
    assert "Expected shape" not in "".join(capfd.readouterr())


def test_threads_may_share_a_session(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    import concurrent.futures

    node = nodes.lut_matmul(rng, outputs=33, inputs=40)
    node = node.changed(fed={"x", "codes", "x_scale"})
    session = native.session(node.model(), threads=2)
    each = [node.changed(codes=nodes.lut_matmul(rng, outputs=33, inputs=40).inputs["codes"]) for _ in range(24)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda n: session.run(None, n.feeds)[0], each))
    for output, one in zip(outputs, each, strict=True):
        np.testing.assert_array_equal(output, one.expected()[0])


def test_inside_a_branch(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    """The constants are initializers of the outer graph."""
    from onnx import TensorProto, helper

    node = nodes.lut_matmul(rng)
    model = node.model()
    inner = model.graph.node[0]
    result = helper.make_tensor_value_info("out0", TensorProto.UINT8, None)
    then = helper.make_graph([inner], "then", [], [result])
    alternative = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.UINT8, None)],
    )
    branch = helper.make_node("If", ["condition"], ["result"], then_branch=then, else_branch=alternative)
    del model.graph.node[:]
    model.graph.node.append(branch)
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    model.graph.output[0].name = "result"
    session = native.session(model)
    output = session.run(None, {**node.feeds, "condition": np.asarray(True)})[0]
    np.testing.assert_array_equal(output, node.expected()[0])
