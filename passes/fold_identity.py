"""Nodes that give back what they get: Identity, Dropout in inference, Concat or Sum of one, idle Transpose.

A node stays where taking it out would lose a name: y = Identity(x) with y an output of the graph and x an
input, a constant, or an output itself.
"""

from __future__ import annotations

import onnx_ir as ir

from postquant.passes.rewiring import can_take_out, constant_array, is_op, take_out


class FoldIdentityPass(ir.passes.InPlacePass):
    """Removes nodes of the main graph that give back their input."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Removes them in the main graph."""
        count = 0
        for node in list(model.graph):
            source = node.inputs[0] if node.inputs else None
            if source is not None and _gives_back(node) and can_take_out(node, source):
                take_out(node, source)
                count += 1
        return ir.passes.PassResult(model, modified=count > 0)


def _gives_back(node: ir.Node) -> bool:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False  # the mask of a Dropout
    if is_op(node, "Identity"):
        return True
    if is_op(node, "Concat", "Sum", "Mean", "Max", "Min"):
        return len(node.inputs) == 1
    if is_op(node, "Transpose"):
        order = tuple(node.attributes.get_ints("perm", ()))
        return bool(order) and order == tuple(range(len(order)))
    if is_op(node, "Dropout"):
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return True
        training = constant_array(node.inputs[2])
        return training is not None and not bool(training.reshape(-1)[0])
    return False
