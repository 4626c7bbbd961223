"""What the stages did, for the report, and across a resumed run: :class:`StageLog`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from postquant.calib.easyquant import LayerChange
from postquant.calib.output_effect import Choice
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import StageReport


class StageLog:
    """Collects stage reports, notes and per-layer gains.

    Args:
        progress: Told about resumed stages.

    Attributes:
        stages: In order.
        notes: In order.
        layer_gains: Node name -> stage -> gain in dB of the layer's own output error.
        layer_books: Node name -> code book of the weight -> SQNR in dB that it would give the layer's output.
        layer_noise: Node name -> width ("w4" of the weight, "a4" of the input) -> SQNR in dB of the network's outputs
            with this layer alone quantized; where bits were allocated.
        tensor_effects: Key of an activation's quantizer -> its bits, and SQNR in dB of the outputs with it alone.
        tensor_sqnr: Stage -> value name -> SQNR in dB of the stored tensor after it; measured again by a resumed run.
    """

    def __init__(self, progress: NullProgress) -> None:
        self.stages: list[StageReport] = []
        self.notes: list[str] = []
        self.layer_gains: dict[str, dict[str, float]] = {}
        self.layer_books: dict[str, dict[str, float]] = {}
        self.layer_noise: dict[str, dict[str, float]] = {}
        self.tensor_effects: dict[str, tuple[int, float]] = {}
        self.tensor_sqnr: dict[str, dict[str, float]] = {}
        self._progress = progress
        self._mark = (0, 0)

    def add(self, name: str, detail: str, *, kept: bool = True, sqnr_db: float | None = None) -> None:
        """One stage, or one technique within it."""
        self.stages.append(StageReport(name=name, kept=kept, sqnr_db=sqnr_db, detail=detail))

    def note(self, *notes: str) -> None:
        """Lines that the report must not be silent about."""
        self.notes.extend(notes)

    def changes(self, changes: Sequence[LayerChange]) -> None:
        """What the scale search did to each layer."""
        for change in changes:
            self.layer_gains.setdefault(change.layer, {})["weights"] = change.weight_gain_db
            books = {book.value: candidate for book, candidate in change.code_books.items()}
            if books:
                self.layer_books[change.layer] = {
                    **{f"{name} nearest": candidate.nearest_db for name, candidate in books.items()},
                    **{name: candidate.db for name, candidate in books.items()},
                }
        sampled = [change.layer for change in changes if not change.exact]
        if sampled:
            shown = ", ".join(sampled[:3]) + (", ..." if len(sampled) > 3 else "")
            self.note(
                f"second moments of {len(sampled)} of {len(changes)} layers were taken at a seeded sample of "
                f"samples and output positions, not at all of them ({shown})"
            )

    def effects(self, choices: Mapping[str, Choice]) -> None:
        """What each activation's quantizer alone does to the outputs."""
        self.tensor_effects.update({key: (c.quantizer.spec.bits, c.effect_db) for key, c in choices.items()})

    def since_resume(self) -> dict[str, Any]:
        """Everything since the last saved stage, as JSON values for the next one."""
        stages, notes = self._mark
        self._mark = (len(self.stages), len(self.notes))
        return {
            "stages": [dataclasses.asdict(stage) for stage in self.stages[stages:]],
            "notes": self.notes[notes:],
            "gains": self.layer_gains,
            "books": self.layer_books,
            "noise": self.layer_noise,
            "effects": self.tensor_effects,
        }

    def resume(self, stage: str, data: Any) -> None:
        """Takes over what a saved stage had recorded, in place of what has been recorded since the one before."""
        stages, notes = self._mark
        self.stages[stages:] = [StageReport(**values) for values in data["stages"]]
        self.notes[notes:] = data["notes"]
        self.layer_gains.update(data["gains"])
        self.layer_books.update(data.get("books", {}))
        self.layer_noise.update(data.get("noise", {}))
        self.tensor_effects.update({key: (bits, effect) for key, (bits, effect) in data.get("effects", {}).items()})
        self._mark = (len(self.stages), len(self.notes))
        self._progress.resumed(stage)
