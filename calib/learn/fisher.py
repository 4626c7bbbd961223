"""How much every element of a block's output counts for the network's outputs: :func:`measure_importance`.

BRECQ (Li et al. 2021, section 3.2) weighs the squared error of a block's output z with the squared gradient of the task
loss, the diagonal of the Fisher matrix. Without labels the float network's own outputs f take the loss's place: to
second order, an error of z that is independent in every element changes them by

    sum_o |df_o|^2 / (n_o V_o) = sum_i m_i dz_i^2,    m_i = mean over samples of sum_o (df_o / dz_i)^2 / (n_o V_o)

with n_o elements and the variance V_o of output o. Random signs v on all outputs estimate it with one backward run of
the network for all blocks together: ``E (d(v . f) / dz_i)^2 = sum_o (df_o / dz_i)^2`` (Hutchinson 1990).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from postquant.calib.input_spec import Sample
from postquant.calib.learn.executor import constant_values, run_nodes, supported
from postquant.calib.learn.learner import torch_limits
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.passes.session import Session, make_session
from postquant.passes.subgraph import node_sources
from postquant.runtime_ops.errors import ModelError

Tensor = torch.Tensor
# So many samples tell the mean of a squared gradient (docs/learning.md).
_SAMPLES = 128
# The float network in torch may differ from onnxruntime by so much, relative to its largest value.
_SAME = 1e-3
# An output whose variance is a smaller share of its mean square does not vary.
_CONSTANT = 1e-10


@dataclasses.dataclass(frozen=True)
class Importance:
    """What is known about the outputs of blocks.

    Attributes:
        weights: Name of a value -> float32 on the CPU, >= 0, mean 1. Axes along which all samples have the same length
            are kept, others (the first among them: it holds the samples of a batch) have length 1, so that it
            broadcasts against any batch.
        reasons: Name of a value that has none -> why, a clause.
    """

    weights: Mapping[str, Tensor]
    reasons: Mapping[str, str]


def measure_importance(
    model: ir.Model,
    names: Sequence[str],
    source: CalibrationSource,
    indices: Sequence[int],
    *,
    seed: int,
    device: torch.device,
) -> Importance:
    """What the elements of some values count for the float network's outputs.

    Onnxruntime runs the network up to the first of the values, and torch everything behind it, sample by sample.

    Args:
        model: The simplified float model; not changed.
        names: Values of its main graph.
        source: Calibration data.
        indices: Samples that may be used, increasing; at most 128 of them, evenly spaced, are.
        seed: Of the signs.
        device: Where.
    """
    behind = {name: _behind(model, name) for name in names}
    reasons = {name: reason for name in names if (reason := _obstacle(behind[name])) is not None}
    weighed = [name for name in names if name not in reasons]
    if not weighed:
        return Importance({}, reasons)
    chosen = [indices[place] for place in spaced(len(indices), _SAMPLES)]
    tail = _Tail(model, weighed, {node for name in weighed for node in behind[name]}, device)
    try:
        with torch_limits():
            sums = tail.measure(source, chosen, torch.Generator().manual_seed(seed))
    except (RuntimeError, ModelError) as error:
        return Importance({}, reasons | dict.fromkeys(weighed, f"torch cannot run what lies behind: {error}"))
    weights = {name: sums[name].weights() for name in weighed}
    reasons |= {name: "no output depends smoothly on it" for name, found in weights.items() if found is None}
    return Importance({name: found for name, found in weights.items() if found is not None}, reasons)


def output_scales(
    session: Session, names: Sequence[str], source: CalibrationSource, chosen: Sequence[int]
) -> dict[str, float]:
    """Root of 1 / (n V) of every output that is not constant, n its elements and V its variance.

    Args:
        session: Runs the float network.
        names: Of outputs.
        source: Calibration data.
        chosen: Samples that are used.
    """
    if len(names) == 1:  # nothing to compare it with
        return dict.fromkeys(names, 1.0)
    sums = {name: [0.0, 0.0, 0.0] for name in names}
    for sample in source.read(chosen):
        for name, found in session.run(sample, names).items():
            sizes = (found.size, found.sum(dtype=np.float64), np.square(found, dtype=np.float64).sum())
            sums[name] = [total + float(size) for total, size in zip(sums[name], sizes, strict=True)]
    energies = {name: square - total**2 / max(count, 1) for name, (count, total, square) in sums.items()}
    varying = {name: energy for name, energy in energies.items() if energy > _CONSTANT * sums[name][2]}
    return {name: (len(chosen) / energy) ** 0.5 for name, energy in varying.items()}


def random_signs(
    outputs: Mapping[str, Tensor], scales: Mapping[str, float], generator: torch.Generator
) -> list[Tensor]:
    """What the outputs are multiplied by, so that the squared gradient of their sum has the mean that is wanted.

    Args:
        outputs: By name.
        scales: Of each (:func:`output_scales`).
        generator: Of the signs, on the CPU.
    """
    signs = (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1 for value in outputs.values())
    return [sign.to(value) * scales[name] for sign, (name, value) in zip(signs, outputs.items(), strict=True)]


def same_outputs(values: Mapping[str, Tensor], wanted: Sample) -> None:
    """Torch computes what onnxruntime does.

    Args:
        values: Of torch, by name.
        wanted: The outputs that onnxruntime gives, by name.

    Raises:
        ModelError: If it does not.
    """
    for name, array in wanted.items():
        got, want = values[name].detach().cpu(), torch.from_numpy(np.array(array))
        if got.shape != want.shape or not float((got - want).abs().max()) <= _SAME * float(want.abs().max()):
            raise ModelError("in torch it differs from onnxruntime", where=name)


class _Squares:
    """Sum over samples of squared gradients of one value; axes of different lengths are averaged."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Takes the gradient for one sample, of any shape."""
        square = gradient.double().square().cpu()
        square = square.mean(0, keepdim=True) if square.ndim else square
        if self._total is None:
            self._total = square
            return
        for axis in range(square.ndim):
            if square.shape[axis] != self._total.shape[axis]:
                square, self._total = square.mean(axis, keepdim=True), self._total.mean(axis, keepdim=True)
        self._total = self._total + square

    def weights(self) -> Tensor | None:
        """In units of their mean; None where that is 0 or not finite."""
        mean = 0.0 if self._total is None else float(self._total.mean())
        if self._total is None or not 0 < mean < float("inf"):
            return None
        return (self._total / mean).float()


class _Tail:
    """What torch runs: everything behind some values.

    Args:
        model: The float model.
        names: The values.
        nodes: Nodes that depend on one of them.
        device: Where.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], nodes: Collection[ir.Node], device: torch.device) -> None:
        self._names = names
        self._nodes = [node for node in model.graph if node in nodes]
        self._device = device
        self._constants = constant_values(self._nodes, device)
        made = {value.name for node in self._nodes for value in node.outputs}
        outputs = [value for value in model.graph.outputs if value.name and value.dtype in (None, ir.DataType.FLOAT)]
        self._outputs = [value.name or "" for value in outputs if value.name in made or value.name in names]
        read = [value.name for node in self._nodes for value in node.inputs if value is not None and value.name]
        self._entering = [n for n in dict.fromkeys((*read, *names)) if n not in made and n not in self._constants]
        fed = {value.name for value in model.graph.inputs}
        self._computed = [name for name in self._entering if name not in fed]
        self._session = make_session(model, outputs=list(dict.fromkeys((*self._computed, *self._outputs))))

    def measure(
        self, source: CalibrationSource, chosen: Sequence[int], generator: torch.Generator
    ) -> dict[str, _Squares]:
        """Squared gradients of the values, summed over samples.

        Raises:
            ModelError: If torch does not compute what onnxruntime does.
        """
        scales = output_scales(self._session, self._outputs, source, chosen)
        sums = {name: _Squares() for name in self._names}
        for index, found in enumerate(self._found(source, chosen)):
            values = self._run(found)
            if index == 0:
                same_outputs(values, {name: found[name] for name in self._outputs})
            outputs = {name: values[name] for name in scales if values[name].requires_grad}
            signs = random_signs(outputs, scales, generator)
            if not outputs:
                break
            reached = [name for name in self._names if values[name].requires_grad]
            gradients = torch.autograd.grad(
                list(outputs.values()), [values[name] for name in reached], signs, materialize_grads=True
            )
            for name, gradient in zip(reached, gradients, strict=True):
                sums[name].add(gradient)
        return sums

    def _found(self, source: CalibrationSource, chosen: Sequence[int]) -> Iterator[Sample]:
        """What onnxruntime gives and the user feeds, by name, for each sample."""
        for sample in source.read(chosen):
            yield {**sample, **self._session.run(sample)}

    def _run(self, found: Sample) -> dict[str, Tensor]:
        """All values that matter, with the way back to the names."""
        values = dict(self._constants)
        for name in self._entering:
            tensor = torch.from_numpy(np.array(found[name]))
            values[name] = tensor.to(self._device) if tensor.is_floating_point() else tensor
        names = frozenset(self._names)

        def follow(name: str) -> Tensor:
            tensor = values[name]
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.requires_grad_()
            return tensor

        def read(node: ir.Node, index: int, name: str, tensor: Tensor) -> Tensor:
            return follow(name) if name in names else tensor

        with torch.enable_grad():
            run_nodes(self._nodes, values, read, wanted={*names, *self._outputs})
        for name in names:
            follow(name)
        return values


def _behind(model: ir.Model, name: str) -> list[ir.Node]:
    """All nodes that depend on a value, in order."""
    reached, nodes = {name}, []
    for node in model.graph:
        if any(value.name in reached for value in node_sources(node)):
            nodes.append(node)
            reached.update(value.name for value in node.outputs if value.name)
    return nodes


def _obstacle(behind: Iterable[ir.Node]) -> str | None:
    """Why the outputs' gradient along a value cannot be computed, a clause."""
    obstacle = next((reason for node in behind if (reason := supported(node)) is not None), None)
    return None if obstacle is None else f"torch does not run what lies behind: {obstacle}"
