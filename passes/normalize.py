"""The form that every later stage relies on.

1. Every node and every value has a unique, non-empty name.
2. Every weight (constant input 1 of Conv, ConvTranspose, Gemm, MatMul; constant input 0 of Gemm, MatMul) has
   exactly one use. A shared one becomes several initializers over the same tensor: no bytes are copied.
3. Every Conv, ConvTranspose and Gemm with a constant weight has a bias initializer, a vector with exactly one
   use; Gemm has alpha = beta = 1. A Gemm that adds something else than a constant vector is split:
   Gemm(A, B, C) = Gemm(A, B, 0) + beta * C.
4. Constants are initializers, graph inputs are not, and initializers that nobody reads are gone. (A Constant
   that is an output of the graph stays a node.)

What lies inside subgraphs and functions stays as it is, except that names are made unique.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from postquant.passes.layer import Layer, as_layer
from postquant.passes.rewiring import Initializers, constant_tensor, derive, is_constant, is_float_constant, is_op
from postquant.passes.subgraph import used_functions

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class FreeInputsPass(ir.passes.InPlacePass):
    """Takes initializers out of the graph's inputs.

    Files of IR version 3 list every weight as an input, for callers who want to override it; onnxruntime then
    folds nothing. We quantize the weights of the file, so they are constants.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the main graph."""
        graph = model.graph
        listed = [value for value in graph.inputs if value.is_initializer() and value.const_value is not None]
        for value in listed:
            graph.inputs.remove(value)
        # Below IR version 4 every initializer has to be an input.
        old = model.ir_version < 4
        if old:
            model.ir_version = 4
        return ir.passes.PassResult(model, modified=bool(listed) or old)


class LiftConstantsPass(ir.passes.InPlacePass):
    """Turns Constant nodes of the main graph into initializers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the main graph."""
        graph = model.graph
        count = 0
        for node in list(graph):
            if not is_op(node, "Constant") or node.outputs[0].is_graph_output():
                continue
            tensor = _constant_content(node)
            if tensor is None:
                continue
            old = node.outputs[0]
            name, old.name = old.name, None
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
            graph.register_initializer(value)
            old.replace_all_uses_with(value)
            graph.remove(node, safe=True)
            count += 1
        return ir.passes.PassResult(model, modified=count > 0)


def _constant_content(node: ir.Node) -> ir.TensorProtocol | None:
    attributes = node.attributes
    if "value" in attributes:
        return attributes["value"].as_tensor()
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32)):
        if name in attributes:
            return ir.Tensor(np.asarray(attributes[name].value, dtype))
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return ir.Tensor(np.asarray(attributes[name].value, np.int64))
    if "value_string" in attributes:
        return ir.StringTensor(np.array(attributes["value_string"].as_string().encode()))
    if "value_strings" in attributes:
        return ir.StringTensor(np.array([text.encode() for text in attributes["value_strings"].as_strings()]))
    return None  # a sparse value: the node stays


class NormalizeGemmPass(ir.passes.InPlacePass):
    """Moves alpha and beta of Gemm into its constants, and adds apart what is not a constant vector."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the main graph."""
        initializers = Initializers(model.graph)
        count = 0
        for node in list(model.graph):
            if is_op(node, "Gemm") and is_float_constant(node.inputs[1]):
                count += _scale_gemm(node, initializers)
                count += _split_gemm(node, initializers)
        return ir.passes.PassResult(model, modified=count > 0)


def _scale_gemm(node: ir.Node, initializers: Initializers) -> bool:
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if alpha != 1.0:
        weight = constant_tensor(node.inputs[1])
        initializers.replace(node, 1, derive(weight, lambda w: w * alpha, tuple(weight.shape.numpy())))
        node.attributes.pop("alpha")
    if beta != 1.0 and (bias is None or is_float_constant(bias)):
        if bias is not None:
            tensor = constant_tensor(bias)
            initializers.replace(node, 2, derive(tensor, lambda c: c * beta, tuple(tensor.shape.numpy())))
        node.attributes.pop("beta")
        return True
    return alpha != 1.0


def _split_gemm(node: ir.Node, initializers: Initializers) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or as_layer(node) is not None:
        return False
    graph = node.graph
    assert graph is not None
    beta = node.attributes.get_float("beta", 1.0)
    node.attributes.pop("beta", None)
    node.replace_input_with(2, None)
    dtype = constant_tensor(node.inputs[1]).dtype
    added = bias
    following: list[ir.Node] = []
    if beta != 1.0:
        factor = initializers.add(f"{node.name}.beta", ir.Tensor(np.array(beta, dtype.numpy()), dtype=dtype))
        scaled = ir.node("Mul", [bias, factor], name=f"{node.name}.scaled")
        following.append(scaled)
        added = scaled.outputs[0]
    old = node.outputs[0]
    add = ir.node("Add", [old, added], name=f"{node.name}.added")
    following.append(add)
    result = add.outputs[0]
    result.type, result.shape = old.type, old.shape
    name, old.name = old.name, None
    result.name = name
    for use in tuple(old.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = result
    graph.insert_after(node, following)
    return True


class SeparateWeightsPass(ir.passes.InPlacePass):
    """Gives every weight and bias of a layer one use, and every layer a bias."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the main graph."""
        initializers = Initializers(model.graph)
        count = 0
        for node in model.graph:
            if not is_op(node, *_WEIGHTED):
                continue
            inputs = (0, 1) if is_op(node, "Gemm", "MatMul") else (1,)
            layer = as_layer(node)
            for index in (*inputs, 2) if layer is not None and len(node.inputs) > 2 else inputs:
                count += _separate(node, index, initializers)
            if layer is not None:
                count += layer.complete(initializers) or _flatten_bias(layer, initializers)
        return ir.passes.PassResult(model, modified=count > 0)


def _separate(node: ir.Node, index: int, initializers: Initializers) -> bool:
    value = node.inputs[index]
    if value is None or not is_constant(value) or (len(value.uses()) == 1 and not value.is_graph_output()):
        return False
    node.replace_input_with(index, initializers.add(f"{value.name}.{node.name}", constant_tensor(value)))
    return True


def _flatten_bias(layer: Layer, initializers: Initializers) -> bool:
    """A Gemm's bias may be one number or have rank 2: makes it a vector."""
    tensor = constant_tensor(layer.node.inputs[2])
    shape = (layer.outputs,)
    if tuple(tensor.shape.numpy()) == shape:
        return False
    once = math.prod(tensor.shape.numpy()) == 1
    flat = derive(tensor, lambda c: np.full(shape, c.item()) if once else c.reshape(shape), shape)
    initializers.replace(layer.node, 2, flat)
    return True


class RemoveUnusedFunctionsPass(ir.passes.InPlacePass):
    """Removes model-local functions that no node calls."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model's list of functions."""
        used = {function.identifier() for function in used_functions(model, list(model.graph))}
        unused = [identifier for identifier in model.functions if identifier not in used]
        for identifier in unused:
            del model.functions[identifier]
        return ir.passes.PassResult(model, modified=bool(unused))


class _Names:
    """How nodes and values without a name are called: after their operator."""

    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or node.op_type

    def generate_value_name(self, value: ir.Value) -> str:
        node = value.producer()
        return value.name or ("value" if node is None else f"{node.name or node.op_type}_out")


def fix_names(model: ir.Model) -> ir.passes.PassResult:
    """Gives every node and value a unique name; names of graph inputs and outputs stay."""
    return common.NameFixPass(_Names())(model)


def remove_unused(model: ir.Model) -> ir.passes.PassResult:
    """Removes nodes, initializers and functions that no output depends on."""
    return ir.passes.Sequential(common.RemoveUnusedNodesPass(), RemoveUnusedFunctionsPass())(model)


def normalize(model: ir.Model) -> ir.passes.PassResult:
    """Brings a model into the form that the module describes.

    Args:
        model: The model; it is changed.
    """
    return ir.passes.Sequential(
        FreeInputsPass(),
        common.NameFixPass(_Names()),
        LiftConstantsPass(),
        NormalizeGemmPass(),
        SeparateWeightsPass(),
        common.RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),
        common.NameFixPass(_Names()),
    )(model)
