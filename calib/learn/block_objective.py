"""A block's output comes close to the float network's: :class:`BlockObjective`.

    L = |f(x_in) - y|^2 / |y - mean y|^2

``x_in`` comes from the already quantized prefix, ``y`` from the float network. Errors that no reader of the output can
see do not count (:mod:`postquant.calib.learn.visible`), and y has the variance of what they see. Where it is known what
errors of y do to the network's outputs, they count by that (:mod:`postquant.calib.learn.output_metric`). With QDrop's
masks a part of the input comes from the float network, and a part of the activations inside is not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from postquant.calib.learn.block_cache import BlockSamples
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.objective import Objective
from postquant.calib.learn.output_metric import OutputMetric
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
        metric: How errors of the output count; None for their squares.
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
        metric: OutputMetric | None = None,
    ) -> None:
        super().__init__(nodes, batch, device, steps)
        self._output = output
        self._samples = samples
        self._visible = visible
        self._metric = None if metric is None else metric.to(device)
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
        return result if self._metric is None else self._metric.image(result)

    def items(self, chosen: Sequence[int], masks: DropMasks | None) -> list[_Item]:
        """Samples and masks of every part."""
        return [(part, None if masks is None else masks.part()) for part in self.parts.cut(chosen)]

    def loss(self, item: _Item, constants: Mapping[str, Tensor], quantizers: BlockQuantizers) -> tuple[Tensor, int]:
        """Relative error of the output, by what it counts."""
        part, masks = item
        reader = quantizers.reader(masks=masks, constants=constants)
        result = self._run(self._mixed(part, masks), reader)
        target = self.take(self._samples.target, part)
        if self._metric is None:
            counted = self._visible.squares(result, target)
        else:
            counted = self._metric.energy(self._visible.error(result, target))
        return counted / (result.numel() * self.variance) + reader.penalty(), len(part)

    def judged_sums(self, part: Sequence[int], reader: Reader) -> tuple[float, float, int]:
        """Of squared errors, by what they count and as they are, and the number of elements."""
        result = self._run(self.inputs(part), reader)
        error = self._visible.error(result, self.take(self._samples.target, part))
        plain = float(error.square().double().sum())
        counted = plain if self._metric is None else float(self._metric.energy(error))
        return counted / self.variance, plain / self.variance, result.numel()

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
