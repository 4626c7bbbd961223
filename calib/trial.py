"""Measures what a decision does to the network's outputs, on a few calibration samples: :class:`Trial`.

Techniques that may help or harm (equalization, moved scales, corrected biases) are kept only where this error falls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from postquant.calib.bias_correction import correct_biases
from postquant.calib.collect import collect
from postquant.calib.in_order import in_order
from postquant.calib.input_means import input_means
from postquant.calib.observers import MinMax, RangeMethod, SampleMean
from postquant.calib.output_error import SampleError, combined_error, measured_outputs, sqnr_db
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource, SubsetSource
from postquant.calib.weight_start import start_weights
from postquant.calib.work import forward_work
from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.free_memory import give_back_memory
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.session import make_session
from postquant.runtime_ops.quantizer import TensorQuantizer

# 32 samples of MobileNetV2 at 224 x 224. Fewer for a larger network, by the square of its work, because it also needs
# longer per sample; a network of a third the work gets the most: with 79 samples, ResNet-56 followed them too closely.
TRIAL_WORK = 1.7e9
LEAST_SAMPLES, MOST_SAMPLES = 16, 256
# What costs run time (rounding borders, code books of activations) and was not asked for must gain this much.
WORTH_DB = 1.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Error of a quantized network.

    Attributes:
        error: What decides (:func:`postquant.calib.output_error.combined_error`).
        sqnr_db: SQNR of all samples together, in dB, for the report.
    """

    error: float
    sqnr_db: float


class Trial:
    """Compares quantized networks with one float network.

    Args:
        model: The float model whose outputs are the reference.
        source: Calibration data.
        samples: How many samples, evenly spaced; as many as the network's size allows (:data:`TRIAL_WORK`) when None.
        threads: How many samples are run at the same time; never changes the result.
    """

    def __init__(
        self, model: ir.Model, source: CalibrationSource, *, samples: int | None = None, threads: int = 1
    ) -> None:
        if samples is None:
            work = forward_work(model, source).products
            samples = int(min(max((TRIAL_WORK / max(work, 1.0)) ** 2, LEAST_SAMPLES), MOST_SAMPLES))
        # Ranges are chosen on other samples (:mod:`postquant.calib.output_effect`): this shows what generalizes.
        self._source = SubsetSource(source, spaced(len(source), samples, between=True))
        self._threads = threads
        self._outputs = measured_outputs(model)
        session = make_session(model, outputs=self._outputs)
        self._reference = list(in_order(session.run, self._source, threads))
        del session
        give_back_memory()

    def measure(self, model: ir.Model, plan: QuantPlan) -> Outcome:
        """Runs the emitted model on onnxruntime.

        Args:
            model: The float model that the plan is about (equalized or not).
            plan: Decided entries are quantized; the rest is float.
        """
        session = make_session(emit(model, fit_biases(model, plan)), outputs=self._outputs)
        samples = []
        for got, expected in zip(in_order(session.run, self._source, self._threads), self._reference, strict=True):
            samples.append(SampleError.of((got[name], value) for name, value in expected.items()))
        del session
        give_back_memory()
        return Outcome(combined_error(samples), sqnr_db(samples))

    def quick(self, model: ir.Model, plan: QuantPlan) -> tuple[Outcome, Outcome]:
        """The errors of two quick quantizations: with sample-mean and with min-max ranges.

        Weights keep their largest magnitude, biases are corrected; some of the samples give the numbers. The ranges
        that will be chosen lie between these two kinds, so what helps with both will help with them.

        Args:
            model: The float model.
            plan: A plan of formats.
        """
        readers = {key: _input_of(model, key) for key in plan.requants}
        wanted = list(dict.fromkeys((*plan.activations, *readers.values())))
        # The session goes before the next one comes: each holds the activations of a whole network.
        session = make_session(model, outputs=wanted)
        few = SubsetSource(self._source, spaced(len(self._source), LEAST_SAMPLES))
        statistics = collect(session.run, few, wanted, histogram=False)
        del session
        means = input_means(model, plan, few)
        plan = correct_biases(model, start_weights(model, plan), means)

        def with_ranges(method: RangeMethod) -> QuantPlan:
            def quantizer(value: str, entry: Entry) -> TensorQuantizer:
                if isinstance(entry, TensorQuantizer):
                    return entry
                return TensorQuantizer.from_range(entry, *method.range(statistics[value], entry))

            return dataclasses.replace(
                plan,
                activations={name: quantizer(name, entry) for name, entry in plan.activations.items()},
                requants={key: quantizer(value, plan.requants[key]) for key, value in readers.items()},
            )

        return self.measure(model, with_ranges(SampleMean())), self.measure(model, with_ranges(MinMax()))


def _input_of(model: ir.Model, key: str) -> str:
    name, _, index = key.rpartition(":")
    for node in model.graph:
        if node.name == name:
            value = node.inputs[int(index)]
            assert value is not None
            assert value.name is not None
            return value.name
    raise KeyError(key)


def keep_better(outcomes: Sequence[Outcome]) -> int:
    """Index of the smallest error; ties go to the earlier one.

    >>> keep_better([Outcome(0.2, 10.0), Outcome(0.1, 20.0), Outcome(0.1, 21.0)])
    1
    """
    return min(range(len(outcomes)), key=lambda index: outcomes[index].error)
