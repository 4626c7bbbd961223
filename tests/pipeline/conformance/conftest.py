"""Small bundles for the comparison, and receivers with faults."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.plan import Entry, QuantPlan
from postquant.pipeline.conformance.expected import Conformance
from postquant.pipeline.conformance.record import write_conformance
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.recover import recover_float_model
from postquant.runtime_ops.quantizer import TensorQuantizer

Feed = Mapping[str, npt.NDArray[Any]]
_FILE = pathlib.Path(__file__).with_name("receivers.py")


@pytest.fixture(scope="session")
def receivers() -> types.ModuleType:
    """The module ``receivers.py``, which is no test and therefore not imported by pytest."""
    spec = importlib.util.spec_from_file_location("receivers", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class SmallBundle:
    """The files of a bundle that the comparison reads, and what is expected."""

    folder: pathlib.Path
    expected: Conformance
    samples: Sequence[Feed]

    @property
    def codes(self) -> list[str]:
        """Names of the codes of all tensors."""
        return [tensor.codes for tensor in self.expected.tensors]


def small_bundle(folder: pathlib.Path, model: ir.Model, plan: QuantPlan, samples: Sequence[Feed]) -> SmallBundle:
    plan = fit_biases(model, plan)
    save_model(emit(model, plan), folder / "model.qdq.onnx")
    plan.save(folder / "plan.safetensors")
    written = load_model(folder / "model.qdq.onnx", check=False)
    recovered = recover_float_model(written, plan)
    expected = write_conformance(folder / "conformance", written, recovered, plan, samples, "a test")
    return SmallBundle(folder, expected, samples)


def powers_of_two(plan: QuantPlan) -> QuantPlan:
    """The plan with every scale rounded up to a power of two: sums then meet ties, which other scales never do."""

    def snapped(entry: Entry) -> Entry:
        assert isinstance(entry, TensorQuantizer)
        return dataclasses.replace(entry, scale=(2.0 ** np.ceil(np.log2(entry.scale))).astype(np.float32))

    return dataclasses.replace(
        plan,
        activations={name: snapped(entry) for name, entry in plan.activations.items()},
        requants={key: snapped(entry) for key, entry in plan.requants.items()},
        weights={name: snapped(entry) for name, entry in plan.weights.items()},
    )


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., SmallBundle]:
    """Writes a small bundle: folder, float model, plan, samples."""
    return small_bundle


@pytest.fixture(scope="session")
def with_powers() -> Callable[[QuantPlan], QuantPlan]:
    """Rounds every scale of a plan up to a power of two."""
    return powers_of_two


@pytest.fixture(scope="session")
def cnn_bundle(cnn: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallBundle:
    """The small network at 8 bits."""
    return small_bundle(tmp_path_factory.mktemp("cnn"), cnn.model, cnn.plan, cnn.samples[:2])


@pytest.fixture(scope="session")
def tie_bundle(cnn: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallBundle:
    """The small network with scales that are powers of two."""
    return small_bundle(tmp_path_factory.mktemp("ties"), cnn.model, powers_of_two(cnn.plan), cnn.samples[:2])
