"""Accuracy of real models after quantization by postquant and by onnxruntime, on the same samples.

    python bench/accuracy.py [--models resnet20,vww] [--settings w8a8,w4a8] [--limit N] [--json FILE] [--markdown]

Prints one JSON line per model, setting and quantizer: the line of ``eval.py`` (task metric, agreement and SQNR against
the float model) with CPU seconds, peak memory and file size of the quantization. ``--markdown`` adds the table.
Learned settings (``--settings w4a4-learn``, or ``w4a4-learn-fast`` with ``effort = "fast"``) run where they are named.
``--ablation`` measures ours step by step instead: min-max, MSE, EasyQuant, + bias correction, and all of it (with
lossless inputs, equalization and smoothing).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from cases import ABLATION_MODELS, CASES, Case, Setting, ablation_settings, require_data
from feeds import write_feeds
from lines import add_output_options, write_lines
from process import evaluate, work
from worker import Job

from postquant.runtime_ops.library import library_path

QUANTIZERS = ("onnxruntime", "onnxruntime-percentile", "postquant")


def measure(
    case: Case, setting: Setting, quantizer: str, folder: pathlib.Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Quantizes and evaluates once."""
    calibration = write_feeds(case, options.samples or setting.samples or case.samples, folder)
    out = folder / f"{case.name}-{setting.name}-{quantizer}.onnx"
    job = Job(
        quantizer, str(case.path), str(calibration), str(out), setting.wbits, setting.abits, dict(setting.options)
    )
    line: dict[str, Any] = {"model": case.name, "setting": setting.name, "quantizer": quantizer, **work(job)}
    if out.exists():
        # It computes what the function bodies in the file do, to the bit.
        library = library_path() if quantizer == "postquant" else None
        evaluation = evaluate(case, out, limit=options.limit, threads=options.threads, reference=True, library=library)
        line |= {**evaluation, "model": case.name, "kb": out.stat().st_size / 1000}
        out.unlink()
    return line


def chosen_settings(case: Case, options: argparse.Namespace) -> list[Setting]:
    """What the options ask for; what only we have, and learning, which takes minutes, have to be named."""
    wanted: list[str] | None = options.settings
    if options.ablation:
        return [s for s in ablation_settings(case) if wanted is None or s.name.split("-")[0] in wanted]
    if wanted is None:
        return list(case.settings)
    return [setting for setting in (*case.settings, *case.named_settings) if setting.name in wanted]


def lines(options: argparse.Namespace, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every measurement that the options ask for, the float model first."""
    names = options.models or (ABLATION_MODELS if options.ablation else [case.name for case in CASES])
    for case in (case for case in CASES if case.name in names):
        # The face detector has no labels: its metric is agreement with the float model.
        reference = case.dataset == "face"
        metrics = evaluate(case, case.path, limit=options.limit, threads=options.threads, reference=reference)
        kilobytes = case.path.stat().st_size / 1000
        yield {"setting": "float", "quantizer": "-", **metrics, "model": case.name, "kb": kilobytes}
        settings = chosen_settings(case, options)
        if not settings:
            known = ", ".join(setting.name for setting in (*case.settings, *case.named_settings))
            print(f"{case.name} has none of these settings; it has {known}", file=sys.stderr)
        for setting in settings:
            ours = options.ablation or setting in case.named_settings
            for quantizer in ("postquant",) if ours else options.quantizers:
                yield measure(case, setting, quantizer, folder, options)


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of the README."""
    rows = [
        "| model | setting | quantizer | metric | | agreement | SQNR dB | kB | CPU s | peak MB |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    metric_of = {case.name: case.metric for case in CASES}

    def number(line: dict[str, Any], key: str, digits: int) -> str:
        return f"{line[key]:.{digits}f}" if line.get(key) is not None else ""

    for line in results:
        metric = metric_of[line["model"]]
        label = f"| {line['model']} | {line['setting']} | {line['quantizer']} | {metric} | "
        if "not_offered" in line or "error" in line:
            rows.append(label + ("not offered" if "not_offered" in line else "failed") + " | | | | | |")
            continue
        digits = 2 if metric == "psnr_db" else 4
        cells = [number(line, metric, digits), number(line, "agree", 4), number(line, "sqnr_db", 1)]
        cells += [number(line, "kb", 0), number(line, "cpu_s", 1), number(line, "peak_mb", 0)]
        rows.append(label + " | ".join(cells) + " |")
    return "\n".join(rows)


def comma_separated(choices: list[str]) -> Any:
    """A parser of comma-separated names that knows what is allowed."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(choices)}")
        return names

    return parse


def main() -> int:
    """Runs the measurements; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    widths = sorted({setting.name for case in CASES for setting in (*case.settings, *case.named_settings)})
    parser.add_argument("--models", type=comma_separated([case.name for case in CASES]))
    parser.add_argument("--settings", type=comma_separated(widths))
    parser.add_argument(
        "--quantizers", type=comma_separated(list(QUANTIZERS)), default=["onnxruntime", "postquant"]
    )  # onnxruntime's percentile method takes gigabytes on MobileNetV2
    parser.add_argument("--ablation", action="store_true", help="measure our own steps instead")
    parser.add_argument("--samples", type=int, help="calibration samples, instead of each model's own number")
    parser.add_argument("--limit", type=int, help="evaluate this many samples only")
    parser.add_argument("--threads", type=int, default=2, help="threads of the evaluation")
    add_output_options(parser)
    options = parser.parse_args()
    require_data()
    with tempfile.TemporaryDirectory() as folder:
        return write_lines(lines(options, pathlib.Path(folder)), options, markdown)


if __name__ == "__main__":
    sys.exit(main())
