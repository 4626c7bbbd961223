"""Time and memory of a run by stage: :class:`RunCosts`, kept in ``run.json`` beside the result.

These differ between equal runs. So the file is neither among the digests of ``report.json`` nor part of what is handed
over, and ``report.html`` shows it only when ``postquant report`` writes a page for somebody who asks.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

from postquant.passes.plan import write_atomically
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import RunStats, decode_json, encode_json
from postquant.runtime_ops.errors import ModelError

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage: its name and its wall time in seconds."""

    name: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCosts:
    """What a run cost.

    Attributes:
        seconds: Wall time; of a resumed run, that of its last part.
        peak_bytes: Largest resident memory of the process; None where the system does not tell.
        resumed: Whether an earlier run had done some of the stages.
        stages: Stages in order; one that came twice is there once, with both times together.
    """

    seconds: float
    peak_bytes: int | None = None
    resumed: bool = False
    stages: tuple[StageCost, ...] = ()

    def save(self, path: pathlib.Path) -> None:
        """Writes ``run.json``."""
        data = {"schema_version": SCHEMA_VERSION, **encode_json(self)}
        write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: pathlib.Path) -> RunCosts | None:
        """Reads ``run.json``; None where there is none.

        Raises:
            ModelError: If it is damaged or of another schema version.
        """
        try:
            data = json.loads(path.read_bytes())
            version = data.pop("schema_version")
            costs: RunCosts | None = decode_json(cls, data) if version == SCHEMA_VERSION else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                "the costs of the run cannot be read", where=str(path), found=str(error), hint="remove the file"
            ) from None
        if costs is None:
            raise ModelError(
                "the costs of the run have another format",
                where=str(path),
                expected=f"schema_version {SCHEMA_VERSION}",
                found=str(version),
                hint="remove the file",
            )
        return costs


class StageClock(NullProgress):
    """Passes everything on to another progress and takes the times of the stages.

    Args:
        inner: Who is told.
    """

    def __init__(self, inner: NullProgress) -> None:
        self._inner = inner
        self._seconds: dict[str, float] = {}
        self._current: str | None = None
        self._since = time.perf_counter()
        self._resumed = False

    def stage(self, name: str, total: float | None = None) -> None:
        """See :meth:`NullProgress.stage`."""
        self._end()
        self._current = name
        self._inner.stage(name, total)

    def advance(self, amount: float = 1.0) -> None:
        """See :meth:`NullProgress.advance`."""
        self._inner.advance(amount)

    def say(self, line: str) -> None:
        """See :meth:`NullProgress.say`."""
        self._inner.say(line)

    def resumed(self, stage: str) -> None:
        """See :meth:`NullProgress.resumed`."""
        self._resumed = True
        self._inner.resumed(stage)

    def close(self) -> None:
        """See :meth:`NullProgress.close`."""
        self._inner.close()

    def read(self, stats: RunStats) -> RunCosts:
        """The costs so far."""
        self._end()
        stages = tuple(StageCost(name=name, seconds=seconds) for name, seconds in self._seconds.items())
        return RunCosts(seconds=stats.seconds, peak_bytes=stats.peak_bytes, resumed=self._resumed, stages=stages)

    def _end(self) -> None:
        now = time.perf_counter()
        if self._current is not None:
            self._seconds[self._current] = self._seconds.get(self._current, 0.0) + now - self._since
        self._since = now
