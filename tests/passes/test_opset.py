"""Every opset that exporters have written becomes the wanted one, with equal outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from postquant.passes.opset import opset_of, raise_opset
from postquant.passes.session import make_session
from postquant.runtime_ops.errors import ModelError

NEWEST = 26


def cnn(opset: int) -> ir.Model:
    """A small CNN in the way of writing of an opset: attributes that became inputs, Upsample, spatial, ..."""
    rng = np.random.default_rng(0)
    constants: dict[str, npt.NDArray[Any]] = {
        "w1": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "b1": rng.standard_normal(8).astype(np.float32),
        **{name: rng.random(8).astype(np.float32) + 0.5 for name in ("gamma", "beta", "mean", "var")},
        "w2": rng.standard_normal((8, 1, 3, 3)).astype(np.float32),
        "wf": rng.standard_normal((10, 128)).astype(np.float32),
    }
    spatial: dict[str, Any] = {"spatial": 1} if opset < 9 else {}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], kernel_shape=[3, 3], pads=[1] * 4),
        onnx.helper.make_node(
            "BatchNormalization",
            ["c1", "gamma", "beta", "mean", "var"],
            ["n1"],
            **spatial,
        ),
        onnx.helper.make_node("Relu", ["n1"], ["r1"]),
        onnx.helper.make_node("Conv", ["r1", "w2"], ["c2"], kernel_shape=[3, 3], pads=[1] * 4, group=8),
    ]

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(onnx.helper.make_node(op, inputs, [output], **attributes))

    if opset < 11:
        add("Clip", ["c2"], "k", min=0.0, max=6.0)
    else:
        constants |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
        add("Clip", ["c2", "low", "high"], "k")
    add("Add", ["r1", "k"], "s")
    add("Dropout", ["s"], "d", **({"ratio": 0.5} if opset < 12 else {}))
    add("MaxPool", ["d"], "p", kernel_shape=[2, 2], strides=[2, 2])
    sizes = np.array([1, 1, 2, 2], np.float32)
    if opset < 9:
        add("Upsample", ["p"], "u", mode="nearest", scales=sizes.tolist())
    else:
        constants["sizes"] = sizes
        if opset < 11:
            add("Upsample" if opset < 10 else "Resize", ["p", "sizes"], "u", mode="nearest")
        else:
            constants["roi"] = np.zeros(0, np.float32)
            rule = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            add("Resize", ["p", "roi", "sizes"], "u", mode="nearest", **rule)
    add("AveragePool", ["u"], "a", kernel_shape=[2, 2], strides=[2, 2])
    if opset < 13:
        add("Unsqueeze", ["a"], "q", axes=[4])
        add("Squeeze", ["q"], "t", axes=[4])
    else:
        constants["axes"] = np.array([4], np.int64)
        add("Unsqueeze", ["a", "axes"], "q")
        add("Squeeze", ["q", "axes"], "t")
    add("Flatten", ["t"], "f")
    if opset < 11:
        constants["bf"] = np.zeros(10, np.float32)
        add("Gemm", ["f", "wf", "bf"], "l", transB=1)
    else:
        add("Gemm", ["f", "wf"], "l", transB=1)
    add("Softmax", ["l"], "y")
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])]
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    if ir_version < 4:
        inputs += [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in initializers]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 10])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, initializers)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


@pytest.mark.parametrize("wanted", [17, 21])
@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_every_opset(opset: int, wanted: int) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)}
    before = make_session(cnn(opset)).run(feeds)["y"]
    raised = raise_opset(cnn(opset), wanted)
    assert opset_of(raised.model) == max(opset, wanted)
    assert raised.note == (f"the operator set was raised from {opset} to {wanted}" if opset < wanted else None)
    onnx.checker.check_model(ir.to_proto(raised.model))
    np.testing.assert_allclose(make_session(raised.model).run(feeds)["y"], before, rtol=1e-6, atol=1e-7)
    assert str(raised.model.graph.inputs[0].shape) == "[N,3,8,8]"
    assert str(raised.model.graph.outputs[0].shape) == "[N,10]"


def test_only_the_number_changes_where_no_operator_did() -> None:
    model = cnn(16)
    nodes = list(model.graph)
    raised = raise_opset(model, 17)
    assert raised.model is model
    assert not raised.converted
    assert list(raised.model.graph) == nodes


FUNCTION = """
    <ir_version: 8, opset_import: ["" : 13, "own" : 1, "com.microsoft" : 1]>
    g (float[4] x, bool c) => (float[4] y) <int64[2] pads = {0, 0}> {
        g1 = com.microsoft.Gelu (x)
        h = own.Twice (g1)
        y = If (c) <
            then_branch = t () => (float[4] p) { p = Softmax (h) },
            else_branch = e () => (float[4] q) { q = Pad (h, pads) }
        >
    }
    <domain: "own", opset_import: ["" : 13]>
    Twice (a) => (b) { b = Add (a, a) }
"""


def test_functions_subgraphs_and_other_domains_stay() -> None:
    before, after = ir.from_onnx_text(FUNCTION), raise_opset(ir.from_onnx_text(FUNCTION), 18).model
    assert list(after.functions) == [("own", "Twice", "")]
    assert after.opset_imports == {"": 18, "own": 1, "com.microsoft": 1}
    for choice in (True, False):
        feeds = {"x": np.array([1, -2, 3, 0], np.float32), "c": np.array(choice)}
        np.testing.assert_array_equal(make_session(after).run(feeds)["y"], make_session(before).run(feeds)["y"])


def test_weights_are_not_copied() -> None:
    model = cnn(12)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    after = raise_opset(model, 17).model.graph.initializers
    assert after["wf"].const_value is tensors["wf"]


def unconvertible(opset: int) -> ir.Model:
    """A converter exists for no version of an operator that the converter does not know."""
    model = ir.from_onnx_text(
        f'<ir_version: 7, opset_import: ["" : {opset}]> g (float[1,1,4,4] x, float[1,2,2,2] grid) => (float[N] y) '
        "{ r = Relu (x) f = Flatten (r) y = Elsewhere (f) }"
    )
    return model


def test_old_opset_stays_with_a_note_where_no_conversion_exists() -> None:
    raised = raise_opset(unconvertible(13), 17)
    assert opset_of(raised.model) == 13
    assert raised.note is not None
    assert raised.note.startswith("the operator set stays at 13: no conversion to 17 (")


def test_opset_without_quantization_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"the operator set 11 of the model cannot be raised to 17: found .*; export"):
        raise_opset(unconvertible(11), 17)


def test_bodies_of_control_flow_are_converted_too() -> None:
    text = """
        <ir_version: 6, opset_import: ["" : 11]>
        g (float[N,4] x, bool c) => (float[a,b] y) {
            y = If (c) <
                then_branch = t () => (float[a,b] p) { u = Unsqueeze <axes = [1]> (x) p = Squeeze <axes = [1]> (u) },
                else_branch = e () => (float[a,b] q) { q = Softmax (x) }
            >
        }
    """
    after = raise_opset(ir.from_onnx_text(text), 17).model
    assert opset_of(after) == 17
    for choice in (True, False):
        feeds = {"x": np.ones((2, 4), np.float32), "c": np.array(choice)}
        before = make_session(ir.from_onnx_text(text)).run(feeds)["y"]
        np.testing.assert_array_equal(make_session(after).run(feeds)["y"], before)
