"""Calibration data on disk, one ``.npz`` per feed, so that every quantizer reads the same bytes one feed at a time.

CIFAR-10: 512 of the 1024 samples, in the order of ``RandomState(0).permutation``; elsewhere the first ones, which are
stored in shuffled order. The preprocessing is that of ``eval.py``.
"""

from __future__ import annotations

import importlib.util
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from cases import DATA, Case

Feed = dict[str, Any]  # input name -> array


def load_eval() -> types.ModuleType:
    """The module ``eval.py`` of the data folder."""
    spec = importlib.util.spec_from_file_location("shared_eval", DATA / "eval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def feeds(case: Case, count: int) -> Iterator[Feed]:
    """The first ``count`` calibration feeds of ``case``, each with a batch of one sample (STS: one pair)."""
    evaluation = load_eval()
    image_input = onnx.load(case.path, load_external_data=False).graph.input[0]
    options: dict[str, Any] = {} if case.dataset == "sts" else {"name": image_input.name}
    if case.dataset == "face":
        options["size"] = tuple(d.dim_value for d in image_input.type.tensor_type.shape.dim[2:4])
    if not case.dataset.startswith("cifar10"):
        yield from evaluation.batches(case.dataset, "calib", batch=1, limit=count, **options)
        return
    everything = list(evaluation.batches(case.dataset, "calib", batch=1, **options))
    for index in np.random.RandomState(0).permutation(len(everything))[:count]:  # the published order
        yield everything[index]


def write_feeds(case: Case, count: int, folder: pathlib.Path) -> pathlib.Path:
    """Writes ``count`` feeds to ``folder/<case>-<count>``, once, and returns that folder."""
    result = folder / f"{case.name}-{count}"
    if not result.exists():
        unfinished = folder / f".{result.name}"
        unfinished.mkdir(parents=True, exist_ok=True)
        for index, feed in enumerate(feeds(case, count)):
            np.savez(unfinished / f"{index:05d}.npz", **feed)
        unfinished.rename(result)
    return result
