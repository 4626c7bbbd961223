"""A stand-in for the real stages: three quick, checkpointed stages on a small network, for tests of what is around.

It quantizes for real (placement, min-max of the weights, a fixed activation range, emit), so the files that it writes
are valid results. Environment variables let a test stop it: ``KILL_AFTER`` kills the process right after the named
stage was saved, ``FAIL_VERIFICATION`` makes the result fail.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from postquant.passes.emit import emit
from postquant.passes.place import place
from postquant.passes.plan import Entry, QuantPlan
from postquant.pipeline.describe import describe
from postquant.pipeline.job import Job, Outcome
from postquant.pipeline.placement import placement_settings
from postquant.pipeline.report import CheckReport, FloatReport, LayerReport, OutputReport, Report
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 2, 4, 4] x) => (float[N, 3] y)
    <float[4, 2, 3, 3] w1, float[4] b1, float[4, 3] w2, float[3] b2> {
      [conv] c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
      [relu] r = Relu (c)
      [pool] p = GlobalAveragePool (r)
      [flat] f = Flatten (p)
      [gemm] g = Gemm (f, w2, b2)
      [soft] y = Softmax <axis = 1> (g)
    }
"""


def write_network(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes the small network with seeded weights."""
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(seed)
    for name, shape in (("w1", (4, 2, 3, 3)), ("b1", (4,)), ("w2", (4, 3)), ("b2", (3,))):
        array = rng.standard_normal(shape, dtype=np.float32)
        kept = [t for t in model.graph.initializer if t.name != name]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*kept, onnx.numpy_helper.from_array(array, name)])
    onnx.save_model(model, path)
    return path


def write_samples(path: pathlib.Path, count: int = 6, seed: int = 1) -> pathlib.Path:
    """Writes calibration samples for the small network."""
    np.savez(path, x=np.random.default_rng(seed).standard_normal((count, 2, 4, 4), dtype=np.float32))
    return path


def run_pipeline(job: Job) -> Outcome:
    """Has the contract of the real one."""
    checkpoint, progress = job.checkpoint, job.progress
    progress.stage("place", 1)
    if (saved := checkpoint.load("place")) is not None:
        plan = saved.plan()
    else:
        plan = place(job.model, job.target, placement_settings(job.config))
        checkpoint.save("place", plan=plan, model=job.model)
        _stop_after("place")
    progress.stage("weights", 1)
    if (saved := checkpoint.load("weights")) is not None:
        plan = saved.plan()
    else:
        plan = _with_weights(job.model, plan)
        checkpoint.save("weights", plan=plan, arrays={"seen": np.arange(3)}, data={"samples": len(job.source)})
        _stop_after("weights")
    progress.stage("activations", len(job.source))
    if (saved := checkpoint.load("activations")) is not None:
        plan = saved.plan()
    else:
        for sample in job.source:
            assert np.isfinite(sample["x"]).all()
            progress.advance()
        for name, entry in plan.activations.items():
            assert isinstance(entry, QuantSpec)
            plan = plan.with_activation(name, TensorQuantizer.from_range(entry, -4.0, 4.0))
        for name, entry in plan.requants.items():
            assert isinstance(entry, QuantSpec)
            plan = plan.with_requant(name, TensorQuantizer.from_range(entry, -4.0, 4.0))
        checkpoint.save("activations", plan=plan)
        _stop_after("activations")
    model = emit(job.model, plan)
    failure = None
    if os.environ.get("FAIL_VERIFICATION"):
        failure = VerificationError("the simulation differs from onnxruntime", where="y")
    report = _filled_report(job, plan, passed=failure is None)
    return Outcome(model, plan, report, describe(job, job.model, plan, {}), failure)


def _stop_after(stage: str) -> None:
    if os.environ.get("KILL_AFTER") == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("INTERRUPT_AFTER") == stage:
        raise KeyboardInterrupt


def _with_weights(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    for name, entry in plan.weights.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        plan = plan.with_weight(name, _weight_quantizer(entry, tensor.numpy()))
    return plan


def _weight_quantizer(entry: Entry, values: np.ndarray) -> TensorQuantizer:
    assert isinstance(entry, QuantSpec)
    axes = tuple(a for a in range(values.ndim) if a != entry.axis) if entry.axis is not None else None
    return TensorQuantizer.from_range(entry, values.min(axes), values.max(axes))


def _filled_report(job: Job, plan: QuantPlan, *, passed: bool) -> Report:
    layers = tuple(
        LayerReport(node=node.name or "", op_type=node.op_type, wbits=job.config.wbits, abits=job.config.abits)
        for node in job.model.graph
        if node.op_type in ("Conv", "Gemm")
    )
    return dataclasses.replace(
        job.report,
        layers=layers,
        outputs=(OutputReport(name="y", sqnr_db=30.0, agreement=1.0),),
        floats=tuple(FloatReport(node=n, op_type="Softmax", reason=why) for n, why in plan.floats.items()),
        checks=(CheckReport(name="simulation", passed=passed),),
    )
