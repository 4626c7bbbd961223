"""run.json and the clock: times add up, everything is passed on, damage is told."""

from __future__ import annotations

import pathlib
import time

import pytest

from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import RunStats
from postquant.pipeline.run_costs import RunCosts, StageClock, StageCost
from postquant.runtime_ops.errors import ModelError


class Listener(NullProgress):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def stage(self, name: str, total: float | None = None) -> None:
        self.heard.append((name, total))

    def advance(self, amount: float = 1.0) -> None:
        self.heard.append(amount)

    def say(self, line: str) -> None:
        self.heard.append(line)

    def close(self) -> None:
        self.heard.append("closed")


def test_times_of_stages_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StageClock(NullProgress())
    for name in ("a", "b", "a"):
        clock.stage(name)
    costs = clock.read(RunStats(seconds=10.0, peak_bytes=5))
    assert costs.stages == (StageCost(name="a", seconds=2.0 + 4.0), StageCost(name="b", seconds=3.0))
    assert (costs.seconds, costs.peak_bytes, costs.resumed) == (10.0, 5, False)


def test_everything_is_passed_on() -> None:
    listener = Listener()
    with StageClock(listener) as clock:
        clock.stage("calibrate", 4)
        clock.advance(2.0)
        clock.say("hello")
        clock.resumed("ranges")
    assert listener.heard == [("calibrate", 4), 2.0, "hello", "resumed behind stage 'ranges'", "closed"]
    assert clock.read(RunStats(seconds=0.0, peak_bytes=None)).resumed


def test_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.json"
    assert RunCosts.load(path) is None
    costs = RunCosts(seconds=1.5, peak_bytes=None, resumed=True, stages=(StageCost(name="a", seconds=0.25),))
    costs.save(path)
    assert RunCosts.load(path) == costs


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "x": 1}'])
def test_damage(tmp_path: pathlib.Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ModelError, match="the costs of the run cannot be read"):
        RunCosts.load(path)


def test_another_format(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"schema_version": 9}')
    with pytest.raises(ModelError, match="expected schema_version 1, found 9"):
        RunCosts.load(path)
