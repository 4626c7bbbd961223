"""The few moves that every fold is made of: reading constants, deriving weights, taking nodes out.

None of them touches what lies inside subgraphs or functions, and none changes a tensor that somebody else
still reads: a weight with two users is copied for the one that changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.free_memory import release_tensor

Array = npt.NDArray[np.generic]

# A derived tensor of at least this size whose source lies in a file is computed when it is read, each time.
_LAZY_BYTES = 1 << 20
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that no caller of the model can override."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def is_float_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant of a type that folds can compute with."""
    return is_constant(value) and constant_tensor(value).dtype in _FLOATS


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of a constant."""
    if value is None or value.const_value is None:
        raise ValueError(f"{value} is not a constant")
    return value.const_value


def constant_array(value: ir.Value | None) -> Array | None:
    """The content of a constant, or None if the value is not one."""
    return constant_tensor(value).numpy() if is_constant(value) else None


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether a node is one of some operators of the ONNX domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def sole_user(value: ir.Value, graph: ir.Graph) -> ir.Node | None:
    """The node of ``graph`` that alone reads ``value``, once; None if there is another reader or an output."""
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.graph is not graph:
        return None
    return uses[0].node


def take_out(node: ir.Node, replacement: ir.Value) -> None:
    """Removes a node whose first output is from now on what ``replacement`` holds.

    Where nothing but the node read ``replacement``, it takes over the name too: names of the original model
    then still stand for the same numbers. The caller asks :func:`can_take_out` first.
    """
    old = node.outputs[0]
    graph = node.graph
    assert graph is not None
    visible = old.is_graph_output()
    inner = replacement.producer() is not None and not replacement.is_graph_output()
    rename = inner and (visible or len(replacement.uses()) == 1)
    old.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if rename:
        name, old.name = old.name, None
        replacement.name = name
        replacement.shape = old.shape if old.shape is not None else replacement.shape
        replacement.type = old.type if old.type is not None else replacement.type


def bypass(node: ir.Node, source: ir.Value) -> None:
    """Removes a node whose readers compute from ``source`` now; its output is no output of the graph."""
    graph = node.graph
    assert graph is not None
    node.outputs[0].replace_all_uses_with(source)
    graph.remove(node, safe=True)


def can_take_out(node: ir.Node, replacement: ir.Value) -> bool:
    """Whether :func:`take_out` keeps the names of all graph outputs."""
    if not node.outputs[0].is_graph_output():
        return True
    return replacement.producer() is not None and not replacement.is_graph_output()


def derive(
    source: ir.TensorProtocol,
    compute: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    shape: tuple[int, ...],
) -> ir.TensorProtocol:
    """A tensor computed from another one, of the same type.

    Args:
        source: The tensor to start from.
        compute: float64 array of the source's shape -> array of ``shape``.
        shape: The result's shape.

    Returns:
        The result; lazily evaluated where the source is large and not in memory either.
    """
    dtype = source.dtype

    def evaluate() -> ir.TensorProtocol:
        mapped = isinstance(source, ir.ExternalTensor) and source.raw is None
        result = compute(source.numpy().astype(np.float64))
        if mapped:
            release_tensor(source)  # nobody else reads it now: its pages need not stay
        return ir.Tensor(np.ascontiguousarray(result, dtype=dtype.numpy()), dtype=dtype)

    if isinstance(source, ir.ExternalTensor | ir.LazyTensor) and source.nbytes >= _LAZY_BYTES:
        return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape))
    return evaluate()


class Initializers:
    """Makes and changes the initializers of one graph, with names that nothing else has."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._names: set[str] = set()
        for node in ir.traversal.RecursiveGraphIterator(graph):
            self._names.update(
                value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name
            )
        self._names.update(value.name for value in (*graph.inputs, *graph.outputs) if value.name)
        self._names.update(graph.initializers)

    def add(self, base: str, tensor: ir.TensorProtocol, *, own: bool = False) -> ir.Value:
        """A new initializer named ``base``, or ``base_1`` and so on where that is taken.

        With ``own`` the name belonged to a value that the initializer replaces and is taken as it is.
        """
        name, count = base, 0
        while name in self._names and not own:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> None:
        """Gives one input of a node another constant; other users of the old one keep it."""
        old = node.inputs[index]
        assert old is not None
        if len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value = tensor
            old.shape = ir.Shape(tensor.shape.numpy())
            old.type = ir.TensorType(tensor.dtype)
            return
        node.replace_input_with(index, self.add(f"{old.name}.{node.name or node.op_type}", tensor))

    def set_input(self, node: ir.Node, index: int, tensor: ir.TensorProtocol, base: str) -> None:
        """Like :meth:`replace`, for an input that may be absent."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        if node.inputs[index] is not None:
            self.replace(node, index, tensor)
        else:
            node.replace_input_with(index, self.add(base, tensor))
