"""Everything in memory: samples from a Python iterable, settings per layer, the result as an object.

python examples/from_python.py
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import postquant
from postquant.pipeline.demo import load_digits


def main() -> None:
    """Quantizes to 4-bit weights, but leaves the classifier in float."""
    digits = load_digits()

    def samples() -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        """One feed after the other, as for InferenceSession.run; never all of them in memory."""
        for image in digits.calibration:
            yield {"image": image[np.newaxis]}

    config = postquant.QuantConfig(
        wbits=4,
        abits=8,
        override=(postquant.OverrideConfig(op_type="Gemm", float=True),),
    )
    result = postquant.quantize(digits.model, samples, config)

    print(f"weights quantized: {len(result.plan.weights)}")
    for node, reason in result.plan.floats.items():
        print(f"left in float: {node}: {reason}")


if __name__ == "__main__":
    main()
