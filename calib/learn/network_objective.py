"""The whole network's outputs, and those of its blocks, come close to the float network's: :class:`NetworkObjective`.

    L = mean over outputs of |f(x) - y|^2 / |y - mean y|^2 + features * the same mean over the values between blocks

Blocks are learned one after the other and cannot know what later ones make of their errors. The outputs alone say too
little about so many weights: learning from them fits the calibration samples. The values between blocks hold what is
inside where it was (as hints do, Romero et al. 2015); errors of theirs that no reader can see do not count
(:mod:`postquant.calib.learn.visible`).

The float network runs beside the quantized one, so that images can be mirrored and shifted at random
(:class:`postquant.calib.learn.augment.Augmentation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from postquant.calib.learn.augment import Augmentation
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.network_samples import NetworkSamples
from postquant.calib.learn.objective import Objective
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.quantizers import DropMasks
from postquant.calib.learn.reader import Reader
from postquant.calib.learn.visible import Visible
from postquant.passes.session import make_session

Tensor = torch.Tensor
_Item = tuple[dict[str, Tensor], DropMasks | None, int]
# Variances are those of so many samples.
_MEASURED = 32


class NetworkObjective(Objective):
    """A whole network.

    Args:
        model: The simplified float model.
        outputs: Names of its float outputs.
        inner: Names of values between its blocks, and what their readers see of them.
        features: Weight of their errors, >= 0.
        samples: Inputs.
        augmentation: Of images; None for none.
        batch: Samples per step.
        device: Where.
        steps: Threads for the parts of a batch.
    """

    def __init__(
        self,
        model: ir.Model,
        outputs: Sequence[str],
        inner: Mapping[str, Visible],
        features: float,
        samples: NetworkSamples,
        augmentation: Augmentation | None,
        batch: int,
        device: torch.device,
        steps: ParallelSteps,
    ) -> None:
        super().__init__(list(model.graph), batch, device, steps)
        self._model = model
        self._samples = samples
        self._augmentation = augmentation
        self._outputs = tuple(outputs)
        # One term per value: its share in the loss.
        self._shares = {name: 1 / len(outputs) for name in outputs}
        between = [name for name in inner if name not in self._shares] if features else []
        self._shares |= {name: features / len(between) for name in between}
        self._visible = {name: inner.get(name, Visible()) for name in self._shares}
        self._variances = self._measured_variances()
        # Every output is divided by its deviation before they are compared (:meth:`output`).
        self.variance = 1.0

    def inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What the user feeds."""
        return {name: self.take(values, chosen) for name, values in self._samples.inputs.items()}

    def exact_inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What the user feeds."""
        return self.inputs(chosen)

    def expected(self, index: int) -> dict[str, Tensor]:
        """The outputs."""
        feeds = {name: values.take([index]).numpy() for name, values in self._samples.inputs.items()}
        found = make_session(self._model, outputs=self._outputs).run(feeds)
        return {name: torch.from_numpy(found[name]) for name in self._outputs}

    def output(self, part: Sequence[int], reader: Reader) -> Tensor:
        """All outputs, each in units of its deviation."""
        values = self.run(self.inputs(part), reader, self._outputs)
        return torch.cat([(values[name] / self._variances[name] ** 0.5).flatten() for name in self._outputs])

    def items(self, chosen: Sequence[int], masks: DropMasks | None) -> list[_Item]:
        """Inputs of every part, images mirrored and shifted."""
        found = []
        for part in self.parts.cut(chosen):
            inputs = self.inputs(part)
            if self._augmentation is not None:
                inputs = {name: self.put(self._augmentation(values)) for name, values in inputs.items()}
            found.append((inputs, None if masks is None else masks.part(), len(part)))
        return found

    def loss(self, item: _Item, constants: Mapping[str, Tensor], quantizers: BlockQuantizers) -> tuple[Tensor, int]:
        """The loss of the module docstring."""
        inputs, masks, count = item
        with torch.no_grad():
            exact = self.run(inputs, None, self._shares)
        # While it learns, too, every quantizer is on: what 8 bits round adds up over the network.
        reader = quantizers.reader(masks=masks, all_steps=True, constants=constants)
        got = self.run(inputs, reader, self._shares)
        errors = self._errors(got, exact)
        return torch.stack(
            [share * errors[name] for name, share in self._shares.items()]
        ).sum() + reader.penalty(), count

    def judged_sums(self, part: Sequence[int], reader: Reader) -> tuple[float, float, int]:
        """Sums over samples."""
        inputs = self.inputs(part)
        exact = self.run(inputs, None, self._shares)
        errors = {n: float(e) for n, e in self._errors(self.run(inputs, reader, self._shares), exact).items()}
        loss = sum(share * errors[name] for name, share in self._shares.items())
        error = sum(errors[name] for name in self._outputs) / len(self._outputs)
        return len(part) * loss, len(part) * error, len(part)

    def _errors(self, got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Relative error of every value, () float32."""
        return {
            name: visible.squares(got[name], exact[name]) / (got[name].numel() * self._variances[name])
            for name, visible in self._visible.items()
        }

    def _measured_variances(self) -> dict[str, float]:
        """Of what is seen of every value that the loss compares."""
        sums = {name: [0.0, 0.0, 0] for name in self._shares}
        count = len(self._samples)
        for index in range(0, count, max(count // _MEASURED, 1)):
            with torch.no_grad():
                values = self.run(self.inputs([index]), None, self._shares)
            for name, found in sums.items():
                value = self._visible[name].clip(values[name]).double()
                found[0] += float(value.sum())
                found[1] += float(value.square().sum())
                found[2] += value.numel()
        return {n: max(square / size - (total / size) ** 2, 1e-30) for n, (total, square, size) in sums.items()}
