"""What a long run says while it works: :class:`Progress`, silent or with a bar (:class:`BarProgress`)."""

from __future__ import annotations

import types
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


class NullProgress:
    """Says nothing; for the API and ``--quiet``. Every progress object has these methods."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def stage(self, name: str, total: float | None = None) -> None:
        """A stage begins; the one before is over.

        Args:
            name: What happens, for people ("calibrate").
            total: Amount of work in any unit, or None where it is not known.
        """

    def advance(self, amount: float = 1.0) -> None:
        """A part of the current stage's work is done."""

    def detail(self, text: str) -> None:
        """Where the current stage is, in a few words; replaces what was said before."""

    def say(self, line: str) -> None:
        """One line worth reading: a resumed stage, a discarded checkpoint."""

    def resumed(self, stage: str) -> None:
        """An earlier run had finished a stage, and everything before it."""
        self.say(f"resumed behind stage {stage!r}")

    def close(self) -> None:
        """Nothing more will come."""


class BarProgress(NullProgress):
    """A bar with percentage and time left on a terminal; one line per stage elsewhere.

    Args:
        console: Where to write; standard error, so that standard output holds results only.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=None if console.width < 60 else 30),
                TaskProgressColumn(),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )

    def stage(self, name: str, total: float | None = None) -> None:
        """Starts a new bar, or prints the name."""
        self._name = name
        if self._bar is None:
            self._console.print(f"{name} ...", markup=False, highlight=False)
            return
        if self._task is None:
            self._bar.start()
        else:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total)

    def advance(self, amount: float = 1.0) -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def detail(self, text: str) -> None:
        """Writes the text beside the name of the stage."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._name} {text}")

    def say(self, line: str) -> None:
        """Prints the line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._task = None
