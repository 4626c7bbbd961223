"""Time from the end of a quantization to the written bundle, and the sizes of what is in it, as JSON lines.

    python bench/bundle.py [--models mobilenetv2] [--settings w8a8,w4a8] [--method minmax] [--samples 16]

``seconds`` is the time of ``complete_bundle`` on a finished result, ``zip_seconds`` that of its archive,
``verify_seconds`` that of ``postquant verify`` on the archive; ``report_bytes`` is the size of ``report.html``. One run
each, one thread. How the scales were found changes only how much the report has to tell.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from collections.abc import Iterator

from accuracy import comma_separated
from cases import CASES, Case, Setting, require_data
from feeds import write_feeds
from lines import Line, add_output_options, write_lines

from postquant.pipeline.api import quantize
from postquant.pipeline.bundle.archive import write_archive
from postquant.pipeline.bundle.complete import complete_bundle
from postquant.pipeline.config import Method, QuantConfig
from postquant.pipeline.run_stats import StopWatch
from postquant.pipeline.verify_folder import verify_archive

_COLUMNS = ("model", "setting", "seconds", "zip_seconds", "verify_seconds", "report_bytes", "bundle_bytes", "files")


def measure(case: Case, setting: Setting, method: Method, samples: int) -> Line:
    """Quantizes, then measures the bundle of the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data = write_feeds(case, samples, folder)
        config = QuantConfig(wbits=setting.wbits, abits=setting.abits, method=method, bundle=False)
        quantize(case.path, data, config, out=folder / "out")
        watch, start = StopWatch(), time.perf_counter()
        manifest = complete_bundle(folder / "out", conformance_inputs=data)
        written = time.perf_counter()
        write_archive(folder / "out", folder / "out.zip")
        packed = time.perf_counter()
        failed = [check.name for check in verify_archive(folder / "out.zip") if not check.passed]
        verified = time.perf_counter()
        line: Line = {
            "model": case.name,
            "setting": setting.name,
            "seconds": round(written - start, 2),
            "zip_seconds": round(packed - written, 2),
            "verify_seconds": round(verified - packed, 2),
            "report_bytes": (folder / "out" / "report.html").stat().st_size,
            "bundle_bytes": sum(entry.bytes for entry in manifest.files.values()),
            "files": len(manifest.files),
            "peak_bytes": watch.read().peak_bytes,
            "notes": list(manifest.notes),
        }
        return line | ({"error": f"does not verify: {', '.join(failed)}"} if failed else {})


def markdown(lines: list[Line]) -> str:
    """The measurements as a table."""
    rows = [" | ".join(str(line.get(column, "")) for column in _COLUMNS) for line in lines]
    return "\n".join(f"| {row} |" for row in (" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS), *rows))


def main() -> int:
    """Prints a line per model and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=comma_separated([case.name for case in CASES]), default=["mobilenetv2"])
    parser.add_argument("--settings", type=lambda text: text.split(","), default=["w8a8", "w4a8"])
    parser.add_argument("--method", type=Method, default=Method.MINMAX)
    parser.add_argument("--samples", type=int, default=16)
    add_output_options(parser)
    options = parser.parse_args()
    require_data()

    def lines() -> Iterator[Line]:
        for case in CASES:
            for setting in case.settings:
                if case.name in options.models and setting.name in options.settings:
                    yield measure(case, setting, options.method, options.samples)

    return write_lines(lines(), options, markdown)


if __name__ == "__main__":
    raise SystemExit(main())
