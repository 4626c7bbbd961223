"""What both benchmarks do with their measurements: one JSON line each, a table at the end, what failed."""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json`` and ``--markdown``."""
    parser.add_argument("--json", type=pathlib.Path, help="append the lines to this file too")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")


def write_lines(lines: Iterable[Line], options: argparse.Namespace, markdown: Callable[[list[Line]], str]) -> int:
    """Prints every measurement when it is there, then the table; returns 1 if one of them failed.

    Args:
        lines: The measurements; one with a key "error" failed.
        options: Those of :func:`add_output_options`.
        markdown: Makes the table.
    """
    # Asked to stop, a benchmark takes along the worker that it waits for: subprocess ends it on any exception.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    results: list[Line] = []
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    for line in lines:
        results.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    if options.markdown:
        print(markdown(results))
    failed = [line for line in results if "error" in line]
    for line in failed:
        what = " ".join(str(line[key]) for key in ("model", "setting", "quantizer") if key in line)
        print(f"failed: {what}: {line['error']}", file=sys.stderr)
    return 1 if failed else 0
