"""Target files: strict reading, extension, built-in ones."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from postquant.passes.target import (
    ConcatScales,
    Role,
    WeightStorage,
    builtin_targets,
    load_target,
    parse_target,
)
from postquant.runtime_ops.errors import ConfigError


def tables(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "t",
        "description": "d",
        "min_opset": 17,
        "bias": "int32",
        "concat_scales": "own",
        "weight_storage": "int8",
        "activations": {"signed": False, "symmetric": False},
        "weights": {"signed": True, "symmetric": True, "narrow": True, "per_channel": True},
        "ops": {"Conv": {"role": "weighted", "inputs": [0, 1]}, "Add": "elementwise"},
    }
    return base | changes


@pytest.mark.parametrize("name", builtin_targets())
def test_builtin_targets_load(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.ops["Conv"].role is Role.WEIGHTED
    assert target.description


def test_avx2_differs_from_onnxruntime_in_the_width_of_weights_only() -> None:
    plain, avx2 = load_target("onnxruntime"), load_target("onnxruntime-avx2")
    assert (plain.weights.max_bits, avx2.weights.max_bits) == (16, 7)
    assert avx2.weights.max_bits_reason
    assert (plain.ops, plain.activations, plain.float_reasons) == (avx2.ops, avx2.activations, avx2.float_reasons)


def test_parsed_values() -> None:
    target = parse_target(tables(weight_storage="int4", concat_scales="shared", bias="float"))
    assert (target.weight_storage, target.concat_scales) == (WeightStorage.INT4, ConcatScales.SHARED)
    assert not target.int32_bias
    assert target.ops["Conv"].inputs == (0, 1)
    assert target.ops["Add"].inputs is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"activations": {"signed": False, "symmetric": False, "bit": [8]}}, "activations: bit"),
        ({"ops": {"Conv": {"role": "weighted", "input": [0]}}}, "ops.Conv: input"),
        ({"ops": {"Conv": "heavy"}}, "ops.Conv: role"),
        ({"ops": {"Conv": {"role": "weighted", "accumulates": True}}}, "ops.Conv"),
        ({"integer_clips": 1}, "integer_clips"),
        ({"ops": {"Conv": 3}}, "ops.Conv"),
        ({"min_opset": True}, "min_opset"),
        ({"weights": {"signed": 1, "symmetric": True}}, "weights: signed"),
        ({"weights": {"signed": False, "symmetric": True, "narrow": True}}, "weights"),
        ({"weights": {"signed": True, "symmetric": True, "bits": [9]}}, "weights: bits"),
        ({"float": {"Exp": 3}}, "float.Exp"),
        ({"name": 3}, "name"),
    ],
)
def test_wrong_keys_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_target(tables(**changes))


def test_missing_key_is_named() -> None:
    data = tables()
    del data["weights"]
    with pytest.raises(ConfigError, match="weights"):
        parse_target(data)


def test_file_extends_a_builtin_target_and_takes_an_operator_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "onnxruntime"\nname = "mine"\n[float]\nSigmoid = "too coarse"\n[weights]\nmax_bits = 6\n'
    )
    target = load_target(path)
    assert "Sigmoid" not in target.ops
    assert target.float_reasons["Sigmoid"] == "too coarse"
    assert target.weights.max_bits == 6
    assert target.weights.per_channel


def test_file_extends_a_file_beside_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "onnxruntime"\nname = "base"\n')
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\nname = "mine"\n')
    assert load_target(tmp_path / "mine.toml").name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "not TOML"),
        ('extends = "mine.toml"\n', "circle"),
        ("extends = 3\n", "extends"),
        ('extends = "nothing"\n', "no such target"),
    ],
)
def test_broken_files(tmp_path: pathlib.Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_target(path)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="onnxruntime-avx2"):
        load_target("onnxruntim")


def test_formats() -> None:
    target = load_target("onnxruntime")
    weight = target.weights.spec(7, axis=0)
    assert (weight.qmin, weight.qmax, weight.axis) == (-63, 63, 0)
    left = target.weights.spec(8, left=True)
    assert (left.signed, left.qmin, left.qmax, left.symmetric) == (False, 0, 255, True)
    assert target.activations.spec(4, symmetric=True).symmetric
    with pytest.raises(ConfigError, match="bit width"):
        target.weights.spec(16)
