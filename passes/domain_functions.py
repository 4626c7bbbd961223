"""What the operators of ``ai.postquant`` mean, inside the model that has them: :func:`add_functions`."""

from __future__ import annotations

import onnx_ir as ir

from postquant.runtime_ops.ops import functions_for
from postquant.runtime_ops.schema import DOMAIN, VERSION

# Functions came with IR version 8.
_LEAST_IR_VERSION = 8


def add_functions(model: ir.Model) -> None:
    """Gives a model the function bodies of all operators of ``ai.postquant`` that its main graph has.

    Args:
        model: Changed in place.
    """
    used = [node.op_type for node in model.graph if node.domain == DOMAIN]
    if not used:
        return
    model.graph.opset_imports[DOMAIN] = VERSION
    model.ir_version = max(model.ir_version, _LEAST_IR_VERSION)
    for proto in functions_for(used, opset=model.graph.opset_imports[""]):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
