"""All folds in the order that works: what exposes constants first, then what uses them, to a fixed point."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from postquant.passes.fold_arithmetic import FoldArithmeticPass
from postquant.passes.fold_batch_norm import FoldBatchNormPass
from postquant.passes.fold_clip import FoldClipPass
from postquant.passes.fold_constants import FoldConstantsPass
from postquant.passes.fold_identity import FoldIdentityPass
from postquant.passes.fold_pad import FoldPadPass
from postquant.passes.normalize import LiftConstantsPass, NormalizeGemmPass, fix_names, remove_unused

# A fold may open the way for another one; chains longer than this do not occur.
_STEPS = 8


def fold(model: ir.Model) -> tuple[str, ...]:
    """Folds everything that can be folded exactly (up to rounding) into the layers of a model.

    Args:
        model: The model; it is changed. Initializers that are graph inputs are not constants.

    Returns:
        Lines for the report: what could not be folded.
    """
    fix_names(model)
    constants = FoldConstantsPass()
    ir.passes.Sequential(FoldIdentityPass(), LiftConstantsPass(), constants, NormalizeGemmPass())(model)
    # Only a known shape tells whether a constant per channel widens its operand.
    common.ShapeInferencePass()(model)
    ir.passes.PassManager(
        [FoldArithmeticPass(), FoldBatchNormPass(), FoldPadPass(), FoldClipPass(), FoldIdentityPass()],
        steps=_STEPS,
        early_stop=True,
    )(model)
    remove_unused(model)
    return tuple(constants.notes)
