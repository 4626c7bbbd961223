"""Float values of a few samples, asked for from the inputs of a network to its outputs: :class:`SampleFront`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from postquant.calib.in_order import in_order
from postquant.passes.session import make_session

Values = dict[str, Any]

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
        self._kept: Sequence[Values] = [{} for _ in samples]

    def at(self, names: Sequence[str]) -> Callable[[int], Values]:
        """What gives some values of a sample, by its index.

        Args:
            names: Values of the model: graph inputs or inner ones.
        """
        kept = self._kept
        missing = [name for name in names if name not in kept[0] and name not in self._samples[0]]
        if missing:
            start = {name: ir.DataType.from_numpy(array.dtype) for name, array in kept[0].items()}
            inputs = [value.name or "" for value in self._model.graph.inputs if value.name in self._samples[0]]
            session = make_session(self._model, inputs=[*start, *inputs], outputs=missing, dtypes=start)

            def computed(index: int) -> Values:
                feeds = {**self._samples[index], **kept[index]}
                found = session.run(feeds)
                return {name: found[name] if name in found else feeds[name] for name in names}

            first = computed(0)
            if not self._has_room(first):
                return computed
            kept = self._keep([first, *in_order(computed, range(1, len(self._samples)), self._threads)])

        def known(index: int) -> Values:
            feeds = {**self._samples[index], **kept[index]}
            return {name: feeds[name] for name in names}

        return known

    def _has_room(self, values: Values) -> bool:
        # Sequences, and arrays of texts, have no size that tells anything.
        plain = all(isinstance(value, np.ndarray) and not value.dtype.hasobject for value in values.values())
        return plain and sum(value.nbytes for value in values.values()) * len(self._samples) <= self._most_bytes

    def _keep(self, found: Sequence[Values]) -> Sequence[Values]:
        """Puts values in the place of those that there were, or beside them while there is room."""
        # What is fed needs no keeping.
        found = [{name: new[name] for name in new if name not in self._samples[0]} for new in found]
        if self._has_room({**self._kept[0], **found[0]}):
            found = [{**old, **new} for old, new in zip(self._kept, found, strict=True)]
        self._kept = list(found)
        return found
