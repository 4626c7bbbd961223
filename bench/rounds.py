"""Times sessions against each other: interleaved rounds in one process, so that all of them see the same machine.

A round gives each contestant a turn in an order that changes from round to round. A turn runs the model once unmeasured
(its weights may have left the caches) and then often enough to fill a few milliseconds. Two numbers come out: the least
time of all runs, which other load on the machine can hardly raise, and the median over rounds of the turn's median.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from postquant.runtime_ops.library import library_path

_TURN_SECONDS = 4e-3


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way of running something.

    Attributes:
        subject: What is run: "fp32", "LUT 4 bit".
        model: The model: a serialized one, or a file.
        feeds: Input name -> value.
        isa: None: without our library; "": with it; else with it held to this instruction set.
        is_ours: Whether its operators are ours, so that it can be run with the library and without.
    """

    subject: str
    model: bytes | pathlib.Path
    feeds: Mapping[str, Any]
    isa: str | None = None
    is_ours: bool = False

    @property
    def way(self) -> str:
        """How it is run, or "" if it is not ours."""
        if not self.is_ours:
            return ""
        return "no library" if self.isa is None else f"library {self.isa}".strip()

    @property
    def name(self) -> str:
        """Subject and way."""
        return ", ".join(part for part in (self.subject, self.way) if part)

    @classmethod
    def ours(
        cls, subject: str, model: bytes | pathlib.Path, feeds: Mapping[str, Any], isas: Sequence[str]
    ) -> list[Contestant]:
        """A model without the library and with it, held to each of the instruction sets in turn."""
        return [cls(subject, model, feeds, isa, is_ours=True) for isa in (None, *isas)]


@dataclasses.dataclass(frozen=True)
class Times:
    """What was measured of one contestant.

    Attributes:
        best: Least seconds of one run.
        turns: Median seconds of a run, for each round.
    """

    best: float
    turns: Sequence[float]

    @property
    def median(self) -> float:
        """Median seconds over rounds."""
        return statistics.median(self.turns)

    def ratio_to(self, other: Times) -> float:
        """Median over rounds of this time over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))


class Runner:
    """A session with its inputs and outputs in place, so that a run copies nothing."""

    def __init__(self, contestant: Contestant, threads: int, libraries: Libraries) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # A thread that still spins for the last session's work would take a core from the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = contestant.model if isinstance(contestant.model, bytes) else str(contestant.model)
        with libraries.forced(contestant.isa):
            if contestant.isa is not None:
                options.register_custom_ops_library(str(libraries.path(contestant.isa)))
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self._binding = self._session.io_binding()
            for name, value in contestant.feeds.items():
                self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.asarray(value)))
            names = [output.name for output in self._session.get_outputs()]
            self.outputs = self._session.run(None, dict(contestant.feeds))
            for name, output in zip(names, self.outputs, strict=True):
                self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(output))

    def run(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


class Libraries:
    """Copies of the operator library, one per instruction set: each chooses its set once, when it is first used."""

    def __init__(self, folder: pathlib.Path) -> None:
        path = library_path()
        if path is None:
            raise SystemExit("postquant was built without its operator library; there is nothing to measure")
        self._folder, self._original = folder, path

    def path(self, isa: str) -> pathlib.Path:
        """The library for a set; the installed one for ""."""
        if not isa:
            return self._original
        copy = self._folder / f"{isa}-{self._original.name}"
        if not copy.exists():
            copy.write_bytes(self._original.read_bytes())
        return copy

    @staticmethod
    def forced(isa: str | None) -> _Environment:
        """While it lasts, the environment asks for this set."""
        return _Environment(isa)


class _Environment:
    def __init__(self, isa: str | None) -> None:
        self._isa = isa

    def __enter__(self) -> None:
        self._before = os.environ.pop("POSTQUANT_ISA", None)
        if self._isa:
            os.environ["POSTQUANT_ISA"] = self._isa

    def __exit__(self, *_: object) -> None:
        os.environ.pop("POSTQUANT_ISA", None)
        if self._before is not None:
            os.environ["POSTQUANT_ISA"] = self._before


def compete(runners: Mapping[str, Runner], rounds: int, seed: int = 0) -> dict[str, Times]:
    """Measures all runners in interleaved rounds.

    Args:
        runners: Name -> session.
        rounds: Number of rounds, at least 1.
        seed: Of the order within rounds.

    Returns:
        Name -> times, in the order of ``runners``.
    """
    order = list(runners)
    shuffle = random.Random(seed).shuffle
    best = {name: min(runners[name].run() for _ in range(3)) for name in order}
    turns: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            runner = runners[name]
            runner.run()
            times = [runner.run() for _ in range(max(1, min(200, round(_TURN_SECONDS / best[name]))))]
            best[name] = min(best[name], *times)
            turns[name].append(statistics.median(times))
    return {name: Times(best[name], turns[name]) for name in runners}
