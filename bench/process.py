"""Starts workers and evaluations in processes of their own and reads the JSON line that each prints."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

from cases import DATA, Case
from worker import Job


def _last_line(*command: str) -> dict[str, Any]:
    result = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "no output").splitlines()[-1]
        return {"error": f"exit code {result.returncode}: {reason}"}
    line: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return line


def work(job: Job) -> dict[str, Any]:
    """Runs one quantization; "error" or "not_offered" stands in the result where there is none."""
    script = pathlib.Path(__file__).parent / "worker.py"
    return _last_line(str(script), json.dumps(dataclasses.asdict(job)))


def evaluate(
    case: Case,
    model: pathlib.Path,
    *,
    limit: int | None,
    threads: int,
    reference: bool,
    library: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Runs ``eval.py`` on ``model``, against the float model if ``reference``, with a library of operators if given."""
    command = [str(DATA / "eval.py"), case.dataset, str(model), "--threads", str(threads)]
    command += ["--ref", str(case.path)] if reference else []
    command += ["--limit", str(limit)] if limit else []
    command += ["--custom-ops", str(library)] if library else []
    return _last_line(*command)
