"""AIMET / QNN encodings: what is written means the plan's numbers, and is read back."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from postquant.pipeline.encodings.aimet import AimetVersion, read_aimet, write_aimet
from postquant.pipeline.encodings.entries import Fidelity, collect_entries
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer

VERSIONS = list(AimetVersion)


def written(path: pathlib.Path, case: tuple[Any, Any], version: AimetVersion) -> dict[str, Any]:
    write_aimet(collect_entries(*case), path, version)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def by_offset(entry: dict[str, Any]) -> np.ndarray:
    """Real values of all codes of a 0.6.1 or 1.0.0 entry, as its documentation defines them."""
    bits = entry["bw"] if "bw" in entry else entry["bitwidth"]
    offset, scale = (float(np.atleast_1d(entry[key])[0]) for key in ("offset", "scale"))
    return (np.arange(2**bits) + offset) * scale


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_is_read_back(
    version: AimetVersion, kind: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    model, plan = request.getfixturevalue(kind)
    path = tmp_path / "a.encodings"
    count, notes = write_aimet(collect_entries(model, plan), path, version)
    read = read_aimet(path)
    assert notes == []
    assert count == read.size
    assert read.skipped == ()
    quantizers = {name: plan.activation_quantizer(name) for name in {*plan.activations, *plan.shared}}
    quantizers |= dict(plan.weights)
    for name, quantizer in quantizers.items():
        assert isinstance(quantizer, TensorQuantizer)
        tensor = read.tensors[name]
        half = 1 << (tensor.bits - 1)
        np.testing.assert_array_equal(tensor.scale, np.atleast_1d(quantizer.scale))
        shifted = tensor.zero_point + (int(tensor.signed) - int(quantizer.spec.signed)) * half
        np.testing.assert_array_equal(shifted, np.atleast_1d(quantizer.zero_point))
        assert tensor.bits == quantizer.spec.bits
    if version is AimetVersion.V2_0_0:
        assert read.tensors["b1"].bits == 32
        source = plan.activation_quantizer("image")
        weight = plan.weights["w1"]
        assert source is not None
        assert isinstance(weight, TensorQuantizer)
        np.testing.assert_array_equal(read.tensors["b1"].scale, source.scale * weight.scale)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_offsets_mean_the_same_real_values(kind: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(kind)
    old = written(tmp_path / "a", case, AimetVersion.V0_6_1)
    new = written(tmp_path / "b", case, AimetVersion.V1_0_0)
    for entry in new["activation_encodings"]:
        quantizer = case[1].activation_quantizer(entry["name"])
        spec = quantizer.spec
        real = quantizer.dequantize(np.arange(spec.qmin, spec.qmax + 1))
        np.testing.assert_allclose(by_offset(entry), real, rtol=1e-6)
        (legacy,) = old["activation_encodings"][entry["name"]]
        np.testing.assert_allclose(by_offset(legacy), real, rtol=1e-6)
        assert legacy["min"] == pytest.approx(float(real[0]))
        assert legacy["max"] == pytest.approx(float(real[-1]))
        assert legacy["is_symmetric"] == str(entry["is_sym"]) == str(kind == "symmetric")


def test_a_channelwise_weight_has_the_documented_form(symmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    new = written(tmp_path / "b", symmetric, AimetVersion.V1_0_0)
    (entry,) = [e for e in new["param_encodings"] if e["name"] == "w1"]
    assert set(entry) == {"name", "enc_type", "dtype", "bw", "is_sym", "scale", "offset"}
    assert (entry["enc_type"], entry["dtype"], entry["bw"], entry["is_sym"]) == ("PER_CHANNEL", "INT", 8, True)
    assert entry["offset"] == [-128] * 8
    newest = written(tmp_path / "c", symmetric, AimetVersion.V2_0_0)
    assert (newest["version"], set(newest)) == ("2.0.0", {"version", "encodings"})
    (entry,) = [e for e in newest["encodings"] if e["name"] == "w1"]
    assert set(entry) == {"name", "output_dtype", "y_scale", "axis"}
    assert (entry["output_dtype"], entry["axis"], len(entry["y_scale"])) == ("int8", 0, 8)


def test_widths_that_a_version_lacks_are_told(planned: Any, tmp_path: pathlib.Path) -> None:
    entries = collect_entries(*planned(wbits=3, abits=3))
    notes = {}
    for version in VERSIONS:
        _, found = write_aimet(entries, tmp_path / version.value, version)
        notes[version] = {note.tensor: note for note in found}
    assert "w1" not in notes[AimetVersion.V1_0_0]
    assert notes[AimetVersion.V2_0_0]["w1"].fidelity is Fidelity.APPROXIMATED
    assert "4-bit codes" in notes[AimetVersion.V0_6_1]["w1"].reason
    assert notes[AimetVersion.V2_0_0]["image"].fidelity is Fidelity.LEFT_OUT
    assert "image" not in read_aimet(tmp_path / "2.0.0").tensors
    assert read_aimet(tmp_path / "1.0.0").tensors["image"].bits == 3
    residual = [note for note in notes[AimetVersion.V1_0_0].values() if ":" in note.tensor]
    assert residual, "a requantization in front of one layer is told"


DOCUMENTED = {
    "version": "2.0.0",
    "encodings": [
        {"name": "a", "y_scale": 0.01, "y_zero_point": 41, "output_dtype": "uint8"},
        {"name": "b", "y_scale": [0.01, 0.02], "y_zero_point": [0, 0], "axis": 0, "output_dtype": "int8"},
        {"name": "c", "y_scale": [[0.01, 0.02]], "axis": 1, "block_size": 32, "output_dtype": "int4"},
        {"name": "d", "y_scale": 0.5, "output_dtype": "float8e4m3fn"},
    ],
}


def test_examples_of_the_specification_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "spec.encodings"
    path.write_text(json.dumps(DOCUMENTED))
    read = read_aimet(path)
    assert (read.tensors["a"].zero_point.tolist(), read.tensors["a"].signed) == ([41], False)
    assert (read.tensors["b"].axis, read.tensors["b"].scale.size, read.tensors["b"].signed) == (0, 2, True)
    assert [line.split(":")[0] for line in read.skipped] == ["c", "d"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "an object"),
        ("{}", "activation_encodings"),
        ("{", "no JSON"),
        ('{"encodings": [{"y_scale": 1}]}', "entries with names"),
        ('{"encodings": [{"name": "a", "output_dtype": "int8"}]}', "an entry for a"),
        ('{"activation_encodings": {"a": [{"dtype": "int", "bitwidth": 8}]}}', "an entry for a"),
        ('{"activation_encodings": {"a": [7]}}', "an entry for a"),
        ('{"activation_encodings": [{"name": "a", "bw": 8, "dtype": "INT"}]}', "an entry for a"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(content: str, told: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "wrong.encodings"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        read_aimet(path)
