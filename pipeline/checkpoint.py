"""Resuming an interrupted run: finished stages are kept in ``OUT/.postquant-work`` until the result is published.

A stage is saved as parts (a plan, a model, JSON values, arrays) and then a marker ``<stage>.done`` that lists the
parts with their sizes. Every file appears under its name only when it is complete, and the marker comes last, so that
a stage is either there with all its parts or not at all. The whole belongs to a *fingerprint*
(:mod:`postquant.pipeline.fingerprint`); stages of another one are thrown away, with a word.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import safetensors.numpy

from postquant.passes.plan import QuantPlan, write_atomically
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.lock import DirectoryLock
from postquant.pipeline.output import WORK_DIRECTORY

_FINGERPRINT = "fingerprint"


@dataclasses.dataclass(frozen=True)
class SavedStage:
    """A finished stage on disk; its parts are read when asked for.

    Attributes:
        name: Name of the stage.
        folder: Where the parts are.
        parts: Kinds of parts that were saved: "plan", "model", "data", "arrays".
    """

    name: str
    folder: pathlib.Path
    parts: frozenset[str]

    def plan(self) -> QuantPlan:
        """The plan after the stage."""
        return QuantPlan.load(self.folder / f"{self.name}.plan.safetensors")

    def model(self) -> ir.Model:
        """The model after the stage; large weights stay on disk."""
        return load_model(self.folder / f"{self.name}.onnx")

    def data(self) -> Any:
        """The stage's JSON values."""
        return json.loads((self.folder / f"{self.name}.json").read_bytes())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The stage's arrays."""
        return safetensors.numpy.load_file(self.folder / f"{self.name}.safetensors")


class NullCheckpoint:
    """Keeps nothing: for runs without an output folder. Every checkpoint has these methods."""

    def load(self, stage: str) -> SavedStage | None:
        """The stage if an earlier run finished it, else None."""
        return None

    def save(
        self,
        stage: str,
        *,
        plan: QuantPlan | None = None,
        model: ir.Model | None = None,
        data: Any = None,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """Keeps what a finished stage decided.

        Args:
            stage: Name of the stage, usable as a file name, unique in the run.
            plan: The plan after it.
            model: The model after it, if the stage changed it.
            data: JSON values.
            arrays: Arrays by name.

        Raises:
            OSError: If it cannot be written.
        """


class Checkpoint(NullCheckpoint):
    """Finished stages of a run into ``out``; a context manager that holds the folder's lock.

    Leaving it normally removes the work folder. Leaving it by an exception keeps finished stages, and removes the
    folder when there are none.

    Args:
        out: The output folder; it exists.
        fingerprint: What the run depends on, as a hex digest.
        say: Called with one line when stages are resumed or thrown away.

    Raises:
        OutputError: If another run works on the same folder.
    """

    def __init__(self, out: pathlib.Path, fingerprint: str, say: Callable[[str], None]) -> None:
        self._folder = out / WORK_DIRECTORY
        self._fingerprint = fingerprint
        self._say = say
        self._lock = DirectoryLock(self._folder)

    def __enter__(self) -> Self:
        self._lock.acquire()
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            if kind is None or not any(self._folder.glob("*.done")):
                self._lock.remove_with_folder()
        finally:
            self._lock.release()

    def _begin(self) -> None:
        known = self._folder / _FINGERPRINT
        found = known.read_text() if known.exists() else None
        stages = sorted(p.stem for p in self._folder.glob("*.done"))
        if stages and found != self._fingerprint:
            self._say("the model, the data or the settings have changed: starting from the beginning")
        elif stages:
            self._say(f"resuming after {len(stages)} finished stage{'s' if len(stages) > 1 else ''}")
        for path in sorted(self._folder.iterdir()):
            keep = found == self._fingerprint and not path.name.startswith(".") and path.is_file()
            if path == self._lock.path or keep:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if found != self._fingerprint:
            write_atomically(known, self._fingerprint.encode())

    def staging(self) -> pathlib.Path:
        """An empty folder on the same file system as ``out`` in which the result is prepared."""
        path = self._folder / "result"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def load(self, stage: str) -> SavedStage | None:
        """See :meth:`NullCheckpoint.load`; a stage whose files are not whole counts as not finished."""
        marker = self._folder / f"{stage}.done"
        if not marker.exists():
            return None
        record = json.loads(marker.read_bytes())
        sizes: dict[str, int] = record["files"]
        for name, size in sizes.items():
            path = self._folder / name
            if not path.is_file() or path.stat().st_size != size:
                self._say(f"the saved stage {stage!r} is damaged and is done again")
                marker.unlink()
                return None
        return SavedStage(stage, self._folder, frozenset(record["parts"]))

    def save(
        self,
        stage: str,
        *,
        plan: QuantPlan | None = None,
        model: ir.Model | None = None,
        data: Any = None,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """See :meth:`NullCheckpoint.save`."""
        parts, files = [], []
        (self._folder / f"{stage}.done").unlink(missing_ok=True)
        if plan is not None:
            parts.append("plan")
            files.append(self._folder / f"{stage}.plan.safetensors")
            plan.save(files[-1])
        if model is not None:
            parts.append("model")
            save_model(model, self._folder / f"{stage}.onnx")
            files += sorted(self._folder.glob(f"{stage}.onnx*"))
        if data is not None:
            parts.append("data")
            files.append(self._folder / f"{stage}.json")
            write_atomically(files[-1], json.dumps(data, sort_keys=True).encode())
        if arrays is not None:
            parts.append("arrays")
            files.append(self._folder / f"{stage}.safetensors")
            contiguous = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
            write_atomically(files[-1], safetensors.numpy.save(contiguous))
        record = {"parts": parts, "files": {path.name: os.stat(path).st_size for path in files}}
        write_atomically(self._folder / f"{stage}.done", json.dumps(record, sort_keys=True).encode())
