"""What each part of learning gives, step by step.

    python bench/ablation_learning.py [--model resnet20] [--widths w4a4,w3a3,w2a4,w2a2] [--seeds 0,1,2]
        [--iterations 1000] [--network-iterations 1000] [--samples 512] [--rows NAME,...] [--limit N] [--speed]
        [--json FILE] [--markdown]

A model is calibrated once per width, and every learned row starts from the same plan: EasyQuant with compensated
rounding and corrected biases, without code books. Blocks are learned as ``postquant quantize --learn`` learns them, in
as many steps as asked for; one row learns the whole network behind them. Task metric and SQNR against the float model
are those of evaluation data, on onnxruntime and the written file; ``--speed`` times one sample without and with the
library of native operators. Rows:

    nearest      scales by the least squared error, nearest codes
    bias         + corrected biases
    start        EasyQuant with compensated rounding
    books        start + code books of activations, where they gain anything
    feedback     books + error feedback
    rounding     start + codes of weights and steps of activations
    scales       + biases and scales of weights
    masks        scales + QDrop, as `--learn` has it from 4 bits on; no other row has masks
    own          + rounding borders that see their own value
    neighbours   + rounding borders that see their neighbours as well
    adaptive     scales + steps for every sample, without borders
    network      scales + the whole network
    levels       scales + code books of activations, whose levels are learned
    turns        levels + error feedback
    weighed      scales + errors that count by what they do to the outputs
    all          turns, masks from 4 bits on, weighed errors and the whole network: what `--learn` does
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from border import times
from cases import CASES, Case, require_data
from feeds import feeds
from lines import add_output_options, write_lines
from process import evaluate

from postquant.calib.learn.block_cache import BlockCache
from postquant.calib.learn.fisher import measure_metrics
from postquant.calib.learn.learner import Learner
from postquant.calib.learn.network_learner import learn_network
from postquant.calib.learn.recipe import Borders, Effort, Recipe, network_recipe, recipe_for
from postquant.calib.source import CalibrationSource
from postquant.calib.work import forward_work
from postquant.passes.biases import fit_biases
from postquant.passes.blocks import Block
from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.pipeline import stages
from postquant.pipeline.api import quantize
from postquant.pipeline.block_metrics import channel_axes
from postquant.pipeline.config import Activations, Border, QuantConfig, Weights
from postquant.pipeline.feedback import with_feedback
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.learning import learning_blocks
from postquant.pipeline.learning_run import ADAPTIVE_FEATURES
from postquant.pipeline.load import load_model, save_model
from postquant.runtime_ops.library import library_path

# Rows without learning: settings.
PLAIN: dict[str, dict[str, Any]] = {
    "nearest": {"method": "mse", "bias_correction": False},
    "bias": {"method": "mse", "bias_correction": True},
    "start": {},
    "books": {"activations": Activations.LUT},
    "feedback": {"activations": Activations.LUT},
}
# Share of the values that QDrop quantizes.
MASKED = 0.5
MASKED_BITS = 4
# Rows with learning: what is changed in the recipe.
LEARNED: dict[str, dict[str, Any]] = {
    "rounding": {"bias_rate": 0.0, "weight_scale_rate": 0.0},
    "scales": {},
    "masks": {"keep": MASKED},
    "own": {"borders": Borders.OWN},
    "neighbours": {"borders": Borders.NEIGHBOURS},
    "adaptive": {"adaptive": int(ADAPTIVE_FEATURES)},
    "network": {},
    "levels": {},
    "turns": {},
    "weighed": {},
    "all": {},
}
# The plan that a learned row starts from, unless it is that of "start".
STARTS = {"levels": "books", "turns": "feedback", "all": "feedback"}
WEIGHED = ("weighed", "all")
WHOLE = ("network", "all")
CPU = torch.device("cpu")


class Study:
    """One model at one width."""

    def __init__(self, case: Case, width: str, options: argparse.Namespace, folder: pathlib.Path) -> None:
        self.case, self.options, self.folder = case, options, folder
        wbits, abits = (int(part) for part in width.removeprefix("w").split("a"))
        self.config = QuantConfig(
            wbits=wbits, abits=abits, weights=Weights.INT, activations=Activations.INT, border=Border.OFF
        )
        self.data = list(feeds(case, options.samples))
        self.plans: dict[str, tuple[ir.Model, QuantPlan]] = {}

    def plan(self, row: str) -> tuple[ir.Model, QuantPlan]:
        """The float model as it was when its plan was emitted, and that plan."""
        if row in self.plans:
            return self.plans[row]
        seen: list[tuple[ir.Model, QuantPlan]] = []

        def watch(model: ir.Model, plan: QuantPlan, **options: Any) -> ir.Model:
            seen.append((model, plan))
            return emit(model, plan, **options)

        with unittest.mock.patch.object(stages, "emit", watch):
            quantize(self.case.path, self.data, dataclasses.replace(self.config, **PLAIN[row]))
        model, plan = seen[-1]
        if row == "feedback":
            plan, _ = with_feedback(model, plan, self.source(), seed=0, device=CPU)
        self.plans[row] = model, plan
        return self.plans[row]

    def source(self) -> CalibrationSource:
        """The calibration data."""
        return open_calibration(self.data, load_model(self.case.path), self.config)

    def learned(self, row: str, seed: int) -> tuple[ir.Model, QuantPlan]:
        """The starting plan with learned blocks."""
        model, plan = self.plan(STARTS.get(row, "start"))
        source = self.source()
        work = forward_work(model, source)
        changed = {"iterations": self.options.iterations, "keep": 1.0, **LEARNED[row]}
        if row == "all" and self.config.abits >= MASKED_BITS:
            changed["keep"] = MASKED
        recipe: Recipe = dataclasses.replace(recipe_for(Effort.FAST, work), **changed)
        blocks = learning_blocks(model, plan)
        metrics = (
            measure_metrics(model, channel_axes(model, blocks), source, range(len(source)), seed=seed, device=CPU).found
            if row in WEIGHED
            else {}
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            cache = BlockCache(model, blocks, source, temporary, memory=2 << 30)
            learner = Learner(
                model, blocks, cache, recipe, seed=seed, device=CPU, positions=work.layers, metrics=metrics
            )
            plan, _ = learner.run(plan, done=[], save=lambda *a: None, progress=lambda *a: None)
            if row in WHOLE:
                plan = self.network(model, plan, blocks, source, pathlib.Path(temporary), seed)
        return model, plan

    def network(
        self,
        model: ir.Model,
        plan: QuantPlan,
        blocks: Sequence[Block],
        source: CalibrationSource,
        folder: pathlib.Path,
        seed: int,
    ) -> QuantPlan:
        """A plan with the whole network learned behind its blocks."""
        recipe = network_recipe(Effort.MAX, forward_work(model, source), plan.narrowest_bits)
        assert recipe is not None
        recipe = dataclasses.replace(recipe, iterations=self.options.network_iterations)
        return learn_network(
            model,
            plan,
            blocks,
            source,
            recipe,
            folder,
            memory=2 << 30,
            augment=True,
            seed=seed,
            device=CPU,
            threads=1,
            progress=lambda *a: None,
        )[0]

    def line(self, row: str, seed: int) -> dict[str, Any]:
        """One measurement."""
        begun = time.process_time()
        model, plan = self.plan(row) if row in PLAIN else self.learned(row, seed)
        seconds = time.process_time() - begun
        path = self.folder / "row.onnx"
        save_model(emit(model, fit_biases(model, plan)), path)
        found = evaluate(self.case, path, limit=self.options.limit, threads=1, reference=True, library=library_path())
        kept = {key: found[key] for key in (self.case.metric, "sqnr_db", "error") if key in found}
        kept["cpu_s"] = round(seconds, 1)
        if self.options.speed:
            kept["ms"] = {str(native): round(times(path, self.data[0], native=native), 2) for native in (False, True)}
        return kept


def lines(options: argparse.Namespace, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every measurement that the options ask for."""
    case = next(case for case in CASES if case.name == options.model)
    for width in options.widths:
        study = Study(case, width, options, folder)
        for row in options.rows:
            for seed in options.seeds[:1] if row in PLAIN else options.seeds:
                yield {"model": case.name, "setting": width, "row": row, "seed": seed, **study.line(row, seed)}


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of docs/learning.md: task metric and SQNR, means over seeds, a column per width."""
    metric = {case.name: case.metric for case in CASES}
    widths = list(dict.fromkeys(line["setting"] for line in results))
    table = [f"| | {' | '.join(widths)} |", "|---|" + "---:|" * len(widths)]
    for row in dict.fromkeys(line["row"] for line in results):
        cells = []
        for width in widths:
            found = [line for line in results if (line["setting"], line["row"]) == (width, row) and "error" not in line]
            values = [100 * line[metric[line["model"]]] for line in found]
            noise = [line["sqnr_db"] for line in found]
            cells.append(f"{statistics.mean(values):.1f} / {statistics.mean(noise):.2f} dB" if found else "")
        table.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(table)


def main() -> int:
    """Runs the measurements; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [*PLAIN, *LEARNED]
    models = [case.name for case in CASES if case.metric == "top1"]
    parser.add_argument("--model", choices=models, default="resnet20")
    parser.add_argument("--widths", type=lambda text: text.split(","), default=["w4a4", "w3a3", "w2a4", "w2a2"])
    parser.add_argument("--rows", type=lambda text: text.split(","), default=rows)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=1000, help="steps per block")
    parser.add_argument("--network-iterations", type=int, default=1000, help="steps of the whole network")
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    parser.add_argument("--limit", type=int, help="evaluate this many samples only")
    parser.add_argument("--speed", action="store_true", help="time one sample on one thread")
    add_output_options(parser)
    options = parser.parse_args()
    unknown = set(options.rows) - set(rows)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    require_data()
    with tempfile.TemporaryDirectory() as folder:
        return write_lines(lines(options, pathlib.Path(folder)), options, markdown)


if __name__ == "__main__":
    sys.exit(main())
