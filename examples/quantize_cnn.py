"""A CNN from file to file: quantize it to 8 bits, run the result on a plain onnxruntime, compare accuracies.

    python examples/quantize_cnn.py --out out

The model is the embedded demo's; put your own ``.onnx`` file and ``.npz`` of samples in its place. On the command line:

    postquant quantize out/digits.onnx --calib out/calibration.npz --out out/int8
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import numpy.typing as npt
import onnxruntime

import postquant
from postquant.pipeline.demo import Digits, load_digits


def accuracy(model: pathlib.Path, digits: Digits) -> float:
    """Share of the test images that ``model`` gets right."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits: npt.NDArray[np.float32] = session.run(None, {"image": digits.test})[0]
    return float((logits.argmax(axis=1) == digits.test_labels).mean())


def main() -> None:
    """Writes model and samples as a user has them, quantizes, and prints two accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out: pathlib.Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    model = out / "digits.onnx"
    model.write_bytes(digits.model)
    # Calibration data: one array per model input, the first axis counts samples. Labels are not needed.
    np.savez(out / "calibration.npz", image=digits.calibration)

    postquant.quantize(model, out / "calibration.npz", postquant.QuantConfig(), out=out / "int8")

    print(f"float: {accuracy(model, digits):.4f}")
    print(f"int8:  {accuracy(out / 'int8' / 'model.onnx', digits):.4f}")


if __name__ == "__main__":
    main()
