"""Whole networks: a quantized file beside its float model and onnxruntime's own 8-bit version of that model."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
from onnx import helper
from process import work
from rounds import Contestant
from worker import Job

_FEEDS = 4


def random_feed(model: pathlib.Path, rng: np.random.Generator, symbolic: int) -> dict[str, Any]:
    """One random feed: normal floats, zeros and ones for integers (token ids, masks).

    Args:
        model: The model.
        rng: Randomness.
        symbolic: Size of dimensions without one, but the first, which is 1.
    """
    graph = onnx.load(model, load_external_data=False).graph
    constants = {initializer.name for initializer in graph.initializer}
    feed: dict[str, Any] = {}
    for value in graph.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value or (symbolic if axis else 1) for axis, d in enumerate(dims)]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        numbers = rng.normal(0, 1, shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, shape)
        feed[value.name] = numbers.astype(dtype)
    return feed


def network_contestants(
    floating: pathlib.Path, quantized: pathlib.Path, isas: list[str], symbolic: int, folder: pathlib.Path
) -> list[Contestant]:
    """The float model, onnxruntime's own 8-bit model of it, and the quantized file with and without our library.

    onnxruntime calibrates on random numbers: that decides its accuracy, which is not measured here, and not its speed.

    Args:
        floating: The float model.
        quantized: What was made of it.
        isas: Instruction sets of the library; "" is its own choice.
        symbolic: As in :func:`random_feed`.
        folder: Where onnxruntime's model goes.

    Raises:
        SystemExit: If onnxruntime cannot quantize the model.
    """
    rng = np.random.default_rng(3)
    feeds = [random_feed(floating, rng, symbolic) for _ in range(_FEEDS)]
    calibration = folder / f"{floating.stem}-calibration"
    calibration.mkdir(exist_ok=True)
    for index, feed in enumerate(feeds):
        np.savez(calibration / f"{index}.npz", **feed)
    theirs = folder / f"{floating.stem}-onnxruntime-int8.onnx"
    if not theirs.exists():
        result = work(Job("onnxruntime", str(floating), str(calibration), str(theirs), 8, 8))
        if "error" in result:
            raise SystemExit(f"onnxruntime cannot quantize {floating}: {result['error']}")
    references = [Contestant("fp32", floating, feeds[0]), Contestant("int8, onnxruntime's own", theirs, feeds[0])]
    return references + Contestant.ours("postquant", quantized, feeds[0], isas)
