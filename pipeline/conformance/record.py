"""Writes the folder ``conformance/``: :func:`write_conformance`.

The expected codes are those of onnxruntime with all optimizations. Before they are written down they are compared with
the NumPy law, so two implementations that share no code agree on each of them; where they round a tie differently, the
law's own slack says so (docs/verification.md).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.pipeline.chunks import chunked, element_counts
from postquant.pipeline.conformance.expected import (
    INDEX_FILE,
    Conformance,
    ExpectedOutput,
    ExpectedSample,
    ExpectedTensor,
)
from postquant.pipeline.kernels import OptimizedGraph, observed_session
from postquant.pipeline.simulate import Simulation
from postquant.pipeline.stored import Stored
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.integer import compare_codes

Feed = Mapping[str, npt.NDArray[Any]]

# Codes of all samples together; a bundle is sent by mail.
_MOST_CODES = 16 << 20
# Outputs that float nodes compute: what a few codes at ties in front of them may do, as a share of the largest value.
_FLOAT_SHARE = 1e-2

TOLERANCE = (
    "Every code is compared with the one that its operator gives for the receiver's own codes in front of it. It may "
    "differ by one where the value before rounding lies at a rounding tie, within the error of float32 arithmetic, and "
    "at most one code in a thousand of a tensor may do so. Where these codes were not dumped, or no "
    "formula describes the operator, a tensor is compared with the expected codes: 1 % may differ by one, and 10 % by "
    "four when something in front of it differs already, because small differences travel."
)


def write_conformance(
    folder: pathlib.Path, model: ir.Model, float_model: ir.Model, plan: QuantPlan, samples: Sequence[Feed], source: str
) -> Conformance:
    """Runs samples and writes what a receiver should compute.

    Args:
        folder: It does not exist yet.
        model: The quantized model in standard operators.
        float_model: The float model that the plan is about.
        plan: The plan.
        samples: Feeds, at least one.
        source: Where they come from, for the index.

    Raises:
        VerificationError: If onnxruntime's codes are not those of the law.
    """
    return _Record(folder, model, Simulation(float_model, model, plan), samples, source).run()


class _Record:
    def __init__(
        self, folder: pathlib.Path, model: ir.Model, simulation: Simulation, samples: Sequence[Feed], source: str
    ) -> None:
        self.folder, self.model, self.simulation, self.source = folder, model, simulation, source
        self.stored = {tensor.codes: tensor for tensor in simulation.stored}
        self.counts = element_counts(model, list(self.stored), samples[0]) if self.stored else {}
        total = sum(self.counts.values())
        self.samples = samples[: max(1, min(len(samples), _MOST_CODES // max(total, 1)))]
        self.held = self._held(_MOST_CODES // len(self.samples))
        self.keys = {name: _key(index, name) for index, name in enumerate(self.stored)}
        self.laws: set[str] = set()
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = dict.fromkeys(self.stored, ())
        self.kernels: dict[str, str] = {}

    def _held(self, room: int) -> set[str]:
        """The tensors that fit, small ones first."""
        held = set()
        for name in sorted(self.stored, key=lambda n: (self.counts[n], n)):
            room -= self.counts[name]
            if room < 0:
                break
            held.add(name)
        return held

    def run(self) -> Conformance:
        expected = [ExpectedSample(dict(feed), {}, {}) for feed in self.samples]
        for chunk in chunked(list(self.stored), self.counts, 1) if self.stored else [[]]:
            needed = dict.fromkeys(n for name in chunk for n in (*self.stored[name].needs, name))
            session, optimized = observed_session(self.model, list(needed))
            for node in self.model.graph:
                kernel = optimized.kernel_of(node)
                if node.name and kernel:
                    self.kernels.setdefault(node.name, kernel)
            for sample in expected:
                arrays = session.run(sample.inputs)
                sample.outputs.update({name: arrays[name] for name in self._outputs()})
                for name in chunk:
                    self.shapes[name] += ((*arrays[name].shape,),)
                    self._check(self.stored[name], arrays, sample.inputs, optimized)
                    if name in self.held:
                        sample.codes[self.keys[name]] = arrays[name]
        for index, sample in enumerate(expected):
            sample.save(self.folder, index)
        result = Conformance(
            samples=len(expected),
            source=self.source,
            tensors=tuple(self._tensor(tensor) for tensor in self.stored.values()),
            outputs=tuple(self._output(index, expected) for index in range(len(self.model.graph.outputs))),
            kernels=dict(sorted(self.kernels.items())),
            tolerance=TOLERANCE,
        )
        (self.folder / INDEX_FILE).write_bytes(result.to_bytes())
        return result

    def _outputs(self) -> list[str]:
        return [value.name or "" for value in self.model.graph.outputs]

    def _check(self, tensor: Stored, arrays: Feed, feed: Feed, optimized: OptimizedGraph) -> None:
        prediction = self.simulation.predict(tensor, arrays, feed, optimized)
        if prediction is None:
            return
        self.laws.add(tensor.codes)
        agreement = compare_codes(prediction, arrays[tensor.codes].astype(np.int32))
        if agreement.mismatches:
            raise VerificationError(
                "the codes of the bundle's model are not those of the law",
                where=tensor.codes,
                found=f"{agreement.mismatches} of {agreement.codes} codes differ",
            )

    def _tensor(self, tensor: Stored) -> ExpectedTensor:
        node = tensor.node
        operator = "input" if node is None else node.op_type
        kernel = "" if node is None else self.kernels.get(node.name or "", "")
        return ExpectedTensor(
            key=self.keys[tensor.codes],
            name=tensor.value.name or "",
            codes=tensor.codes,
            operator="requantize" if tensor.stored_codes is not None else operator,
            node="" if node is None else node.name or "",
            kernel=kernel,
            law=tensor.codes in self.laws,
            dtype=np.dtype(tensor.quantizer.spec.container).name,
            scale=float(tensor.quantizer.scale),
            zero_point=int(tensor.quantizer.zero_point),
            needs=tensor.needs,
            shapes=self.shapes[tensor.codes],
            held=tensor.codes in self.held,
        )

    def _output(self, index: int, expected: Sequence[ExpectedSample]) -> ExpectedOutput:
        name, mine = self._outputs()[index], self.model.graph.outputs[index]
        producer = mine.producer()
        codes = None if producer is None or not producer.inputs else producer.inputs[0]
        tensor = self.stored.get(codes.name or "") if codes is not None else None
        if tensor is not None and producer is not None and producer.op_type == "DequantizeLinear":
            return ExpectedOutput(
                name=name,
                tolerance=2 * float(tensor.quantizer.scale),
                reason="two codes: a tie of its own rounding, and ties in front of it",
            )
        largest = max(float(np.abs(s.outputs[name].astype(np.float64)).max(initial=0.0)) for s in expected)
        return ExpectedOutput(
            name=name,
            tolerance=_FLOAT_SHARE * largest,
            reason="computed in float32 from codes that may differ at ties: 1 % of the largest value",
        )


def _key(index: int, name: str) -> str:
    """A name that is unique and safe as a file name.

    >>> _key(3, "/layer1/conv_quantized")
    't0003__layer1_conv_quantized'
    """
    return f"t{index:04d}_" + re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]
