"""Starting from a vendor's encodings: what is named gets exactly these numbers, the rest is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.pipeline.encodings.apply import Applied, apply_encodings
from postquant.pipeline.encodings.vendor import VendorEncodings, VendorTensor
from postquant.runtime_ops.quantizer import TensorQuantizer


def tensor(scale: Any, zero: Any = 0, bits: int = 8, signed: bool = True, axis: int | None = None) -> VendorTensor:
    scales, zeros = np.broadcast_arrays(np.atleast_1d(np.float32(scale)), np.int32(zero))
    return VendorTensor(scales, zeros, bits, signed, axis)


@pytest.fixture
def apply(cases: Any, target: Any) -> Any:
    """Applies a file's content to the small network's placed plan."""

    def run(
        vendor: VendorEncodings, settings: PlacementSettings | None = None, **activations: Any
    ) -> tuple[QuantPlan, Applied]:
        model = cases.float_model(cases.cnn)
        chosen = dataclasses.replace(target, activations=dataclasses.replace(target.activations, **activations))
        plan = place(model, chosen, settings or PlacementSettings())
        return plan, apply_encodings(model, plan, vendor, chosen)

    return run


def reasons(applied: Applied) -> dict[str, str]:
    return {conflict.name: conflict.reason for conflict in applied.conflicts}


def test_named_tensors_get_exactly_these_numbers(apply: Any) -> None:
    scales = np.linspace(0.001, 0.002, 8, dtype=np.float32)
    vendor = VendorEncodings(
        "x", {"r1": tensor(0.01, 7, signed=False), "w1": tensor(scales, axis=0), "sum": tensor(0.02, 0)}
    )
    plan, applied = apply(vendor)
    assert applied.conflicts == ()
    assert applied.names == {"r1", "w1", "sum"}
    assert applied.plan.activations["r1"].scale == np.float32(0.01)
    assert int(applied.plan.activations["r1"].zero_point) == 7
    # Signed codes in a target that stores unsigned ones: 128 more, which is the same real value.
    assert int(applied.plan.activations["sum"].zero_point) == 128
    np.testing.assert_array_equal(applied.plan.weights["w1"].scale, scales)
    others = {name: entry for name, entry in applied.plan.activations.items() if name not in applied.names}
    assert others == {name: plan.activations[name] for name in others}


def test_one_scale_for_a_channelwise_weight_stays_one(apply: Any) -> None:
    _, applied = apply(VendorEncodings("x", {"w1": tensor(0.004)}))
    assert applied.plan.weights["w1"].spec.axis is None
    assert applied.plan.weights["w1"].scale == np.float32(0.004)


CONFLICTS = [
    ("nothing", tensor(1.0), {}, "no tensor of this name"),
    ("b1", tensor(1e-6, bits=32), {}, "biases have the step"),
    ("c1", tensor(0.1), {}, "not stored"),
    ("image", tensor([0.1, 0.2]), {}, "activations have one scale, the file 2"),
    ("w1", tensor(np.full(3, 0.1)), {}, "8 channels, the file 3 scales"),
    ("w1", tensor(np.full(8, 0.1), axis=1), {}, "axis 0, the file has axis 1"),
    ("w1", tensor(np.full(8, 0.1), 3), {}, "weights are symmetric"),
    ("w1", tensor(np.full(8, 0.1), bits=16), {}, "no codes of 16 bits"),
    ("r1", tensor(0.1, 3, signed=False), {"symmetric": True, "signed": True}, "range is symmetric"),
    ("r1", tensor(0.1, 300, signed=False), {}, "zero point outside"),
    ("r1", tensor(np.inf, signed=False), {}, "zero, negative or infinite"),
    ("r1", tensor(0.0, signed=False), {}, "zero, negative or infinite"),
    ("r1", tensor(0.3, signed=True), {"power_of_two": True}, "powers of two"),
]


@pytest.mark.parametrize(("name", "numbers", "formats", "told"), CONFLICTS)
def test_what_cannot_be_had_is_told_and_left_to_calibration(
    apply: Any, name: str, numbers: VendorTensor, formats: dict[str, Any], told: str
) -> None:
    vendor = VendorEncodings("x", {name: numbers})
    plan, applied = apply(vendor, **formats)
    assert told in reasons(applied)[name]
    assert applied.names == frozenset()
    assert applied.plan == plan
    _, line = applied.notes(vendor)
    assert name in line


def test_tensors_that_share_numbers(apply: Any) -> None:
    same = VendorEncodings("x", {"sum": tensor(0.02), "m1": tensor(0.02)})
    assert apply(same)[1].conflicts == ()
    only_behind = apply(VendorEncodings("x", {"m1": tensor(0.02)}))[1]
    assert only_behind.names == {"sum"}
    other = apply(VendorEncodings("x", {"m1": tensor(0.03), "sum": tensor(0.02)}))[1]
    assert other.plan.activations["sum"].scale == np.float32(0.02)
    assert "shares the numbers of sum" in reasons(other)["m1"]


def test_layers_of_an_ncnn_table(apply: Any) -> None:
    vendor = VendorEncodings(
        "ncnn table",
        layer_inputs={"conv1": tensor(0.02), "project": tensor(0.03), "missing": tensor(1.0)},
        layer_weights={"conv1": tensor(np.full(8, 0.001)), "residual": tensor(0.1)},
    )
    _, applied = apply(vendor, signed=True, symmetric=True)
    assert applied.names == {"image", "r2", "w1"}
    assert isinstance(applied.plan.activations["r2"], TensorQuantizer)
    assert set(reasons(applied)) == {"missing", "residual"}


def test_a_second_quantization_that_is_no_narrower_is_dropped(apply: Any) -> None:
    settings = PlacementSettings(abits=4, first_last_bits=None)
    plan, applied = apply(VendorEncodings("x", {"sum": tensor(0.2, 8, bits=4, signed=False)}), settings)
    assert "reduce:0" in plan.requants
    assert "reduce:0" not in applied.plan.requants
    assert plan.int_biases["b4"][0] == "reduce:0"
    assert applied.plan.int_biases["b4"][0] == "m1"
    wider = apply(VendorEncodings("x", {"sum": tensor(0.2, 8, bits=8, signed=False)}), settings)[1]
    assert "reduce:0" in wider.plan.requants


def test_notes_group_names_by_reason(apply: Any) -> None:
    vendor = VendorEncodings("x", {f"n{i}": tensor(1.0) for i in range(20)}, skipped=("a: blockwise",))
    _, applied = apply(vendor)
    lines = applied.notes(vendor)
    assert lines[0] == "x: the numbers of 0 tensors were taken from the file and are kept"
    assert "n0, n1" in lines[1]
    assert "and 8 more" in lines[1]
    assert lines[2] == "x: skipped a: blockwise"
