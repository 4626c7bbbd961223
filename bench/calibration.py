"""Cost of calibration: CPU time and peak memory, postquant beside onnxruntime's ``quantize_static``.

    python bench/calibration.py [--samples 64,256] [--rounds 3] [--scale-gb 2.5] [--json FILE] [--markdown]

Every measurement runs in a process of its own and prints one JSON line; rounds are interleaved and the smallest CPU
time of each quantizer counts. MobileNetV2 first: each method at each number of samples, and CPU time as a ratio to
onnxruntime's min-max in the same run. Then a transformer with ``--scale-gb`` GB of random weights (0 leaves it out):
peak memory as a ratio to the size of the model.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from cases import CASES, DATA, require_data
from feeds import write_feeds
from lines import add_output_options, write_lines
from process import work
from worker import Job

MODEL = next(case for case in CASES if case.name == "mobilenetv2")
OURS = ("minmax", "easyquant", "mse", "entropy", "percentile")
BASELINE = "onnxruntime minmax"
SCALE_SAMPLES, SCALE_TOKENS = 8, 64


def better(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """The round with less CPU time, with the larger peak of the two; a failed round wins."""
    if first is None or "error" in second:
        return second
    if "error" in first:
        return first
    faster = first if first["cpu_s"] <= second["cpu_s"] else second
    return {**faster, "peak_mb": max(first["peak_mb"], second["peak_mb"])}


def small_model(sample_counts: list[int], rounds: int, methods: list[str]) -> Iterator[dict[str, Any]]:
    """MobileNetV2 with every method; CPU seconds, ratio to the baseline, and peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for count in sample_counts:
            calibration = str(write_feeds(MODEL, count, folder))
            out = str(folder / "quantized.onnx")
            jobs = {BASELINE: Job("onnxruntime", str(MODEL.path), calibration, out, 8, 8)}
            for method in methods:
                options = {"method": method}
                jobs[f"postquant {method}"] = Job("postquant", str(MODEL.path), calibration, out, 8, 8, options)
            best: dict[str, dict[str, Any]] = {}
            for _ in range(rounds):
                for label, job in jobs.items():
                    best[label] = better(best.get(label), work(job))
            baseline = best[BASELINE].get("cpu_s")
            for label, result in best.items():
                line = {"model": MODEL.name, "samples": count, "quantizer": label, **result}
                if baseline and "cpu_s" in result:
                    line["cpu_ratio"] = result["cpu_s"] / baseline
                yield line


def large_model(gigabytes: float, methods: list[str]) -> Iterator[dict[str, Any]]:
    """A transformer of random weights in external data; peak memory, and its ratio to the size of the model."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = folder / "big.onnx"
        maker = [sys.executable, str(DATA / "make_scale_model.py"), "--kind", "gpt", "--gb", str(gigabytes)]
        subprocess.run([*maker, "--out", str(model)], check=True, stdout=subprocess.DEVNULL)
        size = sum(file.stat().st_size for file in folder.glob("big.onnx*"))
        calibration = folder / "calibration"
        calibration.mkdir()
        tokens = np.random.default_rng(0).integers(0, 8192, (SCALE_SAMPLES, 1, SCALE_TOKENS), dtype=np.int64)
        for index, ids in enumerate(tokens):
            np.savez(calibration / f"{index:05d}.npz", input_ids=ids)
        for method in methods:
            out = folder / "quantized.onnx"
            result = work(Job("postquant", str(model), str(calibration), str(out), 8, 8, {"method": method}))
            line = {"model": f"gpt {size / 1e9:.2f} GB", "samples": SCALE_SAMPLES, "quantizer": f"postquant {method}"}
            line |= result
            if "peak_mb" in result:
                line["peak_ratio"] = result["peak_mb"] * 1e6 / size
            yield line
            for file in folder.glob("quantized.onnx*"):
                file.unlink()


def markdown(results: list[dict[str, Any]]) -> str:
    """All lines as one table."""
    rows = [
        "| model | samples | quantizer | CPU s | ratio to onnxruntime | wall s | peak MB | ratio to size |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for line in results:
        cells = [line["model"], str(line["samples"]), line["quantizer"]]
        for key, digits in (("cpu_s", 1), ("cpu_ratio", 2), ("wall_s", 1), ("peak_mb", 0), ("peak_ratio", 2)):
            cells.append(f"{line[key]:.{digits}f}" if key in line else "")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    """Runs the measurements; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="64,256", help="numbers of calibration images, comma-separated")
    parser.add_argument("--methods", default=",".join(OURS), help="our methods, comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale-gb", type=float, default=2.5, help="size of the transformer; 0 leaves it out")
    parser.add_argument("--scale-methods", default="easyquant", help="methods for the transformer, comma-separated")
    add_output_options(parser)
    options = parser.parse_args()
    require_data()

    def lines() -> Iterator[dict[str, Any]]:
        counts = [int(count) for count in options.samples.split(",")]
        yield from small_model(counts, options.rounds, options.methods.split(","))
        if options.scale_gb > 0:
            yield from large_model(options.scale_gb, options.scale_methods.split(","))

    return write_lines(lines(), options, markdown)


if __name__ == "__main__":
    sys.exit(main())
