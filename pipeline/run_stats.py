"""Time and peak memory of a run: :class:`StopWatch`."""

from __future__ import annotations

import sys
import time

from postquant.pipeline.report import RunStats

if sys.platform == "win32":

    def peak_memory() -> int | None:
        """Largest resident memory of this process in bytes; unknown on this system."""
        return None

else:
    import resource

    # ru_maxrss is in bytes on macOS and in kibibytes elsewhere.
    _UNIT = 1 if sys.platform == "darwin" else 1024

    def peak_memory() -> int | None:
        """Largest resident memory of this process in bytes, the largest child counted where it needed more."""
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return max(resource.getrusage(w).ru_maxrss for w in who) * _UNIT


class StopWatch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def read(self) -> RunStats:
        """Wall time since the start, and the peak memory of the process so far."""
        return RunStats(seconds=time.perf_counter() - self._start, peak_bytes=peak_memory())
