"""Configuration: strict, with errors that name the key, the line and what is allowed."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from typing import Any

import pytest

from postquant.calib.image_preprocess import Layout
from postquant.passes.target import WeightStorage
from postquant.pipeline.config import ImageConfig, Method, Objective, OverrideConfig, QuantConfig
from postquant.pipeline.settings import setting_of
from postquant.runtime_ops.errors import ConfigError


def _read(folder: pathlib.Path, content: str, **options: Any) -> QuantConfig:
    path = folder / "quant.toml"
    path.write_text(content, encoding="utf-8")
    return QuantConfig.from_toml(path, **options)


def test_defaults() -> None:
    config = QuantConfig()
    assert (config.wbits, config.abits, config.method, config.first_last_bits) == (8, 8, Method.EASYQUANT, 8)
    assert (config.alpha, config.beta, config.candidates, config.rounds) == (0.5, 2.0, 100, None)
    assert config.weight_storage is None
    assert config.image is None
    assert config.override == ()


def test_strings_become_enumerations() -> None:
    config = QuantConfig(method="mse", objective="mse", weight_storage="int4")  # type: ignore[arg-type]
    assert (config.method, config.objective, config.weight_storage) == (Method.MSE, Objective.MSE, WeightStorage.INT4)


def test_every_key_can_be_read_from_a_file(tmp_path: pathlib.Path) -> None:
    content = """
        wbits = 4
        abits = 7
        weights = "int"
        depthwise_bits = 6
        activations = "int"
        method = "percentile"
        seed = 3
        threads = 1
        samples = 64
        first_last_bits = "same"
        sums_bits = 7
        objective = "mse"
        alpha = 0.25
        beta = 3
        candidates = 50
        rounds = 2
        percentile = 99.5
        lp = 2
        align_input = false
        equalize = false
        cross_layer = false
        feedback = false
        feedback_cells = false
        adaptive_step = false
        smooth = false
        bias_correction = false
        border = "on"
        budget = "none"
        learn = true
        effort = "fast"
        max_layers = 2
        fisher = true
        augment = false
        memory = "500MB"
        device = "cuda"
        simplify = false
        weight_storage = "int4"
        post_exact = false
        max_positions = 100
        search_work = 2e12
        verify_samples = 8
        compare_onnxruntime = true
        bundle = false
        encodings = "none"
        custom_ops = ["lib.so"]
        target = "mine.toml"
        [image]
        size = [224, 200]
        shorter_side = 256
        mean = [0.485, 0.456, 0.406]
        std = [0.229, 0.224, 0.225]
        layout = "nhwc"
        [[override]]
        node = "conv*"
        wbits = 8
        [[override]]
        op_type = "MatMul"
        float = true
    """
    config = _read(tmp_path, content)
    assert set(tomllib.loads(content)) == {field.name for field in dataclasses.fields(QuantConfig)}
    assert config.first_last_bits is None
    assert config.memory == 500_000_000
    assert config.beta == 3.0
    assert isinstance(config.beta, float)
    assert config.custom_ops == (str(tmp_path / "lib.so"),)
    assert config.target == str(tmp_path / "mine.toml")
    assert config.image is not None
    assert config.image.size == (224, 200)
    assert config.image.layout is Layout.NHWC
    assert config.override == (OverrideConfig(node="conv*", wbits=8), OverrideConfig(op_type="MatMul", float=True))


def test_options_win_over_the_file(tmp_path: pathlib.Path) -> None:
    config = _read(tmp_path, "wbits = 4\nfirst_last_bits = 7\n", wbits=6, first_last_bits="same", abits=None)
    assert (config.wbits, config.first_last_bits, config.abits) == (6, None, 8)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("\nwbits = 9", '"wbits" has a wrong value ({}, line 2): expected a whole number from 2 to 8, found 9.'),
        ("wbits = true", '"wbits" has a wrong value ({}, line 1): expected a whole number from 2 to 8, found true.'),
        ("wbits = 8.0", '"wbits" has a wrong value ({}, line 1): expected a whole number from 2 to 8, found 8.0.'),
        (
            'method = "easyqant"',
            (
                '"method" has a wrong value ({}, line 1): expected one of "easyquant", "mse", "minmax", "entropy", '
                '"percentile", found "easyqant"; perhaps "easyquant" was meant.'
            ),
        ),
        ('rounds = "no"', 'expected a whole number from 1 to 100, or "auto", found "no".'),
        ("percentile = nan", "found nan."),
        (
            "[wbits]\na = 1",
            '"wbits" has a wrong value ({}, line 1): expected a whole number from 2 to 8, found a table.',
        ),
        ("override = 3", '"override" has a wrong value ({}, line 1): expected [[override]], found 3.'),
        ("[image]\nsize = [1, 2, 3]", "({}, line 2)"),
        ("[image]\nstd = [1, 0, 1]", "expected 1 or 3 of: a number above 0, found 0."),
        ('[[override]]\nnode = "a"', "an override changes nothing ({}, line 1: override of a)"),
        ("[[override]]\nwbits = 4", "an override selects nothing ({}, line 1: override)"),
        ('[[override]]\nnode = "a"\nfloat = true\nwbits = 4', "an override contradicts itself"),
        (
            "[image]\nsize = 224\nshorter_side = 3",
            "the image preprocessing is wrong ({}, line 1: image): found shorter_side",
        ),
        ("alpha = 1.5", "the candidates of the scale search leave out the starting scale ({}: alpha, beta)"),
        ("wbits = ", "the configuration is not valid TOML ({})"),
        ("seed = 1\nseed = 2", "the configuration is not valid TOML ({})"),
    ],
)
def test_wrong_file(tmp_path: pathlib.Path, content: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, content)
    assert sentence.format(tmp_path / "quant.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_the_second_override(tmp_path: pathlib.Path) -> None:
    content = 'wbits = 4\n[[override]]\nnode = "a"\nwbits = 4\n\n[[override]]\nnode = "b"\nabit = 4\n'
    with pytest.raises(ConfigError, match=r'unknown key "abit" \(.*line 8\).*one of node, .*"abits" was meant'):
        _read(tmp_path, content)


def test_unknown_key_names_the_close_one(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r'unknown key "w-bits".*perhaps "wbits" was meant'):
        _read(tmp_path, "w-bits = 4")


def test_unreadable_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read.*No such file"):
        QuantConfig.from_toml(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        QuantConfig.from_toml(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("field", "value"),
    [("wbits", 1), ("wbits", "8"), ("wbits", None), ("method", "best"), ("seed", -1), ("smooth", 1), ("target", "")],
)
def test_wrong_arguments(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}"):
        QuantConfig(**{field: value})  # type: ignore[arg-type]


def test_json_is_canonical_and_without_threads_and_folders(tmp_path: pathlib.Path) -> None:
    one = QuantConfig(threads=1, target="a/x.toml", custom_ops=("/p/lib.so",)).to_json()
    two = QuantConfig(threads=2, target="b/x.toml", custom_ops=("/q/lib.so",)).to_json()
    assert one == two
    assert one["target"] == "x.toml"
    assert "threads" not in one
    assert QuantConfig(image=ImageConfig()).to_json()["image"]["layout"] == "nchw"


def test_every_setting_is_documented() -> None:
    text = (pathlib.Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for cls in (QuantConfig, ImageConfig, OverrideConfig):
        for field in dataclasses.fields(cls):
            assert f"| `{field.name}` |" in text, f"{cls.__name__}.{field.name} is not in docs/configuration.md"
            assert setting_of(field).doc
