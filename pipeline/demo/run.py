"""``postquant demo``: the embedded network quantized at several widths, beside onnxruntime's own quantizer.

Everything is calibrated on the same 256 images and measured on the same 900 others, in one run, on a plain
onnxruntime. The folder then holds the models, the data as a user would have them, and the table:

    digits.onnx, calibration.npz, test.npz    what went in
    w8a8/ ...                                 our results: model, plan, report
    onnxruntime/                              onnxruntime's results
    report.md, demo.json                      the table, for people and for programs
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from postquant.passes.plan import write_atomically
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.demo.digits import INPUT_NAME, Digits, load_digits
from postquant.pipeline.demo.measure import Row, logits, measure
from postquant.pipeline.fingerprint import package_versions
from postquant.pipeline.ort_quantizer import OFFERED, PeerMethod, quantize_with_onnxruntime

SCHEMA_VERSION = 1
_WIDTHS = ((8, 8), (7, 7), (4, 8), (4, 4))
_NOTES = """
Below 8 bits postquant keeps the first and the last layer and residual sums at 8 bits by default. The rows marked
*everywhere* do not, and compare like with like: onnxruntime's quantizer gives every layer the same width.

onnxruntime's quantizer has no 7-bit activations. Agreement and SQNR are relative to the float model on the 900 test
images; 0.0011 is one image. The network has only 9 thousand parameters, so that a file is mostly graph, and the
quantized graph is the longer one; on real models the weights decide.

The same by hand:

```
postquant quantize digits.onnx --calib calibration.npz --wbits 4 --abits 8 --out mine
```
"""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One of our rows: folder name, label and configuration."""

    folder: str
    label: str
    config: QuantConfig


def _settings(wbits: int, abits: int) -> tuple[_Setting, ...]:
    folder = f"w{wbits}a{abits}"
    default = _Setting(folder, "postquant", QuantConfig(wbits=wbits, abits=abits))
    if min(wbits, abits) >= 7:
        return (default,)
    strict = QuantConfig(wbits=wbits, abits=abits, first_last_bits=None, sums_bits=abits)
    return default, _Setting(f"{folder}-everywhere", "postquant, everywhere", strict)


def run_demo(out: pathlib.Path, console: Console) -> int:
    """Quantizes, measures, prints the table and writes it to ``out``.

    Args:
        out: Folder for the results; made when it does not exist.
        console: Where the table goes.

    Returns:
        0: the exit code of the command.

    Raises:
        PostquantError: If a quantization fails.
        OSError: If ``out`` cannot be written.
    """
    digits = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    model = out / "digits.onnx"
    write_atomically(model, digits.model)
    np.savez(out / "calibration.npz", image=digits.calibration)
    np.savez(out / "test.npz", image=digits.test)
    rows = []
    with console.status("measuring the float model") as status:
        reference = logits(model, digits.test)
        rows.append(measure(model, digits, reference, bits="float", quantizer="-"))
        for wbits, abits in _WIDTHS:
            status.update(f"quantizing to {wbits}/{abits} bits")
            rows.extend(_ours(out, model, digits, reference, wbits, abits))
            rows.extend(_theirs(out, model, digits, reference, wbits, abits))
    _write(out, rows)
    _print(out, rows, console)
    return 0


def _ours(
    out: pathlib.Path, model: pathlib.Path, digits: Digits, reference: npt.NDArray[np.float32], wbits: int, abits: int
) -> Iterator[Row]:
    from postquant.pipeline.api import quantize  # the command's other half; it takes a second to import

    for setting in _settings(wbits, abits):
        start = time.perf_counter()
        quantize(model, out / "calibration.npz", setting.config, out=out / setting.folder)
        seconds = time.perf_counter() - start
        result = out / setting.folder / "model.onnx"
        yield measure(result, digits, reference, bits=f"{wbits}/{abits}", quantizer=setting.label, seconds=seconds)


def _theirs(
    out: pathlib.Path, model: pathlib.Path, digits: Digits, reference: npt.NDArray[np.float32], wbits: int, abits: int
) -> Iterator[Row]:
    folder = out / "onnxruntime"
    folder.mkdir(exist_ok=True)
    bits = f"{wbits}/{abits}"
    for method in PeerMethod:
        label = f"onnxruntime, {method.value}"
        if (wbits, abits) not in OFFERED:
            yield Row(bits=bits, quantizer=label)
            continue
        result = folder / f"w{wbits}a{abits}-{method.value}.onnx"
        start = time.perf_counter()
        feeds = ({INPUT_NAME: image[np.newaxis]} for image in digits.calibration)
        quantize_with_onnxruntime(model, result, feeds, wbits=wbits, abits=abits, method=method)
        seconds = time.perf_counter() - start
        yield measure(result, digits, reference, bits=bits, quantizer=label, seconds=seconds)


def _cells(row: Row) -> tuple[str, ...]:
    """The row as text; what is not offered says so."""
    if row.accuracy is None or row.agreement is None:
        return row.bits, row.quantizer, "not offered", "", "", "", ""
    sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return (
        row.bits,
        row.quantizer,
        f"{row.accuracy:.4f}",
        f"{row.agreement:.4f}",
        sqnr,
        f"{row.kilobytes:.0f}",
        seconds,
    )


_HEADER = ("bits W/A", "quantizer", "accuracy", "agreement", "SQNR dB", "kB", "s")


def _print(out: pathlib.Path, rows: list[Row], console: Console) -> None:
    table = Table(title="Handwritten digits, 900 test images, on plain onnxruntime", title_justify="left")
    for name in _HEADER:
        table.add_column(name, justify="left" if name in _HEADER[:2] else "right", no_wrap=True)
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and previous.bits != row.bits:
            table.add_section()
        table.add_row(*_cells(row))
    console.print(table)
    console.print(f"Models, data and this table are in {out} (report.md, demo.json).", markup=False)


def _write(out: pathlib.Path, rows: list[Row]) -> None:
    installed = package_versions()
    versions = {name: installed[name] for name in ("postquant", "onnxruntime")}
    lines = ["# Demo: handwritten digits", "", f"{', '.join(f'{k} {v}' for k, v in versions.items())}.", ""]
    lines += ["| " + " | ".join(_HEADER) + " |", "|---|---|" + "---:|" * (len(_HEADER) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    write_atomically(out / "report.md", ("\n".join(lines) + "\n" + _NOTES).encode())
    document = {"schema_version": SCHEMA_VERSION, "versions": versions, "rows": [row.to_json() for row in rows]}
    write_atomically(out / "demo.json", (json.dumps(document, indent=1) + "\n").encode())
