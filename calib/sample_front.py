"""Float values of a few samples, asked for from the inputs of a network to its outputs: :class:`SampleFront`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.in_order import in_order
from postquant.passes.session import make_session

Values = dict[str, npt.NDArray[Any]]

# What the values that are kept may hold for all samples together.
_MOST_BYTES = 12 << 20


class SampleFront:
    """Computes inner values of the float network for a few samples.

    Whoever asks for one tensor after the other would run the network up to it each time. So values that were asked for
    are kept where they are small, and the next ones are computed from them.

    Args:
        model: The float model.
        samples: Feeds of the whole network.
        threads: How many samples are run at the same time; never changes the result.
        most_bytes: What is kept for all samples together.
    """

    def __init__(
        self, model: ir.Model, samples: Sequence[Values], *, threads: int = 1, most_bytes: int = _MOST_BYTES
    ) -> None:
        self._model = model
        self._samples = samples
        self._threads = threads
        self._most_bytes = most_bytes
        self._kept: list[Values] = [{} for _ in samples]

    def at(self, names: Sequence[str]) -> Callable[[int], Values]:
        """What gives some values of a sample, by its index.

        Args:
            names: Values of the model: graph inputs or inner ones.
        """
        missing = [name for name in names if name not in self._kept[0] and name not in self._samples[0]]
        if missing:
            start = {name: ir.DataType.from_numpy(array.dtype) for name, array in self._kept[0].items()}
            inputs = [value.name or "" for value in self._model.graph.inputs if value.name in self._samples[0]]
            session = make_session(self._model, inputs=[*start, *inputs], outputs=missing, dtypes=start)

            def computed(index: int) -> Values:
                return {**self._known(index, names), **session.run({**self._samples[index], **self._kept[index]})}

            first = computed(0)
            if not self._has_room(first):
                return computed
            others = in_order(computed, range(1, len(self._samples)), self._threads)
            self._keep([first, *others])
        return lambda index: self._known(index, names)

    def _known(self, index: int, names: Sequence[str]) -> Values:
        both = (self._kept[index], self._samples[index])
        return {name: values[name] for name in names for values in both if name in values}

    def _has_room(self, values: Values) -> bool:
        return _size(values) * len(self._samples) <= self._most_bytes

    def _keep(self, found: Sequence[Values]) -> None:
        """Puts values in the place of those that there were, or beside them while there is room."""
        if self._has_room({**self._kept[0], **found[0]}):
            found = [{**old, **new} for old, new in zip(self._kept, found, strict=True)]
        self._kept = list(found)


def _size(values: Values) -> int:
    return sum(array.nbytes for array in values.values())
