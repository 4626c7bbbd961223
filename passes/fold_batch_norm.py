"""BatchNormalization into the layer before it, or into the layers behind it.

With s = gamma / sqrt(var + eps) per channel and t = beta - mean * s

    BN(W x + b) = (s W) x + (s b + t)
    W BN(x) + b = (W s) x + (W t + b)      if no zero padding lies between, or t = 0

A convolution that pads puts zeros beside BN(x); folded, it would put BN(0) = t there as if it were x = 0.
"""

from __future__ import annotations

import onnx_ir as ir

from postquant.passes.affine import fold_after, fold_before, read_batch_norm
from postquant.passes.rewiring import Initializers


class FoldBatchNormPass(ir.passes.InPlacePass):
    """Folds BatchNormalization into Conv, ConvTranspose and Gemm, before or behind it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in the main graph; layers in front are preferred, they always fold exactly."""
        initializers = Initializers(model.graph)
        count = fold_after(model.graph, read_batch_norm, initializers)
        count += fold_before(model.graph, read_batch_norm, initializers)
        return ir.passes.PassResult(model, modified=count > 0)
