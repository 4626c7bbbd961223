"""Which operator set the containers of codes need: INT4 weights and 16-bit activations exist from opset 21 on."""

from __future__ import annotations

import onnx_ir as ir

from postquant.passes.emit import INT4_OPSET
from postquant.passes.opset import opset_of
from postquant.passes.target import WeightStorage
from postquant.pipeline.job import Job
from postquant.runtime_ops.errors import ModelError


def weight_storage(job: Job) -> WeightStorage:
    """The container of weights of few bits: the configuration's, else the target's."""
    return job.config.weight_storage or job.target.weight_storage


def least_opset(job: Job) -> int:
    """What the target wants, or the containers."""
    return max(job.target.min_opset, INT4_OPSET if _why_new(job) else 0)


def check_containers(job: Job, model: ir.Model) -> None:
    """A conversion that failed is told before the work, not when the result is written.

    Raises:
        ModelError: If the model's operator set is older than the containers.
    """
    reason = _why_new(job)
    if reason is None or opset_of(model) >= INT4_OPSET:
        return
    what, where = reason
    raise ModelError(
        f"{what} an operator set to which the model cannot be converted",
        where=where,
        expected=f"opset {INT4_OPSET}",
        found=f"opset {opset_of(model)}",
        hint=f"export the model with opset {INT4_OPSET} or above, or leave {where} out",
    )


def _why_new(job: Job) -> tuple[str, str] | None:
    """What needs the newer operator set, and the settings that ask for it."""
    if weight_storage(job) is WeightStorage.INT4:
        return "4-bit storage needs", "weight_storage"
    config = job.config
    if 16 in (config.abits, config.sums_bits, *(override.abits for override in config.override)):
        return "16-bit activations need", "abits, sums_bits"
    return None
