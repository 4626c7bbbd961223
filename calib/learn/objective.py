"""What is brought close to the float network, as :func:`postquant.calib.learn.reconstruct.reconstruct` sees it:
:class:`Objective`, a block's output or the whole network's.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from postquant.calib.learn.batch_parts import BatchParts, batch_parts, kept_bytes
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.executor import constant_values, run_nodes
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.quantizers import DropMasks
from postquant.calib.learn.reader import Reader
from postquant.calib.learn.sample_arrays import SampleArrays
from postquant.calib.learn.sample_split import SampleSplit
from postquant.passes import semantics
from postquant.runtime_ops.errors import ModelError

Tensor = torch.Tensor
# The float network in torch may differ from onnxruntime by so much, relative to its largest value.
_SAME = 1e-3


class BlockDiffersError(Exception):
    """The executor does not compute what onnxruntime does, for example because the graph fixes its batch size."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Errors on judging samples, relative to the variance of what should be there.

    Attributes:
        loss: What decides.
        error: That of the output, which people are told.
    """

    loss: float
    error: float


class Objective(abc.ABC):
    """Nodes that run in torch, on samples.

    Args:
        nodes: In topological order.
        batch: Samples per step.
        device: Where.
        steps: Threads for the parts of a batch.

    Attributes:
        parts: Into which parts batches are cut.
        variance: Of the target, > 0.
    """

    variance: float

    def __init__(self, nodes: Sequence[ir.Node], batch: int, device: torch.device, steps: ParallelSteps) -> None:
        self.parts = BatchParts(batch, 1)
        self._nodes = nodes
        self._batch = batch
        self._device = device
        self._steps = steps
        self._constants = constant_values(nodes, device)

    @abc.abstractmethod
    def inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What some samples bring, as the quantized network sees it."""

    @abc.abstractmethod
    def exact_inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What some samples bring, as the float network sees it."""

    @abc.abstractmethod
    def expected(self, index: int) -> dict[str, Tensor]:
        """What onnxruntime gives for a sample in the float network, by name."""

    @abc.abstractmethod
    def output(self, part: Sequence[int], reader: Reader) -> Tensor:
        """What the loss compares, for some samples, in one tensor; differentiable, called in any thread."""

    @abc.abstractmethod
    def items(self, chosen: Sequence[int], masks: DropMasks | None) -> list[Any]:
        """A batch, cut into parts, with everything random about them drawn in order."""

    @abc.abstractmethod
    def loss(self, item: Any, constants: Mapping[str, Tensor], quantizers: BlockQuantizers) -> tuple[Tensor, int]:
        """Mean loss of one of the :meth:`items`, and its number of samples; called in any thread."""

    @abc.abstractmethod
    def judged_sums(self, part: Sequence[int], reader: Reader) -> tuple[float, float, int]:
        """Sums over some judging samples of loss and error, and what they are divided by; called in any thread."""

    def run(
        self, inputs: Mapping[str, Tensor], reader: Reader | None, wanted: Collection[str] | None
    ) -> dict[str, Tensor]:
        """Values of the nodes by name; those that are wanted, or all."""
        values = {**self._constants, **inputs}
        run_nodes(self._nodes, values, reader, wanted=wanted)
        return values

    def take(self, values: SampleArrays, chosen: Sequence[int]) -> Tensor:
        """Some samples on the device."""
        return self.put(values.take(chosen))

    def put(self, values: Tensor) -> Tensor:
        """Samples on the device, in the layout in which convolutions of few channels are twice as fast."""
        part = values.to(self._device)
        return part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part

    def check(self, split: SampleSplit) -> None:
        """The float nodes give what onnxruntime gives.

        Raises:
            BlockDiffersError: If they do not.
        """
        few = split.few()
        wants = [self.expected(index) for index in few]
        try:
            with torch.no_grad():
                got = self.run(self.exact_inputs(few), None, wants[0])
        except (RuntimeError, ModelError) as error:  # a shape that holds for one sample only
            raise BlockDiffersError(f"torch cannot run it on {len(few)} samples: {error}") from error
        for name in wants[0]:
            want = torch.cat([values[name] for values in wants]).to(self._device)
            if got[name].shape != want.shape:
                raise BlockDiffersError(f"in torch it gives shape {tuple(got[name].shape)}, not {tuple(want.shape)}")
            difference = float((got[name] - want).abs().max())
            if not difference <= _SAME * max(float(want.abs().max()), 1e-30):
                raise BlockDiffersError(f"in torch it differs from onnxruntime by {difference:.2g}")

    def bias_sizes(self, split: SampleSplit) -> dict[str, float]:
        """Root mean square of what each layer gives in the float network, by the name of its bias."""
        with torch.no_grad():
            values = self.run(self.exact_inputs(split.few()), None, None)
        layers = [(bias.name or "", node) for node in self._nodes if (bias := semantics.bias_of(node)) is not None]
        outputs = {bias: values[node.outputs[0].name or ""] for bias, node in layers}
        return {bias: max(float(output.square().mean().sqrt()), 1e-15) for bias, output in outputs.items()}

    def settle(self, quantizers: BlockQuantizers, split: SampleSplit) -> None:
        """Lets a whole batch decide what the first run decides, so that no part of one does."""
        if not quantizers.settled:
            with torch.no_grad():
                self.output(split.batch(self._batch), quantizers.reader())

    def measure(self, quantizers: BlockQuantizers, split: SampleSplit) -> None:
        """Decides into which parts batches are cut; a GPU computes them whole."""
        if self._device.type != "cpu":
            return
        constants = quantizers.constants()
        shared = (*self._constants.values(), *constants.values())
        (item,) = self.items(split.few()[:1], None)
        kept = kept_bytes(lambda: self.loss(item, constants, quantizers)[0], 1, shared)
        self.parts = batch_parts(kept, self._batch)

    def backward(
        self,
        chosen: Sequence[int],
        quantizers: BlockQuantizers,
        masks: DropMasks | None,
        leaves: Sequence[Tensor],
    ) -> float:
        """Adds the gradients of the loss on some samples to those of ``leaves``; gives the loss."""

        def loss(item: Any, constants: Mapping[str, Tensor]) -> Tensor:
            value, count = self.loss(item, constants, quantizers)
            return value * (count / len(chosen))

        constants = quantizers.constants()
        return self._steps.backward(loss, self.items(chosen, masks), leaves, constants, at_once=self.parts.at_once)

    def judge(self, reader: Reader, split: SampleSplit) -> Judged:
        """Loss and error on judging samples."""
        loss, error, count = 0.0, 0.0, 0

        def sums(part: list[int]) -> tuple[float, float, int]:
            with torch.no_grad():
                return self.judged_sums(part, reader.another())

        def add(found: tuple[float, float, int]) -> None:
            nonlocal loss, error, count
            loss, error, count = loss + found[0], error + found[1], count + found[2]

        self._steps.each(sums, list(split.judging(self.parts.size)), add, at_once=self.parts.at_once)
        return Judged(loss / count, error / count)
