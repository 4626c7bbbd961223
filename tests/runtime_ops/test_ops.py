"""The table of operators is complete and agrees with itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from postquant.runtime_ops.ops import OPERATORS, Operator, functions_for, operator, reference_classes
from postquant.runtime_ops.schema import DOMAIN, VERSION

BY_NAME = [pytest.param(entry, id=entry.name) for entry in OPERATORS]
LUT = {"bits": 4, "group": 1, "strides": [2, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "w_shape": [7, 3, 3, 3]}
CODES = {"qmin": 0, "qmax": 15}
STEP = {"features": 7, "beta_min": 0.5, "beta_max": 2.0, **CODES}

# Operator -> attributes, shape of the first input, shapes of the outputs.
SHAPES: dict[str, tuple[dict[str, Any], list[Any], list[list[Any]]]] = {
    "LutQLinearConv": (LUT, ["N", 3, 9, "W"], [["N", 7, 5, None]]),
    "LutQLinearMatMul": ({"bits": 2, "w_shape": [7, 3]}, ["N", "T", 3], [["N", "T", 7]]),
    "LutMatMulIntegerToFloat": ({"bits": 4, "w_shape": [7, 3]}, ["N", "T", 3], [["N", "T", 7]]),
    "AdaptiveQuantize": (STEP, ["N", 3, 5], [["N", 3, 5], ["N"]]),
    "AdaptiveRequantize": (STEP, ["N", 3, 5], [["N", 3, 5], ["N"]]),
    "BorderQuantize": ({"channels": 3, **CODES}, ["N", 3, 5, "W"], [["N", 3, 5, "W"]]),
    "LutRequantize": ({"axis": -3}, ["N", 3, 5, "W"], [["N", 3, 5, "W"]]),
    "FeedbackRequantize": ({"axis": -2, "cell": 1}, ["N", 3, 5, "W"], [["N", 3, 5, "W"]]),
}


@contextlib.contextmanager
def registered(entry: Operator) -> Iterator[None]:
    """Lets onnx know the operator for a while."""
    onnx.defs.register_schema(entry.schema())
    try:
        yield
    finally:
        onnx.defs.deregister_schema(entry.name, entry.since, DOMAIN)


def model(
    entry: Operator,
    *,
    functions: bool,
    shape: list[Any] | None = None,
    table: list[Any] | None = None,
    group: list[Any] | None = None,
    **changes: Any,
) -> onnx.ModelProto:
    """A node whose operands are all graph inputs, of which only the first (``table``, ``group``) has a known shape."""
    schema, (attributes, first, outputs) = entry.schema(), SHAPES[entry.name]
    element = {"tensor(float)": TensorProto.FLOAT, "tensor(int8)": TensorProto.INT8, "tensor(int32)": TensorProto.INT32}
    ranks = {"w1": 2, "w2": 2, "codes": 2, "border": 2, "left": 2, "right": 2, "window": 3}
    if entry.name in ("LutRequantize", "FeedbackRequantize"):
        ranks["table"] = 2
    inputs = []
    for i, p in enumerate(schema.inputs):
        vector = p.name in ("b1", "b2", "table", "w_scale", "bias") or p.name.endswith(("w_scale", "left_scale"))
        vector = vector or p.name in ("window_scale", "right_scale", "group")
        rank = ranks.get(p.name, 1 if vector else 0)
        dims = (first if shape is None else shape) if i == 0 else [f"{p.name}{d}" for d in range(rank)]
        dims = table if p.name == "table" and table is not None else dims
        dims = group if p.name == "group" and group is not None else dims
        inputs.append(helper.make_tensor_value_info(p.name, element.get(p.type_str, TensorProto.UINT8), dims))
    names = [p.name for p in schema.outputs]
    ends = [
        helper.make_tensor_value_info(p.name, element.get(p.type_str, TensorProto.UINT8), [None] * len(dims))
        for p, dims in zip(schema.outputs, outputs, strict=True)
    ]
    node = helper.make_node(entry.name, [p.name for p in schema.inputs], names, domain=DOMAIN, **(attributes | changes))
    return helper.make_model(
        helper.make_graph([node], "one_node", inputs, ends),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)],
        functions=functions_for([entry.name], opset=21) if functions else [],
        ir_version=10,
    )


@pytest.mark.parametrize("entry", BY_NAME)
@pytest.mark.parametrize("opset", [13, 17, 22])
def test_schema_reference_and_body_have_the_same_parts(entry: Operator, opset: int) -> None:
    schema, body = entry.schema(), entry.body(opset)
    assert (schema.name, schema.domain, schema.since_version) == (entry.name, DOMAIN, entry.since)
    assert (body.name, body.domain) == (entry.name, DOMAIN)
    assert [(o.domain, o.version) for o in body.opset_import] == [("", opset)]
    inputs = [p.name for p in schema.inputs]
    assert list(body.input) == inputs
    assert list(body.output) == [p.name for p in schema.outputs]
    assert set(body.attribute) == set(schema.attributes)
    assert not body.attribute_proto, "defaults of function attributes are not read everywhere"
    # What older files do not have is not required, but always written.
    assert {name for name, a in schema.attributes.items() if not a.required} <= {"cell"}
    _, *parameters = inspect.signature(entry.reference._run).parameters
    assert parameters[: len(inputs)] == inputs
    assert set(parameters[len(inputs) :]) == set(schema.attributes)
    assert entry.reference.op_domain == DOMAIN
    assert entry.reference.__name__ == entry.name


def known(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """What is known of a dimension; onnx names those of which it knows nothing."""
    return dim.dim_value or (None if dim.dim_param.startswith("unk__") else dim.dim_param or None)


@pytest.mark.parametrize("entry", BY_NAME)
def test_onnx_reads_files_with_functions_and_without(entry: Operator) -> None:
    with_functions, without = model(entry, functions=True), model(entry, functions=False)
    onnx.checker.check_model(with_functions, full_check=True)
    onnx.shape_inference.infer_shapes(with_functions, check_type=True, strict_mode=True, data_prop=True)
    with registered(entry):
        for candidate in (with_functions, without):
            onnx.checker.check_model(candidate, full_check=True)
            inferred = onnx.shape_inference.infer_shapes(candidate, check_type=True, strict_mode=True)
            shapes = [[known(d) for d in o.type.tensor_type.shape.dim] for o in inferred.graph.output]
            assert shapes == SHAPES[entry.name][2]


@pytest.mark.parametrize(
    ("name", "shape", "changes"),
    [
        ("LutQLinearConv", ["N", 4, 9, 9], {}),
        ("LutQLinearConv", ["N", 3, 9], {}),
        ("LutQLinearConv", ["N", 3, 9, 9], {"strides": [1]}),
        ("LutQLinearConv", ["N", 3, 9, 9], {"strides": [0, 1]}),
        ("LutQLinearConv", ["N", 3, 0, 9], {"pads": [0, 0, 0, 0]}),
        ("LutQLinearMatMul", ["N", 4], {}),
        ("LutQLinearMatMul", ["N", 3], {"w_shape": [3]}),
        ("AdaptiveQuantize", ["N"], {}),
        ("AdaptiveRequantize", ["N", 3], {"qmax": 256}),
        ("BorderQuantize", ["N", 4, 5, 5], {}),
        ("BorderQuantize", ["N", 3], {"qmin": 15}),
        ("LutRequantize", [], {}),
        ("LutRequantize", ["N", 3], {"axis": 0}),
        ("LutRequantize", ["N", 3], {"axis": -9}),
        ("LutRequantize", ["N", 4, 5, 5], {"table": [3, 16]}),
        ("LutRequantize", ["N", 3], {"table": [3, 16]}),
        ("LutRequantize", ["N", 3], {"table": [16]}),
        ("FeedbackRequantize", [], {}),
        ("FeedbackRequantize", ["N", 3], {"axis": 0}),
        ("FeedbackRequantize", ["N", 3], {"axis": -9}),
        ("FeedbackRequantize", ["N", 5, 5], {"group": [3]}),
        ("FeedbackRequantize", [3], {"group": [3]}),
        ("FeedbackRequantize", ["N", 3, 5], {"group": [3, 1]}),
        ("FeedbackRequantize", ["N", 3, 5], {"table": [16]}),
        ("FeedbackRequantize", ["N", 3, 5], {"table": [2, 16], "group": [3]}),
        ("FeedbackRequantize", ["N", 3, 5, 5], {"axis": -3, "cell": 0}),
        ("FeedbackRequantize", ["N", 3, 5, 5], {"axis": -3, "cell": 9}),
        ("FeedbackRequantize", ["N", 3, 5, 5], {"axis": -2, "cell": 2}),
        ("FeedbackRequantize", ["N", 3, 5, 5], {"axis": -3, "cell": 2, "group": [3]}),
        ("FeedbackRequantize", ["N", 12, 5, 5], {"axis": -3, "cell": 2, "group": [12]}),
        ("FeedbackRequantize", ["N", 5], {"axis": -3, "cell": 2, "group": [12]}),
        ("FeedbackRequantize", ["N", 3, 5, 5], {"axis": -3, "cell": 2, "group": [12], "table": [12, 16]}),
    ],
    ids=str,
)
def test_shape_inference_refuses_what_does_not_fit(name: str, shape: list[Any], changes: dict[str, Any]) -> None:
    entry = operator(name)
    with registered(entry):
        broken = model(entry, functions=False, shape=shape, **changes)
        with pytest.raises(onnx.shape_inference.InferenceError):
            onnx.shape_inference.infer_shapes(broken, check_type=True, strict_mode=True)


def test_functions_are_listed_once_in_the_order_of_the_table() -> None:
    names = [entry.name for entry in OPERATORS]
    assert [f.name for f in functions_for([*reversed(names), *names])] == names
    assert functions_for([]) == []
    with pytest.raises(KeyError, match="no operator Relu"):
        functions_for(["Relu"])
    assert [c.__name__ for c in reference_classes()] == names


def test_a_malformed_node_is_explained_by_the_reference(operators: Any) -> None:
    x = np.zeros((1, 2, 3), np.float32)
    constants = {
        "scale": np.array(1, np.float32),
        "zero_point": np.array(0, np.uint8),
        "border": np.zeros((2, 1), np.float32),
        "window": np.zeros((2, 1, 1), np.int8),
        "window_scale": np.zeros(2, np.float32),
        "left": np.zeros((0, 2), np.int8),
        "left_scale": np.zeros(0, np.float32),
        "right": np.zeros((2, 0), np.int8),
        "right_scale": np.zeros(2, np.float32),
    }
    good = operators.model("BorderQuantize", x, constants, {"channels": 2, **CODES})
    assert operators.on_evaluator(good, x, reference=True)[0].shape == x.shape
    bad = operators.model("BorderQuantize", x, constants, {"channels": 3, **CODES})
    with pytest.raises(Exception, match="number of channels is wrong"):
        operators.on_evaluator(bad, x, reference=True)
