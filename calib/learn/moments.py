"""What rounding errors of an activation's channels do to the network's outputs together: :func:`measure_moments`.

To second order, errors ``e`` of the C channels at one place that a layer reads change the outputs f by

    sum_o |df_o|^2 / (n_o V_o) = e' H e,    H = mean over samples of sum over places and o of g_o g_o' / (n_o V_o)

with ``g_o = df_o / dx`` (C) there, n_o elements and the variance V_o of output o; errors of different places are taken
as independent. Random signs on all outputs estimate the sum over o, as in :mod:`postquant.calib.learn.fisher`. The
gradient is that along what the readers of the code book read, not along other ways from the same value.

Several readers may read different codes: then ``e`` are the errors of every reader's copy of the channels, one copy
behind the other, and ``g`` is the gradient along each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from postquant.calib.feedback import Candidate, candidates
from postquant.calib.input_spec import Sample
from postquant.calib.learn.cells import in_cells
from postquant.calib.learn.executor import constant_values, run_nodes, supported
from postquant.calib.learn.fisher import output_scales, random_signs, same_outputs
from postquant.calib.learn.learner import torch_limits
from postquant.calib.learn.output_metric import channel_products
from postquant.calib.output_error import float_outputs
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_feedback import CELL_AXIS, Feedback
from postquant.runtime_ops.quantizer import TensorQuantizer

Tensor = torch.Tensor
_SAMPLES = 128
# With more copies of channels, readers of a tensor read the same codes: eigenvectors of H would take minutes.
_MOST_COPIES = 2048
# Side of the cells that are tried, and of how many channels they may have together.
_CELL = 2
_MOST_IN_CELLS = 1024


@dataclasses.dataclass(frozen=True)
class FeedbackSite:
    """An activation whose channels have code books of their own.

    Attributes:
        value: Name of what the layers read.
        keys: Keys ``"<node>:0"`` of these layers among the requantizations.
        quantizer: Their quantizer, the first one's.
    """

    value: str
    keys: tuple[str, ...]
    quantizer: TensorQuantizer

    @property
    def copies(self) -> int:
        """Of how many copies of the channels errors are told apart: one for every reader, or 1."""
        rows = 1 if self.quantizer.table is None else len(self.quantizer.table)
        return len(self.keys) if len(self.keys) * rows <= _MOST_COPIES else 1

    def cell(self, shape: Sequence[int]) -> int:
        """The side of the cells whose places' errors are told apart.

        Args:
            shape: Of the value.
        """
        rows = 0 if self.quantizer.table is None else len(self.quantizer.table)
        planes = len(shape) == 4 and self.quantizer.table_axis == CELL_AXIS and min(shape[2:]) >= _CELL
        return _CELL if planes and _CELL**2 * self.copies * rows <= _MOST_IN_CELLS else 1

    def with_feedback(self, plan: QuantPlan, feedback: Feedback) -> QuantPlan:
        """A plan in which the readers have an error feedback.

        Args:
            plan: The plan.
            feedback: Of all copies of the channels together.
        """
        assert self.quantizer.table is not None
        whole = dataclasses.replace(
            self.quantizer, table=np.tile(self.quantizer.table, (self.copies, 1)), feedback=feedback
        )
        for index, key in enumerate(self.keys):
            copy = index % self.copies
            plan = plan.with_requant(key, dataclasses.replace(whole, copies=self.copies, copy=copy))
        return plan


@dataclasses.dataclass
class Moments:
    """What is known of one site.

    Attributes:
        halves: Two of (n n K C, n n K C) float64, H where K readers read C channels at the places of cells, each from
            every other sample.
        noise: (K C,) float64, mean square of every channel's error of rounding to the nearest level, in the tensor's
            units.
        cell: n, the side of the cells.
    """

    halves: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
    noise: npt.NDArray[np.float64]
    cell: int = 1

    def candidates(self, step: float) -> tuple[Candidate, ...]:
        """Feedbacks for these errors (:func:`postquant.calib.feedback.candidates`).

        Args:
            step: Of the codes that the operator counts errors in.
        """
        return candidates(self.halves, self.noise, step, self.cell)


def feedback_sites(model: ir.Model, plan: QuantPlan) -> list[FeedbackSite]:
    """Every activation of a plan whose channels have code books of their own, in the order of the graph."""
    found: dict[str, FeedbackSite] = {}
    for node in model.graph:
        entry, value = plan.requants.get(f"{node.name}:0"), node.inputs[0] if node.inputs else None
        if value is None or not isinstance(entry, TensorQuantizer) or entry.table_axis is None:
            continue
        name = value.name or ""
        site = found.setdefault(name, FeedbackSite(name, (), entry))
        if site.quantizer.table_axis == entry.table_axis:
            found[name] = dataclasses.replace(site, keys=(*site.keys, f"{node.name}:0"))
    return list(found.values())


def samples_used(count: int) -> int:
    """How many of so many samples tell the moments.

    Args:
        count: Of samples.

    >>> samples_used(64), samples_used(1024)
    (64, 128)
    """
    return min(count, _SAMPLES)


def measure_moments(
    model: ir.Model,
    sites: Sequence[FeedbackSite],
    source: CalibrationSource,
    indices: Sequence[int],
    *,
    cells: bool = True,
    seed: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """What the channels of some activations do to the float network's outputs.

    Args:
        model: The simplified float model; not changed.
        sites: Of a plan for it.
        source: Calibration data.
        indices: Samples that may be used, increasing; at most 128 of them, evenly spaced, are.
        cells: Whether errors of neighbouring places may be told apart.
        seed: Of the signs.
        device: Where.
        progress: Called for every sample that is used.

    Returns:
        By the name of the value.

    Raises:
        ModelError: If torch does not run the network, or not as onnxruntime does, or no output is a float.
    """
    obstacle = next((reason for node in model.graph if (reason := supported(node)) is not None), None)
    if obstacle is not None:
        raise ModelError("torch does not run the network", found=obstacle)
    chosen = [indices[place] for place in spaced(len(indices), _SAMPLES)]
    with torch_limits():
        try:
            gradients = _Gradients(model, sites, device, cells=cells)
            return gradients.measure(source, chosen, torch.Generator().manual_seed(seed), progress)
        except RuntimeError as error:
            raise ModelError("torch cannot run the network", found=str(error)) from error


class _Gradients:
    def __init__(self, model: ir.Model, sites: Sequence[FeedbackSite], device: torch.device, *, cells: bool) -> None:
        self._cells = cells
        self._nodes = list(model.graph)
        self._device = device
        self._sites = sites
        self._readers = {key for site in sites for key in site.keys}
        self._constants = constant_values(self._nodes, device)
        self._outputs = float_outputs(model)
        if not self._outputs:
            raise ModelError("no output of the network is a float")
        self._session = make_session(model, outputs=self._outputs)

    def measure(
        self,
        source: CalibrationSource,
        chosen: Sequence[int],
        generator: torch.Generator,
        progress: Callable[[], None],
    ) -> dict[str, Moments]:
        scales = output_scales(self._session, self._outputs, source, chosen)
        found: dict[str, Moments] = {}
        for index, sample in enumerate(source.read(chosen)):
            values, errors = self._run(sample)
            if index == 0:
                same_outputs(values, self._session.run(sample))
            outputs = {name: values[name] for name in scales if values[name].requires_grad}
            if not outputs:
                break
            signs = random_signs(outputs, scales, generator)
            gradients = torch.autograd.grad(
                list(outputs.values()), list(errors.values()), signs, materialize_grads=True
            )
            along = dict(zip(errors, gradients, strict=True))
            for site in self._sites:
                x = values[site.value].detach()
                self._add(found, site, x, [along[key] for key in site.keys], half=index % 2)
            progress()
        for moments in found.values():
            moments.noise /= len(chosen)
        return found

    def _add(
        self, found: dict[str, Moments], site: FeedbackSite, x: Tensor, gradients: Sequence[Tensor], half: int
    ) -> None:
        axis = site.quantizer.table_axis
        assert axis is not None
        real = x.cpu().numpy()
        error = np.square(site.quantizer.simulate(real) - real, dtype=np.float64)
        noise = np.tile(np.moveaxis(error, axis, 0).reshape(error.shape[axis], -1).mean(axis=1), site.copies)
        if site.copies == 1:
            gradients = [torch.stack(list(gradients)).sum(0)]
        every = torch.cat(list(gradients), dim=axis)
        if site.value not in found:
            cell = site.cell(every.shape) if self._cells else 1
            size = cell * cell * every.shape[axis]
            found[site.value] = Moments((np.zeros((size, size)), np.zeros((size, size))), np.zeros_like(noise), cell)
        moments = found[site.value]
        if moments.cell > 1:
            every = in_cells(every, moments.cell)
        np.add(moments.halves[half], channel_products(every, axis).numpy(), out=moments.halves[half])
        moments.noise += noise

    def _run(self, sample: Sample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values that matter; and for every reader of a site an error of zero that it sees."""
        values = dict(self._constants)
        for name, array in sample.items():
            tensor = torch.from_numpy(np.array(array))
            values[name] = tensor.to(self._device) if tensor.is_floating_point() else tensor
        errors: dict[str, Tensor] = {}

        def read(node: ir.Node, index: int, name: str, tensor: Tensor) -> Tensor:
            key = f"{node.name}:0"
            if index != 0 or key not in self._readers:
                return tensor
            errors[key] = torch.zeros_like(tensor, requires_grad=True)
            return tensor + errors[key]

        with torch.enable_grad():
            run_nodes(self._nodes, values, read, wanted={*(site.value for site in self._sites), *self._outputs})
        return values, errors
