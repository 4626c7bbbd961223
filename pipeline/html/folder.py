"""The page of a result folder: :func:`folder_page`, :func:`ensure_page`. The template engine is an extra."""

from __future__ import annotations

import importlib.util
import pathlib

from postquant.passes.plan import write_atomically
from postquant.pipeline.output import PAGE_FILE, REPORT_FILE, RUN_FILE, STATISTICS_FILE
from postquant.pipeline.report import Report
from postquant.pipeline.run_costs import RunCosts
from postquant.pipeline.tensor_statistics import Statistics
from postquant.runtime_ops.errors import ConfigError, ModelError, OutputError

WHAT_IS_MISSING = "it needs jinja2: pip install 'postquant[report]'"


def pages_available() -> bool:
    """Whether pages can be written: the template engine is an extra."""
    return importlib.util.find_spec("jinja2") is not None


def require_pages() -> None:
    """Says what to install.

    Raises:
        ConfigError: If the template engine is missing.
    """
    if not pages_available():
        raise ConfigError("a page cannot be written", found="no jinja2", hint="pip install 'postquant[report]'")


def folder_page(folder: pathlib.Path, *, costs: bool = False) -> bytes:
    """Draws the page of a result.

    Args:
        folder: A folder with ``report.json``; without ``statistics.json`` the page has no histograms and no map.
        costs: Whether time and memory of the run are shown, from ``run.json`` if it is there.

    Raises:
        ModelError: If there is no result, or a file is damaged.
        ConfigError: If the template engine is missing.
    """
    require_pages()
    from postquant.pipeline.html.report_page import report_page

    if not (folder / REPORT_FILE).is_file():
        raise ModelError(
            "there is no result to report on",
            where=str(folder),
            expected=f"a folder with {REPORT_FILE}",
            hint="give the --out of a finished `postquant quantize`",
        )
    report = Report.load(folder / REPORT_FILE)
    path = folder / STATISTICS_FILE
    statistics = Statistics.load(path) if path.exists() else Statistics(samples=0)
    return report_page(report, statistics, RunCosts.load(folder / RUN_FILE) if costs else None)


def write_page(page: bytes, path: pathlib.Path) -> None:
    """Writes a page, whole or not at all.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        found = error.strerror or str(error)
        raise OutputError("the page cannot be written", where=str(path), found=found) from None


def ensure_page(folder: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """The page that somebody wants to look at.

    Args:
        folder: A result folder.
        out: Write a new page here, with time and memory of the run; None for the folder's own, which is written where
            it is missing and otherwise left as it is, because its digest is part of the result.

    Raises:
        ModelError: If there is no result, or a file is damaged.
        OutputError: If the page cannot be written.
        ConfigError: If the template engine is missing.
    """
    own = folder / PAGE_FILE
    if out is None and own.is_file():
        return own
    path = out or own
    write_page(folder_page(folder, costs=out is not None), path)
    return path
