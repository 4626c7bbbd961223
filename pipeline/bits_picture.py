"""The picture of ``postquant sensitivity --picture``: sensitivities and bits of all layers (:func:`draw_bits`).

Above, the SQNR of the network's outputs with one layer alone quantized, a line for each width; below, the bits that the
budget gives each layer, as bars whose width is the layer's share of all weights. Needs matplotlib (extra ``report``).
"""

from __future__ import annotations

import io
import pathlib
from typing import Any

from postquant.pipeline.sensitivity import SensitivityReport, SensitivityRow
from postquant.runtime_ops.errors import ConfigError, OutputError

_WIDTH_COLOURS = {2: "#b2182b", 3: "#d6604d", 4: "#e08214", 5: "#80b1a3", 6: "#35978f", 7: "#4393c3", 8: "#1b6ca8"}
# The smallest layers are drawn this wide, as a share of all, so that they can be seen.
_LEAST_SHARE = 0.004
SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: pathlib.Path) -> None:
    """Tells before any work that a picture cannot be drawn.

    Raises:
        ConfigError: If matplotlib is missing, or it draws no such files.
        OutputError: If the folder does not exist.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "a picture needs matplotlib", where="--picture", hint='install the extra: pip install "postquant[report]"'
        ) from None
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            "the picture has an unknown format", where="--picture", expected=", ".join(SUFFIXES), found=path.name
        )
    if not path.absolute().parent.is_dir():
        raise OutputError("the folder of the picture does not exist", where=str(path.parent))


def draw_bits(report: SensitivityReport, path: pathlib.Path) -> None:
    """Writes the picture.

    Args:
        report: At least one layer.
        path: A PNG, SVG or PDF file; replaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.rows
    budget = report.budget is not None
    figure = Figure(figsize=(max(8.0, 0.16 * len(rows) + 3), 6.4 if budget else 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, gridspec_kw={"height_ratios": (3, 2)}) if budget else [figure.subplots()]
    _draw_sensitivity(axes[0], rows)
    axes[0].set_title(f"{report.model}: outputs with one layer's weights quantized", fontsize=10.5, loc="left")
    if budget:
        _draw_bits(axes[1], rows)
        sqnr = "" if report.sqnr_db is None else f", {report.sqnr_db:.1f} dB with quick scales"
        axes[1].set_title(f"{report.budget}{sqnr}", fontsize=10.5, loc="left")
    # No date and no version in the file: the same numbers give the same bytes.
    if path.suffix.lower() == ".png":
        _save_png(figure, path)
    else:
        figure.savefig(path, metadata={"CreationDate" if path.suffix.lower() == ".pdf" else "Date": None})


def _save_png(figure: Any, path: pathlib.Path) -> None:
    """A PNG with few colours: a quarter of the bytes."""
    from PIL import Image  # matplotlib needs it as well

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    picture = Image.open(content).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", optimize=True)


def _draw_sensitivity(axes: Any, rows: tuple[SensitivityRow, ...]) -> None:
    places = range(len(rows))
    for bits in sorted({bits for row in rows for bits in row.weight_db}):
        values = [row.weight_db.get(bits, float("nan")) for row in rows]
        axes.plot(
            places, values, marker="o", markersize=3, linewidth=1, color=_WIDTH_COLOURS[bits], label=f"{bits} bits"
        )
    axes.set_ylabel("SQNR, dB")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xticks(places, [_short(row.node) for row in rows], rotation=90, fontsize=6)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bits(axes: Any, rows: tuple[SensitivityRow, ...]) -> None:
    total = sum(row.weights for row in rows)
    left = 0.0
    for row in rows:
        share = max(row.weights / max(total, 1), _LEAST_SHARE)
        bits = row.wbits or 0
        axes.bar(
            left, bits, share, align="edge", color=_WIDTH_COLOURS.get(bits, "#999999"), edgecolor="white", linewidth=0.5
        )
        left += share
    if any(row.input_db for row in rows):
        left = 0.0
        for row in rows:
            share = max(row.weights / max(total, 1), _LEAST_SHARE)
            axes.plot([left, left + share], [row.abits, row.abits], color="#222222", linewidth=1.4)
            left += share
    axes.set_xlim(0, left)
    axes.set_ylim(0, 8.6)
    axes.set_xticks([])
    axes.set_xlabel("layers from the input to the output; width: share of all weights")
    axes.set_ylabel("bits")
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else "..." + name[-most + 3 :]
