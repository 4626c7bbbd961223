"""Models of one quantizer of activations, float in and codes out: ours in their settings, and QuantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from postquant.runtime_ops.law_border import sigmoid_border
from postquant.runtime_ops.ops import functions_for
from postquant.runtime_ops.schema import DOMAIN, VERSION

Array = npt.NDArray[Any]
_OPSET, _IR = 21, 10
_STEP, _QMAX = 0.2, 15


class Quantizers:
    """Quantizers of one tensor.

    Args:
        shape: (N, C, H, W).
    """

    def __init__(self, shape: Sequence[int] = (1, 64, 56, 56)) -> None:
        self._rng = np.random.default_rng(9)
        self._channels = shape[1]
        self.x: Array = np.maximum(self._rng.normal(0.6, 0.8, tuple(shape)), 0).astype(np.float32)
        self.codes: Array = np.clip(np.rint(self.x / 0.02), 0, 255).astype(np.uint8)

    def linear(self) -> bytes:
        """QuantizeLinear."""
        return self._model("QuantizeLinear", self._step(), {}, domain="")

    def adaptive(self, features: int, hidden: int, *, from_codes: bool = False) -> bytes:
        """AdaptiveQuantize or AdaptiveRequantize.

        Args:
            features: As the attribute.
            hidden: Width of the hidden layer.
            from_codes: Whether the input is uint8.
        """
        count = self._channels * (features & 1) + (features >> 1 & 1) + (features >> 2 & 1)
        network = {
            "w1": self._rng.normal(0, 0.05, (hidden, count)).astype(np.float32),
            "b1": np.zeros(hidden, np.float32),
            "w2": self._rng.normal(0, 0.05, (1, hidden)).astype(np.float32),
            "b2": np.ones(1, np.float32),
        }
        constants: dict[str, Array] = {**self._step(), **network}
        if from_codes:
            constants = {**self._stored(), **constants}
        attributes = {"features": features, "beta_min": 0.5, "beta_max": 2.0, "qmin": 0, "qmax": _QMAX}
        return self._model("AdaptiveRequantize" if from_codes else "AdaptiveQuantize", constants, attributes)

    def border(self, *, table: bool = False, window: int = 1, rank: int = 0) -> bytes:
        """BorderQuantize.

        Args:
            table: Whether the border depends on the value.
            window: Height and width of the window; 1: none.
            rank: Rank across channels; 0: none.
        """
        channels = self._channels
        taps = self._rng.integers(-30, 31, (channels, window, window)).astype(np.int8)
        taps[:, window // 2, window // 2] = 0
        if table:
            border = sigmoid_border(self._rng.normal(0, 0.3, (channels, 3)), 0, _QMAX)
        else:
            border = self._rng.uniform(0.4, 0.6, (channels, 1)).astype(np.float32)
        constants: dict[str, Array] = {
            **self._step(),
            "border": border,
            "window": taps,
            "window_scale": np.full(channels, 2e-5, np.float32),
            "left": self._rng.integers(-127, 128, (rank, channels)).astype(np.int8),
            "left_scale": np.full(rank, 2e-3, np.float32),
            "right": self._rng.integers(-127, 128, (channels, rank)).astype(np.int8),
            "right_scale": np.full(channels, 1e-5, np.float32),
        }
        return self._model("BorderQuantize", constants, {"channels": channels, "qmin": 0, "qmax": _QMAX})

    def levels(self, count: int = 16) -> bytes:
        """LutRequantize with a table for each channel.

        Args:
            count: Levels of each.
        """
        return self._model("LutRequantize", self._levels(count), {"axis": -3})

    def feedback(self, rank: int, cell: int = 1, count: int = 16) -> bytes:
        """FeedbackRequantize with a table for each channel and 8 groups.

        Args:
            rank: Rank across channels.
            cell: Side of the squares of places whose channels are rounded together.
            count: Levels of each.
        """
        channels = cell * cell * self._channels
        constants: dict[str, Array] = {
            **self._levels(count),
            "group": (np.arange(channels) % 8).astype(np.uint8),
            "left": self._rng.integers(-127, 128, (rank, channels)).astype(np.int8),
            "left_scale": np.full(rank, 1e-3, np.float32),
            "right": self._rng.integers(-127, 128, (channels, rank)).astype(np.int8),
            "right_scale": np.full(channels, 1e-3, np.float32),
        }
        return self._model("FeedbackRequantize", constants, {"axis": -3, "cell": cell})

    def _levels(self, count: int) -> dict[str, Array]:
        return {
            **self._stored(),
            "scale": np.asarray(_STEP / 16, np.float32),
            "zero_point": np.asarray(0, np.uint8),
            "table": np.sort(self._rng.integers(0, 256, (self._channels, count)), axis=1).astype(np.uint8),
        }

    @staticmethod
    def _stored() -> dict[str, Array]:
        return {"x_scale": np.asarray(0.02, np.float32), "x_zero_point": np.asarray(0, np.uint8)}

    @staticmethod
    def _step() -> dict[str, Array]:
        return {"step": np.asarray(_STEP, np.float32), "zero_point": np.asarray(0, np.uint8)}

    def _model(
        self, operator: str, constants: dict[str, Array], attributes: dict[str, Any], domain: str = DOMAIN
    ) -> bytes:
        adaptive = operator.startswith("Adaptive")
        outputs = ["codes", "steps"] if adaptive else ["codes"]
        node = helper.make_node(operator, ["x", *constants], outputs, domain=domain, **attributes)
        kind = onnx.TensorProto.UINT8 if "x_scale" in constants else onnx.TensorProto.FLOAT
        values = [helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, self.x.shape)]
        values += [helper.make_tensor_value_info("steps", onnx.TensorProto.FLOAT, [1])] if adaptive else []
        initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        x = helper.make_tensor_value_info("x", kind, self.x.shape)
        graph = helper.make_graph([node], "quantizer", [x], values, initializers)
        imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        functions = functions_for([operator], opset=_OPSET) if domain else []
        model = helper.make_model(graph, opset_imports=imports, ir_version=_IR, functions=functions)
        return bytes(model.SerializeToString())
