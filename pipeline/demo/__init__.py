"""The embedded demo: a small trained network, real handwritten digits, and a comparison with onnxruntime's quantizer.

``digits.onnx`` and ``digits.npz`` lie beside this file; ``README.md`` says where they come from.
"""

from postquant.pipeline.demo.digits import Digits, load_digits
from postquant.pipeline.demo.run import run_demo

__all__ = ["Digits", "load_digits", "run_demo"]
