"""A block's output comes close to the float network's: :class:`BlockObjective`.

    L = |f(x_in) - y|^2 / |y - mean y|^2

``x_in`` comes from the already quantized prefix, ``y`` from the float network. Errors that no reader of the output can
see do not count (:mod:`postquant.calib.learn.visible`), and y has the variance of what they see. Where the elements of
y do not count the same (:mod:`postquant.calib.learn.fisher`), every squared error is multiplied by what it counts. With
QDrop's masks a part of the input comes from the float network, and a part of the activations inside is not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from postquant.calib.learn.block_cache import BlockSamples
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.objective import Objective
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.quantizers import DropMasks
from postquant.calib.learn.reader import Reader
from postquant.calib.learn.visible import Visible

Tensor = torch.Tensor
_Item = tuple[list[int], DropMasks | None]


class BlockObjective(Objective):
    """One block.

    Args:
        nodes: The block's nodes in topological order.
        output: Name of the block's output.
        samples: Inputs and targets.
        batch: Samples per step.
        device: Where.
        steps: Threads for the parts of a batch.
        visible: What the readers of the output see of it.
        importance: What every element of the output counts, of mean 1; None for 1
            (:class:`postquant.calib.learn.fisher.Importance`).
    """

    def __init__(
        self,
        nodes: Sequence[ir.Node],
        output: str,
        samples: BlockSamples,
        batch: int,
        device: torch.device,
        steps: ParallelSteps,
        visible: Visible,
        importance: Tensor | None = None,
    ) -> None:
        super().__init__(nodes, batch, device, steps)
        self._output = output
        self._samples = samples
        self._visible = visible
        self._importance = None if importance is None else _fitting(importance, samples).to(device)
        total, square, count = 0.0, 0.0, 0
        for index in range(0, len(samples), max(len(samples) // 64, 1)):
            part = visible.clip(samples.target.take([index])).double()
            total, square, count = total + float(part.sum()), square + float(part.square().sum()), count + part.numel()
        self.variance = max(square / count - (total / count) ** 2, 1e-30)

    def inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Behind the quantized prefix."""
        return {name: self.take(values, chosen) for name, values in self._samples.quantized.items()}

    def exact_inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """In the float network."""
        return {name: self.take(values, chosen) for name, values in self._samples.exact.items()}

    def expected(self, index: int) -> dict[str, Tensor]:
        """The target."""
        return {self._output: self._samples.target.take([index])}

    def output(self, part: Sequence[int], reader: Reader) -> Tensor:
        """The block's output, in units in which every squared error counts 1."""
        result = self._visible.clip(self._run(self.inputs(part), reader))
        return result if self._importance is None else result * self._importance.sqrt()

    def items(self, chosen: Sequence[int], masks: DropMasks | None) -> list[_Item]:
        """Samples and masks of every part."""
        return [(part, None if masks is None else masks.part()) for part in self.parts.cut(chosen)]

    def loss(self, item: _Item, constants: Mapping[str, Tensor], quantizers: BlockQuantizers) -> tuple[Tensor, int]:
        """Relative error of the output, each element by what it counts."""
        part, masks = item
        reader = quantizers.reader(masks=masks, constants=constants)
        result = self._run(self._mixed(part, masks), reader)
        square = self._visible.error(result, self.take(self._samples.target, part)).square()
        error = self._counted(square).mean() / self.variance
        return error + reader.penalty(), len(part)

    def judged_sums(self, part: Sequence[int], reader: Reader) -> tuple[float, float, int]:
        """Of squared errors, by what they count and as they are, and the number of elements."""
        result = self._run(self.inputs(part), reader)
        square = self._visible.error(result, self.take(self._samples.target, part)).square()
        loss, error = (float(of.double().sum()) / self.variance for of in (self._counted(square), square))
        return loss, error, result.numel()

    def _counted(self, square: Tensor) -> Tensor:
        return square if self._importance is None else square * self._importance

    def _run(self, inputs: Mapping[str, Tensor], reader: Reader) -> Tensor:
        return self.run(inputs, reader, (self._output,))[self._output]

    def _mixed(self, chosen: Sequence[int], masks: DropMasks | None) -> dict[str, Tensor]:
        """The inputs of some samples: of the quantized prefix, or float where the masks drop."""
        quantized = self.inputs(chosen)
        if masks is None:
            return quantized
        result = {}
        for name, values in quantized.items():
            exact = self._samples.exact[name]
            floating = values.is_floating_point() and exact is not self._samples.quantized[name]
            result[name] = torch.lerp(self.take(exact, chosen), values, masks.like(values)) if floating else values
        return result


def _fitting(importance: Tensor, samples: BlockSamples) -> Tensor:
    """Averaged along the axes in which some sample has another length than those that it was measured on."""
    for axis in range(1, importance.ndim):
        if any(samples.target.shape(index)[axis] != importance.shape[axis] for index in range(len(samples))):
            importance = importance.mean(axis, keepdim=True)
    return importance
