"""What all commands share: errors as one line, consoles, progress, JSON, settings of commands that only read."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from postquant.pipeline.cli_options import read_options
from postquant.pipeline.config import QuantConfig
from postquant.runtime_ops.errors import OutputError, PostquantError

if TYPE_CHECKING:
    from rich.console import Console

    from postquant.pipeline.progress import NullProgress

_INTERRUPTED = 130


@contextlib.contextmanager
def told(resume: str | None = None) -> Iterator[None]:
    """Turns errors into one line on standard error and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except PostquantError as error:
        raise ended(str(error), error.exit_code) from None
    except KeyboardInterrupt:
        raise ended(f"interrupted{f'; {resume}' if resume else ''}.", _INTERRUPTED) from None
    except MemoryError:
        raise ended("not enough memory; use fewer or smaller calibration samples.", 2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe has left
        raise typer.Exit(0) from None
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        raise ended(f"{error.strerror or error}{name}.", OutputError.exit_code) from None


def reading_settings(config: str | None, custom_ops: list[str] | None) -> QuantConfig:
    """The settings of a command that only reads: those of a file, and libraries."""
    options = read_options({"custom_ops": custom_ops})
    return QuantConfig.from_toml(config, **options) if config else QuantConfig(**options)


def ended(text: str, code: int) -> typer.Exit:
    """Prints why a command ends; what to raise then."""
    prefix = "error: " if code != _INTERRUPTED else ""
    typer.echo(prefix + " ".join(text.split()), err=True)
    return typer.Exit(code)


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Redirected output is not folded to 80 columns: a table in a file keeps whole names.
    return Console(file=stream, width=None if stream.isatty() or "COLUMNS" in os.environ else 140, highlight=False)


def progress_of(silent: bool) -> NullProgress:
    """Bars on standard error, or nothing."""
    from postquant.pipeline.progress import BarProgress, NullProgress

    return NullProgress() if silent else BarProgress(console(stderr=True))


def print_json(value: object) -> None:
    """Prints one JSON value."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
