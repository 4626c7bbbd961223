"""How much errors of a block's output count for the network's outputs: :func:`measure_metrics`.

BRECQ (Li et al. 2021, section 3.2) weighs the squared error of a block's output z with the squared gradient of the task
loss, the diagonal of the Fisher matrix. Here it is a block of that matrix, that of the channels at one place, and
without labels the float network's own outputs f take the loss's place: to second order, errors ``e`` of the C channels
at one place change them by

    sum_o |df_o|^2 / (n_o V_o) = e' H e,    H = mean over samples and places of sum_o g_o g_o' / (n_o V_o)

with ``g_o = df_o / dz`` (C) there, n_o elements and the variance V_o of output o; errors of different places are taken
as independent. Random signs v on all outputs estimate it with one backward run of the network for all blocks together:
``E g g' = sum_o g_o g_o'`` for ``g = d(v . f) / dz`` (Hutchinson 1990).
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
from postquant.calib.learn.output_metric import OutputMetric, channel_products
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.passes.session import Session, make_session
from postquant.passes.subgraph import node_sources
from postquant.runtime_ops.errors import ModelError

Tensor = torch.Tensor
# So many samples tell the mean of products of gradients.
_SAMPLES = 128
# With more channels the eigenvectors of H take minutes; with fewer places than so many per channel it is mostly noise.
_MOST_CHANNELS = 2048
_PLACES_PER_CHANNEL = 4
# The float network in torch may differ from onnxruntime by so much, relative to its largest value.
_SAME = 1e-3
# An output whose variance is a smaller share of its mean square does not vary.
_CONSTANT = 1e-10


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What is known about the outputs of blocks.

    Attributes:
        found: Name of a value -> how its errors count.
        reasons: Name of a value of which that is not known -> why, a clause.
    """

    found: Mapping[str, OutputMetric]
    reasons: Mapping[str, str]


def measure_metrics(
    model: ir.Model,
    axes: Mapping[str, int],
    source: CalibrationSource,
    indices: Sequence[int],
    *,
    seed: int,
    device: torch.device,
) -> Metrics:
    """How errors of some values count for the float network's outputs.

    Onnxruntime runs the network up to the first of the values, and torch everything behind it, sample by sample.

    Args:
        model: The simplified float model; not changed.
        axes: Values of its main graph -> the axis of their channels, counted from the last one, -1.
        source: Calibration data.
        indices: Samples that may be used, increasing; at most 128 of them, evenly spaced, are.
        seed: Of the signs.
        device: Where.
    """
    behind = {name: _behind(model, name) for name in axes}
    reasons = {name: reason for name in axes if (reason := _obstacle(behind[name])) is not None}
    weighed = {name: axis for name, axis in axes.items() if name not in reasons}
    if not weighed:
        return Metrics({}, reasons)
    chosen = [indices[place] for place in spaced(len(indices), _SAMPLES)]
    tail = _Tail(model, weighed, {node for name in weighed for node in behind[name]}, device)
    try:
        with torch_limits():
            sums = tail.measure(source, chosen, torch.Generator().manual_seed(seed))
    except (RuntimeError, ModelError) as error:
        return Metrics({}, reasons | dict.fromkeys(weighed, f"torch cannot run what lies behind: {error}"))
    reasons |= {name: reason for name, products in sums.items() if (reason := products.obstacle()) is not None}
    return Metrics({name: found.metric() for name, found in sums.items() if name not in reasons}, reasons)


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


class _Products:
    """Sum over samples and places of the products of one value's gradients.

    Args:
        axis: Of the channels, counted from the last one.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._total: Tensor | None = None
        self._places = 0
        self._obstacle: str | None = None

    def add(self, gradient: Tensor) -> None:
        """Takes the gradient for one sample."""
        channels = gradient.shape[self._axis] if gradient.ndim >= -self._axis else 0
        if not 0 < channels <= _MOST_CHANNELS:
            self._obstacle = f"it has {channels} channels, and up to {_MOST_CHANNELS} can be measured"
        elif self._total is not None and len(self._total) != channels:
            self._obstacle = "the number of its channels depends on the sample"
        else:
            products = channel_products(gradient, self._axis)
            self._total = products if self._total is None else self._total + products
            self._places += gradient.numel() // channels

    def obstacle(self) -> str | None:
        """Why the sum says nothing, a clause."""
        if self._obstacle is not None:
            return self._obstacle
        trace = 0.0 if self._total is None else float(self._total.trace())
        if self._total is None or not 0 < trace < float("inf"):
            return "no output depends smoothly on it"
        if self._places < _PLACES_PER_CHANNEL * len(self._total):
            return f"{self._places} places are too few for {len(self._total)} channels"
        return None

    def metric(self) -> OutputMetric:
        """What it says, where there is no obstacle."""
        assert self._total is not None
        return OutputMetric(self._total, self._axis)


class _Tail:
    """What torch runs: everything behind some values.

    Args:
        model: The float model.
        axes: The values, with the axes of their channels.
        nodes: Nodes that depend on one of them.
        device: Where.
    """

    def __init__(
        self, model: ir.Model, axes: Mapping[str, int], nodes: Collection[ir.Node], device: torch.device
    ) -> None:
        self._axes = axes
        names = self._names = list(axes)
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
    ) -> dict[str, _Products]:
        """Products of the values' gradients, summed over samples.

        Raises:
            ModelError: If torch does not compute what onnxruntime does.
        """
        scales = output_scales(self._session, self._outputs, source, chosen)
        sums = {name: _Products(axis) for name, axis in self._axes.items()}
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
