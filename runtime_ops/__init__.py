"""Layer 1, meaning: what every quantized format and operator computes.

Knows no graphs, no data and no files. ``register`` adds the native kernels to an onnxruntime session.
"""

from postquant.runtime_ops.library import register

__all__ = ["register"]
