"""Graphs in torch: what is read, what may replace it, what is not supported, gradients."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from postquant.calib.learn.executor import constant_values, run_nodes, supported
from postquant.passes.session import make_session

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2,4,4] x) => (float[N,a] y)
<float[3,2,3,3] w, float[3] b, int64[2] shape = {0, -1}>
{
  h = Conv <pads = [1, 1, 1, 1]> (x, w, b)
  r = Relu (h)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
  y = Reshape (p, shape)
}
"""


@pytest.fixture
def model() -> ir.Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(TEXT)
    for tensor in list(proto.graph.initializer):
        if tensor.name in ("w", "b"):
            proto.graph.initializer.remove(tensor)
    for name, shape in (("w", (3, 2, 3, 3)), ("b", (3,))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    found: ir.Model = ir.from_proto(proto)
    return found


@pytest.fixture
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((2, 2, 4, 4)).astype(np.float32))


def test_a_graph_equals_onnxruntime(model: ir.Model, x: torch.Tensor) -> None:
    values = {"x": x, **constant_values(model.graph)}
    run_nodes(model.graph, values)
    expected = make_session(model, outputs=["h", "p", "y"]).run({"x": x.numpy()})
    for name, array in expected.items():
        np.testing.assert_allclose(values[name].numpy(), array, rtol=1e-5, atol=1e-5)


def test_read_sees_every_input_and_replaces_it(model: ir.Model, x: torch.Tensor) -> None:
    seen = []

    def read(node: ir.Node, index: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append((node.op_type, index, name))
        return 2 * tensor if name == "w" else tensor

    values = {"x": x, **constant_values(model.graph)}
    run_nodes(model.graph, values, read)
    assert seen == [
        *(("Conv", 0, "x"), ("Conv", 1, "w"), ("Conv", 2, "b")),
        *(("Relu", 0, "h"), ("MaxPool", 0, "r"), ("Reshape", 0, "p"), ("Reshape", 1, "shape")),
    ]
    weight, bias = values["w"], values["b"]
    expected = torch.nn.functional.conv2d(x, 2 * weight, bias, padding=1)
    torch.testing.assert_close(values["h"], expected)


def test_gradients_reach_what_read_returns(model: ir.Model, x: torch.Tensor) -> None:
    constants = constant_values(model.graph)
    weight = constants["w"].clone().requires_grad_(True)

    def read(node: ir.Node, index: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        del node, index
        return weight if name == "w" else tensor

    def output(of: torch.Tensor) -> torch.Tensor:
        values = {"x": x.double(), "shape": constants["shape"], "w": of, "b": constants["b"].double()}
        run_nodes(model.graph, values)
        return values["y"].square().sum()

    values = {"x": x, **constants}
    run_nodes(model.graph, values, read)
    (gradient,) = torch.autograd.grad(values["y"].square().sum(), weight)
    # Against a difference quotient along one direction, in double precision.
    direction = torch.from_numpy(np.random.default_rng(2).standard_normal(weight.shape))
    start, step = weight.detach().double(), 1e-6
    slope = (output(start + step * direction) - output(start - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_constants_are_copies(model: ir.Model) -> None:
    constants = constant_values(model.graph)
    assert set(constants) == {"w", "b", "shape"}
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    before = weight.numpy().copy()
    constants["w"].zero_()
    assert np.array_equal(weight.numpy(), before)


def test_a_missing_value_is_named(model: ir.Model) -> None:
    with pytest.raises(KeyError, match="x"):
        run_nodes(model.graph, constant_values(model.graph))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = NonMaxSuppression (x, x)", "operator NonMaxSuppression"),
        ("y = my.domain.Relu (x)", "operator my.domain.Relu"),
        ("y = Cast <to = 8> (x)", "a cast to STRING"),
        ("y, m = Dropout (x)", "operator Dropout: more than one of its outputs is read"),
        ("y = BatchNormalization <training_mode = 1> (x, x, x, x, x)", "training mode"),
    ],
)
def test_unsupported_nodes_have_a_reason(body: str, reason: str) -> None:
    outputs = "float[n] y, bool[n] m" if "m =" in body else "float[n] y"
    text = f'<ir_version: 8, opset_import: ["" : 17, "my.domain" : 1]> g (float[n] x) => ({outputs}) {{ {body} }}'
    node = next(iter(ir.from_proto(onnx.parser.parse_model(text)).graph))
    found = supported(node)
    assert found is not None
    assert reason in found


def test_every_node_of_a_plain_network_is_supported(model: ir.Model) -> None:
    assert [supported(node) for node in model.graph] == [None] * 4
