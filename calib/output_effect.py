"""Chooses each activation's range by its effect on the network's outputs.

Ranges that minimise a tensor's own error are far too wide where a few samples have huge values, and what a tensor's
error does to the result differs by orders of magnitude between tensors. So every candidate range is tried: the float
network runs with only this tensor quantized, from the tensor to the outputs, and

    effect = sqrt( mean over samples of e_i  *  e of all samples together ),   e = sqrt( |o - o~|^2 / |o|^2 )

is minimised (:func:`postquant.calib.output_error.combined_error`); the first factor keeps single samples from deciding,
the second is blind to none. Quantizing one tensor at a time shows its effect without the noise of all the others.
Rounding errors are independent, so their effects add up. Clipping is another matter: it concerns few samples, which a
choice on few samples may not have seen, and what one layer clips the next ones clip again. So a wider range is taken
where its disadvantage is within one standard error of the paired differences.

Candidates come from the observers (min-max, sample mean, percentile, Lp, entropy), widths between them, and narrower
ones. A few samples see all of them, and some more those that are not far behind; the rest decides among the best two,
until one of them is clearly better. Then one end of a range with two signs is moved inwards: what a Relu behind a
residual sum cuts off needs no codes, which no observer of the tensor sees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.effect_candidates import finalists, hopeful, indistinguishable, moved_ends, settled
from postquant.calib.in_order import in_order
from postquant.calib.output_error import SampleError, combined_error, float_outputs
from postquant.calib.prefix import spaced
from postquant.calib.sample_front import SampleFront, Values
from postquant.calib.source import CalibrationSource
from postquant.passes.session import Session, make_session
from postquant.passes.storage import reads_original
from postquant.passes.subgraph import captured_values, node_sources
from postquant.runtime_ops.errors import CalibrationError
from postquant.runtime_ops.quantizer import TensorQuantizer

_SCALE, _ZERO, _LOW, _HIGH = "postquant_scale", "postquant_zero_point", "postquant_low", "postquant_high"
_RESULT = "postquant_effect_value_2"

# Effects below this part of the largest one so far need no finer choice.
NEGLIGIBLE = 0.1


@dataclasses.dataclass(frozen=True)
class EffectOptions:
    """How much is tried.

    Attributes:
        samples: Samples that decide among the finalists.
        screening: Samples that see every candidate.
        finalists: Candidates that survive the screening.
    """

    samples: int = 16
    screening: int = 4
    finalists: int = 2


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome for one tensor.

    Attributes:
        quantizer: The best quantizer.
        candidate: Name of the winning candidate.
        effect_db: SQNR of the network's outputs, in dB, with only this tensor quantized.
    """

    quantizer: TensorQuantizer
    candidate: str
    effect_db: float


class OutputEffect:
    """Measures effects on one float model.

    Args:
        model: The simplified float model.
        source: Calibration data.
        options: How much is tried.
        floats: Names of the nodes that stay in float: some of them read a value before its quantization.
        rounded: Values that these nodes read behind it all the same (``QuantPlan.rounded_inputs``).
        threads: How many samples are run at the same time; never changes the result.
    """

    def __init__(
        self,
        model: ir.Model,
        source: CalibrationSource,
        options: EffectOptions,
        *,
        floats: Collection[str] = (),
        rounded: Collection[str] = (),
        threads: int = 1,
    ) -> None:
        self._model = model
        self._options = options
        self._floats = frozenset(floats)
        self._rounded = frozenset(rounded)
        self._threads = threads
        self._samples = list(source.read(spaced(len(source), options.samples)))
        # The screening samples come first, themselves spread over all.
        first = spaced(len(self._samples), options.screening)
        self._order = [*first, *(i for i in range(len(self._samples)) if i not in set(first))]
        self._copy = model.clone()
        self._front = SampleFront(model, self._samples, threads=threads)
        self._outputs = float_outputs(model)
        self._worst = 0.0
        self._reference: list[dict[str, npt.NDArray[Any]]] = []
        if self._outputs:
            session = make_session(model, outputs=self._outputs)
            self._reference = list(in_order(session.run, self._samples, threads))

    def sees(self, tensor: str, *, reader: tuple[str, int] | None = None) -> bool:
        """Whether a float output of the network depends on a tensor (on what one reader makes of it)."""
        graph = self._model.graph
        value = next(v for v in (*graph.inputs, *(v for n in graph for v in n.outputs)) if v.name == tensor)
        uses, is_output = self._quantized_uses(graph, value, reader)
        if is_output and tensor in self._outputs:
            return True
        direct = {node for node, _ in uses}
        inside = any(node.graph is not graph for node in direct)
        behind = {node for node in graph if node in direct or (inside and value in captured_values(node))}
        behind |= _descendants(graph, [output for node in behind for output in node.outputs])
        return any(_producer_of(graph, name) in behind for name in self._outputs)

    def _quantized_uses(
        self, graph: ir.Graph, value: ir.Value, reader: tuple[str, int] | None
    ) -> tuple[list[tuple[ir.Node, int]], bool]:
        """Who reads the quantized value in the emitted model, and whether the graph's output is the quantized one."""
        if reader is not None:
            return [(use.node, use.idx) for use in value.uses() if (use.node.name, use.idx) == reader], False
        integer = {node for node in graph if node.name not in self._floats}
        if value.name not in self._rounded and reads_original(value, integer):
            return [(use.node, use.idx) for use in value.uses() if use.node.name not in self._floats], False
        return [(use.node, use.idx) for use in value.uses()], value.is_graph_output()

    def choose(
        self,
        tensor: str,
        candidates: Mapping[str, TensorQuantizer],
        *,
        reader: tuple[str, int] | None = None,
        ends: bool = False,
    ) -> Choice:
        """The candidate with the smallest effect.

        Args:
            tensor: A value of the model.
            candidates: Name -> quantizer, of one format; ties go to the earlier one.
            reader: (node name, input index): quantize for this reader only; for all when None.
            ends: Whether to go on from the best candidate and move one end of its range inwards.
        """
        names = list(candidates)
        if (len(names) == 1 and not ends) or not self.sees(tensor, reader=reader):
            return Choice(candidates[names[0]], names[0], math.inf)
        container = ir.DataType.from_numpy(np.dtype(candidates[names[0]].spec.container))
        suffix, others = self._suffix(tensor, reader, container)
        values = self._front.at([tensor, *others])
        best, error = self._best(tensor, candidates, values, suffix)
        quantizer = candidates[best]
        if ends and error > NEGLIGIBLE * self._worst:
            moved = {best: quantizer, **moved_ends(best, quantizer)}
            if len(moved) > 1:
                best, error = self._best(tensor, moved, values, suffix)
                quantizer = moved[best]
        self._worst = max(self._worst, error)
        return Choice(quantizer, best, -20 * math.log10(error))

    def _best(
        self,
        tensor: str,
        candidates: Mapping[str, TensorQuantizer],
        values: Callable[[int], Values],
        suffix: Session,
    ) -> tuple[str, float]:
        """Name and effect of the best candidate."""
        alive = sorted(candidates, key=lambda name: float(candidates[name].scale), reverse=True)
        errors: dict[str, list[SampleError]] = {name: [] for name in alive}

        def measure(indices: Sequence[int]) -> None:
            def sample_errors(index: int) -> list[SampleError]:
                feeds = values(index)
                return [self._error(suffix, feeds, candidates[n], self._reference[index], tensor) for n in alive]

            for found in in_order(sample_errors, indices, self._threads):
                for name, error in zip(alive, found, strict=True):
                    errors[name].append(error)

        first, screening = -(-self._options.screening // 2), self._options.screening
        measure(self._order[:first])
        alive = hopeful({name: combined_error(errors[name]) for name in alive})
        measure(self._order[first:screening])
        effects = {name: combined_error(errors[name]) for name in alive}
        # A tensor that does a hundred times less harm than another one needs no finer choice.
        negligible = min(effects.values()) < NEGLIGIBLE * self._worst
        alive = finalists(effects, 1 if negligible else self._options.finalists)
        for begin in range(screening, len(self._order), screening):
            if settled([errors[name] for name in alive]):
                break
            measure(self._order[begin : begin + screening])
        best = min(alive, key=lambda name: combined_error(errors[name]))
        chosen = next(name for name in alive if name == best or indistinguishable(errors[name], errors[best]))
        return chosen, combined_error(errors[chosen])

    def _error(
        self,
        suffix: Session,
        feeds: dict[str, npt.NDArray[Any]],
        quantizer: TensorQuantizer,
        reference: Mapping[str, npt.NDArray[Any]],
        tensor: str,
    ) -> SampleError:
        low, high = quantizer.range()
        feeds[_SCALE] = quantizer.scale
        feeds[_ZERO] = quantizer.zero_point.astype(quantizer.spec.container)
        feeds[_LOW], feeds[_HIGH] = np.asarray(low, np.float32), np.asarray(high, np.float32)
        outputs = suffix.run(feeds)
        # Where the tensor is an output itself, the output is what its quantizer makes of it.
        error = SampleError.of(
            (value, reference[tensor if name == _RESULT else name]) for name, value in outputs.items()
        )
        if not math.isfinite(error.noise):
            raise CalibrationError("the network's outputs are not finite", where="calibration of ranges")
        return error

    def _suffix(self, tensor: str, reader: tuple[str, int] | None, container: ir.DataType) -> tuple[Session, list[str]]:
        """A session from the tensor to the outputs with a quantizer fed at run time, and the other values it reads."""
        graph = self._copy.graph
        values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        source = values[tensor]
        feeds = [
            ir.Value(name=_SCALE, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(())),
            ir.Value(name=_ZERO, type=ir.TensorType(container), shape=ir.Shape(())),
            ir.Value(name=_LOW, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(())),
            ir.Value(name=_HIGH, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(())),
        ]
        scale, zero, low, high = feeds
        uses, is_output = self._quantized_uses(graph, source, reader)
        # Saturating first lets one graph serve all widths: the codes of what remains lie within the range.
        clip = ir.node("Clip", [source, low, high])
        quantize = ir.node("QuantizeLinear", [clip.outputs[0], scale, zero])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
        for number, node in enumerate((clip, quantize, dequantize)):
            node.name = f"postquant_effect_{number}"
            node.outputs[0].name = f"postquant_effect_value_{number}"
        result = dequantize.outputs[0]
        for node, index in uses:
            node.replace_input_with(index, result)
        graph.inputs.extend(feeds)
        kept_outputs = list(graph.outputs)
        producer = source.producer()
        if producer is None:
            graph.insert_before(next(iter(graph)), [clip, quantize, dequantize])
        else:
            graph.insert_after(producer, [clip, quantize, dequantize])
        outputs = self._outputs
        if is_output:
            for index, output in enumerate(graph.outputs):
                if output is source:
                    graph.outputs[index] = result
            outputs = [result.name if name == tensor else name for name in outputs]  # type: ignore[misc]
        affected = {clip, quantize, dequantize, *_descendants(graph, [result])}
        others = list(
            dict.fromkeys(
                v.name or ""
                for node in graph
                if node in affected
                for v in node_sources(node)
                if v is not result
                and (v.producer() is None or v.producer() not in affected)
                and not v.is_initializer()
                and v.name not in (tensor, _SCALE, _ZERO, _LOW, _HIGH)
            )
        )
        reachable = [name for name in outputs if _producer_of(graph, name) in affected or name == result.name]
        try:
            session = make_session(self._copy, inputs=[tensor, *others, _SCALE, _ZERO, _LOW, _HIGH], outputs=reachable)
        finally:
            # The copy serves the next tensor: a new one each time would cost as much as the session.
            for node, index in uses:
                node.replace_input_with(index, source)
            graph.outputs[:] = kept_outputs
            graph.remove([dequantize, quantize, clip], safe=True)
            del graph.inputs[-len(feeds) :]
        return session, others


def _descendants(graph: ir.Graph, values: Sequence[ir.Value]) -> set[ir.Node]:
    """The nodes that depend on values, also through what their subgraphs capture."""
    reached = set(values)
    found: set[ir.Node] = set()
    for node in graph:
        if not reached.isdisjoint(node_sources(node)):
            found.add(node)
            reached.update(node.outputs)
    return found


def _producer_of(graph: ir.Graph, name: str | None) -> ir.Node | None:
    for output in graph.outputs:
        if output.name == name:
            return output.producer()
    return None
