"""onnxsim, kept at a distance, for shape arithmetic and other things that exporters leave behind.

onnxsim sees the graph without its weights, which stand in as inputs: 2.5 GB cost as little as 2.5 MB, and the
numbers of the weights are ours alone to fold. It runs in a process of its own, because it is native code that
may crash, and because it imports a good deal that is of no use afterwards. A graph that has no operator that
onnxsim could do something about does not need it at all.

Whatever goes wrong there (not installed, crash, time, another signature) leaves the model as it was, with a
note; onnxscript's constant folding then does the shape arithmetic.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from postquant.passes.rewiring import is_op
from postquant.passes.skeleton import declare_weights, from_skeleton, to_skeleton
from postquant.runtime_ops.errors import ModelError

_SECONDS = 300.0
# Operators that compute on data and leave nothing to simplify that our own folds do not do.
_PLAIN = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization", "InstanceNormalization"),
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softmax", "Erf"),
    *("Add", "Sub", "Mul", "Div", "Concat", "Flatten", "Identity", "Dropout", "Constant", "Pad", "Slice"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "DepthToSpace", "SpaceToDepth"),
)
_PROGRAM = """
import sys
import onnx
import onnxsim
model, checked = onnxsim.simplify(onnx.load(sys.argv[1]), skip_fuse_bn=True)
onnx.save(model, sys.argv[2])
"""


def needs_onnxsim(model: ir.Model) -> bool:
    """Whether a graph holds anything that onnxsim could simplify."""
    return not all(is_op(node, *_PLAIN) for node in model.graph)


def run_onnxsim(model: ir.Model) -> ir.Model:
    """The model simplified by onnxsim; the model passed in is not changed.

    Raises:
        ModelError: If onnxsim is missing, fails, crashes, or returns a model with another signature.
    """
    proto, weights = to_skeleton(model)
    declare_weights(proto, weights)
    with tempfile.TemporaryDirectory(prefix="postquant-") as folder:
        before, after = pathlib.Path(folder, "before.onnx"), pathlib.Path(folder, "after.onnx")
        before.write_bytes(proto.SerializeToString())
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROGRAM, str(before), str(after)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ModelError("onnxsim failed", found=f"no result after {_SECONDS:.0f} s") from None
        except OSError as error:
            raise ModelError("onnxsim failed", found=error.strerror or str(error)) from error
        if done.returncode < 0:
            raise ModelError("onnxsim failed", found=f"a crash with signal {-done.returncode}")
        if done.returncode > 0 or not after.exists():
            lines = done.stderr.strip().splitlines()
            raise ModelError("onnxsim failed", found=lines[-1] if lines else f"exit code {done.returncode}")
        result = onnx.ModelProto()
        try:
            result.ParseFromString(after.read_bytes())
        except DecodeError as error:
            raise ModelError("onnxsim failed", found="a damaged result") from error
    _check_signature(proto, result, frozenset(weights))
    # Types of the outputs are the user's: onnxsim may have refined symbolic sizes.
    del result.graph.output[:]
    result.graph.output.extend(proto.graph.output)
    _keep_functions(proto, result)
    return from_skeleton(result, weights)


def _check_signature(before: onnx.ModelProto, after: onnx.ModelProto, weights: frozenset[str]) -> None:
    kept = {value.name: value for value in after.graph.input}
    for value in before.graph.input:
        present = kept.pop(value.name, None)
        if present is None and value.name in weights:
            continue  # nothing reads it any more
        if present is None or present.type != value.type:
            raise ModelError("onnxsim failed", found=f"another type, or a frozen size, at input {value.name}")
    if kept or [value.name for value in before.graph.output] != [value.name for value in after.graph.output]:
        raise ModelError("onnxsim failed", found="other inputs or outputs")


def _keep_functions(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    if len(after.functions) < len(before.functions):
        del after.functions[:]
        after.functions.extend(before.functions)
    present = {entry.domain for entry in after.opset_import}
    after.opset_import.extend(entry for entry in before.opset_import if entry.domain not in present)


def run_onnxscript(model: ir.Model) -> None:
    """Shape arithmetic and constants by onnxscript; the model is changed."""
    import onnxscript.optimizer  # costs a fifth of a second, and is the exception

    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, output_size_limit=1 << 16)
