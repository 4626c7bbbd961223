"""A model as a protobuf message without its weights, and the way back.

Tools that want a message (the version converter, onnxsim, shape inference, the file itself) never see the
large tensors: a message holds at most 2 GB, and each copy of it costs memory. Large initializers are set
aside by name; for tools that must know their types they stand in as graph inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.helper
import onnx_ir as ir

# Smaller tensors stay in the message: tools read shapes, axes, scales of Resize and the like.
SMALL_BYTES = 1024

Weights = dict[str, ir.TensorProtocol]


def to_skeleton(model: ir.Model, *, small_bytes: int = SMALL_BYTES) -> tuple[onnx.ModelProto, Weights]:
    """The message of a model without its large initializers.

    Args:
        model: The model; it is not changed.
        small_bytes: Initializers of the main graph below this size stay in the message.

    Returns:
        The message, and name -> tensor of the initializers that were left out.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        content = getattr(model, field)
        if content:
            setattr(proto, field, content)
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for key, text in model.metadata_props.items():
        proto.metadata_props.add(key=key, value=text)
    for function in model.functions.values():
        # Value infos inside functions exist from IR 10 on.
        ir.serde.serialize_function_into(proto.functions.add(), function, create_value_info=model.ir_version >= 10)

    graph, weights = proto.graph, Weights()
    graph.name = model.graph.name or "graph"
    graph.doc_string = model.graph.doc_string or ""
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue  # a graph input that onnx_ir lists without content
        if tensor.nbytes < small_bytes:
            graph.initializer.append(inline_tensor(tensor, name))
        else:
            weights[name] = tensor
    for node in model.graph:
        ir.serde.serialize_node_into(graph.node.add(), node, model_ir_version=model.ir_version)
        for value in node.outputs:
            if value.name and value.type is not None and not value.is_graph_output():
                ir.serde.serialize_value_into(graph.value_info.add(), value)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    for key, text in model.graph.metadata_props.items():
        graph.metadata_props.add(key=key, value=text)
    return proto, weights


def inline_tensor(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """A tensor as a message that holds its content, wherever that content is now."""
    if isinstance(tensor, ir.ExternalTensor):
        proto = onnx.TensorProto(data_type=int(tensor.dtype), dims=tensor.shape.numpy(), raw_data=tensor.tobytes())
    else:
        proto = ir.serde.serialize_tensor(tensor)
    proto.name = name
    return proto


def declare_weights(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Adds the weights that were set aside to a message's graph inputs, with their types and shapes."""
    present = {value.name for value in proto.graph.input}
    for name, tensor in weights.items():
        if name not in present:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), tensor.shape.numpy()))


def from_skeleton(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    """The model of a message whose graph inputs named in ``weights`` become initializers again.

    A weight that the message no longer mentions is dropped.
    """
    model = ir.serde.deserialize_model(proto)
    graph = model.graph
    for value in list(graph.inputs):
        tensor = weights.get(value.name or "")
        if tensor is not None:
            graph.inputs.remove(value)
            value.const_value = tensor
            graph.register_initializer(value)
    return model
