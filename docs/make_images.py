"""Draws the README's picture from a demo run: ``python docs/make_images.py demo-out/demo.json`` (extra ``report``).

Accuracy on the test images at each width, ours beside the better of onnxruntime's two calibration methods, with the
float model as a line. Values are printed on the bars; a width that a quantizer does not offer has a word in its place.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

WIDTHS = ("8/8", "7/7", "4/8", "4/4")
# Label in the demo (a prefix for onnxruntime), legend, colours of bar and value. The order is that of the bars.
SERIES = (
    ("postquant", "postquant", "#1b6ca8", "white"),
    ("postquant, everywhere", "postquant, every layer and sum at this width", "#8fbcd9", "black"),
    ("onnxruntime", "onnxruntime's quantizer (its better method)", "#b5b5b5", "black"),
)
BAR = 0.27


def accuracy_of(rows: list[dict[str, Any]], bits: str, label: str) -> float | None:
    """Accuracy in percent of the row with this label; for onnxruntime of its best; None where there is none."""
    found = [
        row["accuracy"]
        for row in rows
        if row["bits"] == bits and row["accuracy"] is not None
        if (row["quantizer"].startswith(label) if label == "onnxruntime" else row["quantizer"] == label)
    ]
    return 100 * max(found) if found else None


def draw(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Writes the picture.

    Args:
        rows: ``rows`` of ``demo.json``.
        out: A PNG file.
    """
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    reference = 100 * next(row["accuracy"] for row in rows if row["bits"] == "float")
    lowest = min(100 * row["accuracy"] for row in rows if row["accuracy"] is not None)
    floor = max(0.0, 5 * (lowest // 5) - 5)
    for index, bits in enumerate(WIDTHS):
        bars = [(label, colour, ink, accuracy_of(rows, bits, label)) for label, _, colour, ink in SERIES]
        # "everywhere" is measured only where it differs from the default.
        bars = [bar for bar in bars if bar[3] is not None or bar[0] == "onnxruntime"]
        for place, (_, colour, ink, value) in enumerate(bars):
            x = index + (place - (len(bars) - 1) / 2) * BAR
            if value is None:
                axes.text(x, floor + 0.4, "not offered", rotation=90, ha="center", va="bottom", color="#777777")
                continue
            axes.bar(x, value - floor, BAR * 0.94, bottom=floor, color=colour)
            axes.text(x, value - 0.5, f"{value:.1f}", ha="center", va="top", fontsize=8.5, color=ink)
    axes.axhline(reference, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
    handles: list[Artist] = [Patch(color=colour, label=legend) for _, legend, colour, _ in SERIES]
    handles.append(Line2D([], [], color="#444444", linestyle=(0, (4, 3)), label=f"float: {reference:.1f} %"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axes.set_xticks(range(len(WIDTHS)), [f"W{w} A{a}" for w, a in (bits.split("/") for bits in WIDTHS)])
    axes.set_ylim(floor, 100)
    axes.set_ylabel(f"accuracy, % (from {floor:.0f})")
    axes.set_title("Handwritten digits, 900 test images, plain onnxruntime", fontsize=10.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same numbers give the same bytes.
    figure.savefig(out, dpi=150, metadata={"Software": None})


def main() -> None:
    """Reads the demo's numbers and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=pathlib.Path, help="demo.json of a demo run")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent / "images" / "demo.png"
    )
    options = parser.parse_args()
    draw(json.loads(options.demo.read_text(encoding="utf-8"))["rows"], options.out)


if __name__ == "__main__":
    main()
