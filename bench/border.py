"""Rounding borders at 4-bit activations: what each part of them gives, against rounding to nearest.

    python bench/border.py [--models resnet20,mobilenetv2] [--variants NAME,...] [--evaluate] [--speed] [--markdown]

A model is quantized (W8A4, without borders) with a part of its calibration data. Every variant then changes the inputs
of its inner layers, and its outputs are compared with the float model's on the calibration data that nothing has seen.
``--evaluate`` runs the variants on evaluation data too; ``--speed`` times them, with and without the library of native
operators. Names: ``nearest``, ``near`` (window in the same channel), ``across`` (low rank), ``both``; ``/R`` a rank of
at most a share R of the channels, ``*S`` a strength, ``@F`` all steps times F.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from cases import CASES, Case, require_data
from feeds import Feed, feeds
from lines import add_output_options, write_lines
from process import evaluate

from postquant.calib.border import BorderOptions, borders_of, with_borders
from postquant.calib.border_terms import BorderTerms
from postquant.passes.biases import fit_biases
from postquant.passes.border_plan import border_sites
from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.pipeline import stages
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Activations, Border, QuantConfig
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.measure import SimilarityMeter
from postquant.pipeline.runtime import session
from postquant.runtime_ops.library import library_path

# Samples that calibrate, and samples that compare.
SPLITS = {"resnet20": (512, 512), "mobilenetv2": (160, 96)}
VARIANTS = [
    "nearest",
    "nearest@0.94",
    "nearest@1.06",
    "nearest@1.12",
    "near",
    "across/1",
    "across/0.125",
    "both/1",
    "both/0.125",
    "both/0.125*0.35",
    "both/0.125*1",
    "both/0.125@0.94",
    "both/0.125@1.06",
    "both/0.125@1.12",
]
_NAME = re.compile(r"(nearest|near|across|both)(?:/([\d.]+))?(?:\*([\d.]+))?(?:@([\d.]+))?")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a name stands for; the terms are None for rounding to nearest."""

    name: str
    terms: BorderTerms | None
    factor: float

    @classmethod
    def of(cls, name: str) -> Variant:
        """Reads a name, or ends the program."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise SystemExit(f"no such variant: {name}")
        kind, share, strength, factor = match.groups()
        terms = None
        if kind != "nearest":
            default = BorderTerms()
            terms = BorderTerms(
                near=kind != "across",
                across=kind != "near",
                strength=float(strength or default.strength),
                energy=1.0 if share == "1" else default.energy,
                largest_rank=float(share or default.largest_rank),
            )
        return cls(name, terms, float(factor or 1))


class Study:
    """One model, quantized without borders."""

    def __init__(self, case: Case, folder: pathlib.Path) -> None:
        self.folder = folder
        calibrating, comparing = SPLITS[case.name]
        data = list(feeds(case, calibrating + comparing))
        self.held_out = data[calibrating:]
        labels = np.load(case.path.parent / "calib.npz")["y"]
        order = np.random.RandomState(0).permutation(len(labels)) if case.dataset == "cifar10" else range(len(labels))
        self.labels = [int(labels[i]) for i in order][calibrating : calibrating + comparing]
        config = QuantConfig(wbits=8, abits=4, activations=Activations.INT, border=Border.OFF)
        self.source = open_calibration(data[:calibrating], load_model(case.path), config)
        self.model, self.plan = _quantized(case, data[:calibrating], config)
        self.sites, _ = border_sites(self.model, self.plan, bits=4)
        reference = onnxruntime.InferenceSession(case.path, providers=["CPUExecutionProvider"])
        self.outputs = [reference.run(None, feed)[0] for feed in self.held_out]

    def write(self, variant: Variant) -> pathlib.Path:
        """The quantized model of a variant."""
        borders = {}
        if variant.terms is not None:
            options = BorderOptions(terms=variant.terms)
            borders = borders_of(self.model, self.plan, self.sites, self.source, options)
        changed = with_borders(self.plan, self.sites, borders, variant.factor)
        path = self.folder / "variant.onnx"
        save_model(emit(self.model, fit_biases(self.model, changed)), path)
        return path

    def held_out_line(self, path: pathlib.Path) -> dict[str, Any]:
        """Quality on held-out calibration data."""
        runner, meter, right = session(path), SimilarityMeter(), 0
        name = runner.get_inputs()[0].name
        for feed, wanted, label in zip(self.held_out, self.outputs, self.labels, strict=True):
            got = runner.run(None, {name: next(iter(feed.values()))})[0]
            meter.add(wanted, got)
            right += int(got.argmax() == label)
        return {"sqnr_db": meter.result().sqnr_db, "top1": 100 * right / len(self.labels)}


def _quantized(case: Case, data: list[Feed], config: QuantConfig) -> tuple[ir.Model, QuantPlan]:
    """The float model as it was when its plan was emitted, and that plan.

    A result folder has no float model, and the one that is recovered from it clips to the ranges of the plan's steps.
    """
    seen: list[tuple[ir.Model, QuantPlan]] = []

    def watch(model: ir.Model, plan: QuantPlan, **options: Any) -> ir.Model:
        seen.append((model, plan))
        return emit(model, plan, **options)

    with unittest.mock.patch.object(stages, "emit", watch):
        quantize(case.path, data, config)
    return seen[-1]


def times(path: pathlib.Path, feed: Feed, *, native: bool, seconds: float = 3.0) -> float:
    """The least time of one sample, in milliseconds, on one thread."""
    runner = session(path, threads=1, native=native)
    inputs = {runner.get_inputs()[0].name: next(iter(feed.values()))}
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        runner.run(None, inputs)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def lines(options: argparse.Namespace, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every measurement that the options ask for."""
    for case in (case for case in CASES if case.name in options.models):
        study = Study(case, folder)
        for name in options.variants:
            path = study.write(Variant.of(name))
            line: dict[str, Any] = {"model": case.name, "variant": name}
            if not options.no_held_out:
                line["held_out"] = study.held_out_line(path)
            if options.evaluate:
                found = evaluate(case, path, limit=options.limit, threads=2, reference=True, library=library_path())
                line["evaluation"] = {key: found[key] for key in ("sqnr_db", "top1", "agree") if key in found}
                line |= {"error": found["error"]} if "error" in found else {}
            if options.speed:
                feed = study.held_out[0]
                line["ms"] = {str(native): times(path, feed, native=native) for native in (False, True)}
            yield line


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of docs/border.md."""
    rows = [
        "| model | variant | held out: SQNR dB | top1 | evaluation: SQNR dB | top1 | ms, stock | ms, library |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in results:
        held, found, speed = line.get("held_out", {}), line.get("evaluation", {}), line.get("ms", {})
        cells = [
            _shown(held.get("sqnr_db"), 2),
            _shown(held.get("top1"), 1),
            _shown(found.get("sqnr_db"), 2),
            _shown(None if "top1" not in found else 100 * found["top1"], 1),
            _shown(speed.get("False"), 2),
            _shown(speed.get("True"), 2),
        ]
        rows.append(f"| {line['model']} | {line['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> int:
    """Runs the measurements; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(SPLITS))
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--evaluate", action="store_true", help="run evaluation data too")
    parser.add_argument("--no-held-out", action="store_true", help="leave out held-out calibration data")
    parser.add_argument("--limit", type=int, help="evaluate this many samples only")
    parser.add_argument("--speed", action="store_true", help="time one sample on one thread")
    add_output_options(parser)
    options = parser.parse_args()
    require_data()
    with tempfile.TemporaryDirectory() as folder:
        return write_lines(lines(options, pathlib.Path(folder)), options, markdown)


if __name__ == "__main__":
    sys.exit(main())
