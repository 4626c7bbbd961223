"""What reaches a layer, in the float model and behind the already quantized part of the network: :class:`Prefix`.

Scale search goes through the network from its inputs to its outputs. For each tensor it needs, sample by sample, the
float value and the value that the quantized network computed so far produces. Running both networks from their inputs
for every tensor would cost the square of the depth; instead the values that cross a cut (the *frontier*) are written to
a temporary file from time to time, integer codes as integers, and the next layers start from there. Memory stays that
of one sample; the file holds one cut of the network for all samples, wherever a cut is small.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.source import CalibrationSource
from postquant.passes.biases import fit_biases
from postquant.passes.border_nodes import is_border
from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.subgraph import node_sources

Sample = dict[str, npt.NDArray[Any]]

# A cut is written when so many weighted nodes lie behind the last one, and the cut is so small.
_MIN_LAYERS = 3
_MAX_CUT_BYTES = 2 << 20
_MAX_SPOOL_BYTES = 4 << 30
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclasses.dataclass
class _Side:
    """One of the two networks.

    Attributes:
        start: Names of the values at which it starts; None for the graph's inputs.
        spool: File that holds them for all samples; None for the calibration data.
    """

    start: tuple[str, ...] | None = None
    spool: pathlib.Path | None = None


class Prefix:
    """Streams the inputs of layers.

    Args:
        model: The simplified float model.
        source: Calibration data.
        folder: Existing folder for temporary files.
        float_samples: How many samples, evenly spaced, go through the float network as well; all when None.
        cut_bytes: How much of a sample a cut may hold, in bytes; where more crosses, the networks start further back.
        threads: Threads of onnxruntime.
    """

    def __init__(
        self,
        model: ir.Model,
        source: CalibrationSource,
        folder: pathlib.Path,
        *,
        float_samples: int | None = 64,
        cut_bytes: int = _MAX_CUT_BYTES,
        threads: int = 1,
    ) -> None:
        self._model = model
        self._source = source
        self._folder = folder
        self._cut_bytes = cut_bytes
        self._threads = threads
        self._float = _Side()
        self._quantized = _Side()
        self._number = 0
        # The first sample is always among them: it tells the size of a cut.
        self._float_samples = frozenset(spaced(len(source), float_samples))

    @property
    def samples(self) -> int:
        """Number of calibration samples."""
        return len(self._source)

    def stream(
        self,
        plan: QuantPlan,
        tensors: Sequence[str],
        *,
        decided: Iterable[str] | None = None,
        float_tensors: Sequence[str] = (),
        kept: Iterable[str] = (),
        wanted: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[Sample | None, Sample]]:
        """Tensors for each sample.

        Args:
            plan: The decisions so far; all that the tensors depend on is decided, the tensors themselves are not.
            tensors: Values of the float model.
            decided: Tensors whose readers may still come but whose makers never run again: the next calls will
                start behind them, provided that all samples were taken.
            float_tensors: Further values, of the float network only.
            kept: Values that later calls will ask for although what reads them may lie in front of the start: where
                tensors share a scale, it is decided with the last of them.
            wanted: Asked with a sample's index, when its turn comes; the quantized values of a sample that is neither
                wanted nor needed for a cut are not computed. All are wanted when None.

        Yields:
            The float values and those behind the quantized prefix, before their own quantizer, by name. A tensor whose
            quantizer is decided and stands for a Relu or Clip exists behind that quantizer only. Nothing for what was
            not computed.
        """
        quantized = emit(self._model, fit_biases(self._model, plan))
        plans = [(self._model, self._float), (quantized, self._quantized)]
        cuts: list[tuple[str, ...]] = [(), ()]
        if decided is not None:
            names, asked = list(decided), list(kept)
            cuts = [frontier(model, names, side.start, asked) for model, side in plans]
            layers = _layers_behind(self._model, self._float.start, names)
            if layers < _MIN_LAYERS or not all(cuts):
                cuts = [(), ()]
        present = {value.name for node in quantized.graph for value in node.outputs}
        present.update(value.name for value in quantized.graph.inputs)
        found = {name: name if name in present else f"{name}_dequantized" for name in tensors}
        asked_of = ((*tensors, *float_tensors), tuple(found.values()))
        sessions = [
            make_session(
                model,
                inputs=side.start,
                outputs=list(dict.fromkeys((*outputs, *cut))),
                dtypes=_dtypes(model, side.start),
                threads=self._threads,
            )
            for (model, side), cut, outputs in zip(plans, cuts, asked_of, strict=True)
        ]
        self._number += 1
        files = [self._folder / f"{self._number}-{side}.cut" for side in ("float", "quantized")]
        writers: list[BinaryIO | None] = [
            open(path, "wb") if cut else None  # noqa: SIM115
            for path, cut in zip(files, cuts, strict=True)
        ]
        try:
            float_feeds = self._feeds(self._float, self._float_samples)
            for index, feeds in enumerate(self._feeds(self._quantized, None)):
                both = index in self._float_samples
                if not (both or cuts[1] or wanted is None or wanted(index)):
                    yield None, {}
                    continue
                results = [sessions[0].run(next(float_feeds)) if both else None, sessions[1].run(feeds)]
                if index == 0 and any(writers) and not self._fits(results, cuts):
                    for opened in filter(None, writers):
                        opened.close()
                    writers, cuts = [None, None], [(), ()]
                for writer, cut, result in zip(writers, cuts, results, strict=True):
                    if writer is not None and result is not None:
                        # Our own file, read by this process only; NumPy's format costs more to parse than to read.
                        pickle.dump([np.ascontiguousarray(result[name]) for name in cut], writer, protocol=5)
                float_result, quantized_result = results
                assert quantized_result is not None
                yield float_result, {name: quantized_result[value] for name, value in found.items()}
        finally:
            for opened in filter(None, writers):
                opened.close()
        for side, path, cut in zip((self._float, self._quantized), files, cuts, strict=True):
            if cut:
                if side.spool is not None:
                    side.spool.unlink()
                side.start, side.spool = cut, path
            elif path.exists():
                path.unlink()

    def _fits(self, results: Sequence[Sample | None], cuts: Sequence[tuple[str, ...]]) -> bool:
        sizes = [sum(r[name].nbytes for name in cut) if r else 0 for r, cut in zip(results, cuts, strict=True)]
        total = sizes[0] * len(self._float_samples) + sizes[1] * len(self._source)
        return sum(sizes) <= self._cut_bytes and total <= _MAX_SPOOL_BYTES

    def _feeds(self, side: _Side, wanted: frozenset[int] | None) -> Iterator[Sample]:
        """The samples at ``wanted`` (all when None) from where the side starts."""
        if side.spool is None or side.start is None:
            yield from self._source.read(range(len(self._source)) if wanted is None else sorted(wanted))
            return
        # The float side's file holds the wanted samples only.
        with open(side.spool, "rb") as file:
            for _ in range(len(self._source) if wanted is None else len(wanted)):
                yield dict(zip(side.start, pickle.load(file), strict=True))


def spaced(count: int, limit: int | None, *, between: bool = False) -> list[int]:
    """``limit`` indices spread evenly over ``range(count)``; all when None.

    With ``between`` they lie in the middle of their intervals, so that another choice of as many or fewer, made
    without it, shares as few of them as possible.

    >>> spaced(10, 4)
    [0, 2, 5, 7]
    >>> spaced(10, 4, between=True)
    [1, 3, 6, 8]
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [(i * count + (count // 2 if between else 0)) // limit for i in range(limit)]


def frontier(
    model: ir.Model, tensors: Sequence[str], start: Sequence[str] | None, kept: Sequence[str]
) -> tuple[str, ...]:
    """Values that lie between the nodes that make ``tensors`` and the nodes still to come, and those of ``kept``.

    Codes cross the cut instead of the floats that DequantizeLinear makes of them.
    """
    values = {v.name: v for node in model.graph for v in node.outputs}
    begin = set(model.graph.inputs) if start is None else set()
    if start is not None:
        inputs = {v.name: v for v in model.graph.inputs}
        begin = {values.get(name) or inputs[name] for name in start}
    old = _ancestors(begin)
    done: set[ir.Node] = set()
    stack = []
    for name in tensors:
        # What is stored in place of the tensor, if it is quantized: the tensor itself may be gone.
        for candidate in (f"{name}_saturated", f"{name}_quantized", name):
            if candidate in values:
                stack.append(values[candidate])
                break
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or node in done or node in old or value in begin:
            continue
        done.add(node)
        stack.extend(node_sources(node))
    crossing: set[str] = set()
    wanted: list[ir.Value | None] = [
        v for node in model.graph if node not in done and node not in old for v in node_sources(node)
    ]
    wanted += [value for node in done for value in node.outputs if value.is_graph_output()]
    # A tensor that exists only behind its quantizer is asked for there.
    known = {value.name: value for value in model.graph.inputs} | values
    wanted += [known.get(name) or known.get(f"{name}_dequantized") for name in kept]
    for value in _kept_for(wanted, done, old, begin):
        producer = value.producer()
        codes = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
        crossing.add((value if codes is None or value in begin else codes).name or "")
    return tuple(sorted(crossing))


def _kept_for(
    wanted: Iterable[ir.Value | None], done: set[ir.Node], old: set[ir.Node], begin: set[ir.Value]
) -> set[ir.Value]:
    """The values that have to be kept for those that nodes still to come read.

    What lies in front of the last cut has run as well, and its results are gone unless they are at that cut: a
    DequantizeLinear of codes at the cut, which an earlier layer has read too, runs again.
    """
    kept: set[ir.Value] = set()
    seen: set[ir.Node] = set()
    stack = [value for value in wanted if value is not None]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in begin or node in done:
            kept.add(value)
        elif node is not None and node in old and node not in seen:
            seen.add(node)
            stack.extend(node_sources(node))
    return kept


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes that the values depend on."""
    found: set[ir.Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(node_sources(node))
    return found


def _layers_behind(model: ir.Model, start: Sequence[str] | None, tensors: Sequence[str]) -> int:
    """Number of weighted nodes between the last cut and ``tensors``."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    new = _ancestors(values[name] for name in tensors if name in values)
    new -= _ancestors(values[name] for name in start or () if name in values)
    return sum(node.op_type in _WEIGHTED for node in new)


def _dtypes(model: ir.Model, names: Sequence[str] | None) -> dict[str, ir.DataType]:
    """Element types of code tensors at a cut."""
    result = {}
    for node in model.graph:
        makes_codes = node.op_type == "QuantizeLinear" or is_border(node)
        if (makes_codes or node.op_type == "Clip") and node.outputs[0].name in (names or ()):
            point = node.inputs[2] if makes_codes else node.inputs[1]
            if point is not None and point.dtype is not None:
                result[node.outputs[0].name or ""] = point.dtype
    return result
