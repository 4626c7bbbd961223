"""report.json: the same bytes for the same content, read back whole, strict about versions."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import pytest

from postquant.pipeline.report import (
    SCHEMA_VERSION,
    CheckReport,
    FloatReport,
    InputReport,
    LayerReport,
    OutputReport,
    PeerReport,
    Report,
    SettingFile,
    StageReport,
)
from postquant.runtime_ops.errors import ModelError

REPORT = Report(
    model="net.onnx",
    model_sha256="ab",
    data_sha256="cd",
    samples=4,
    target="onnxruntime",
    settings={"wbits": 8},
    versions={"onnx": "1"},
    size_before=4000,
    size_after=1000,
    inputs=(InputReport(name="x", dtype="float32", shape=(None, "N", 3), low=-1.0, high=2.5, sample_shape=(1, 2, 3)),),
    layers=(
        LayerReport(
            node="conv",
            op_type="Conv",
            wbits=8,
            abits=8,
            weight_shape=(4, 3, 3, 3),
            weight_scales=(0.001, 0.002),
            input_scale=0.05,
            input_zero_point=3,
            sqnr_db=33.25,
            cosine=0.9999,
            gains={"easyquant": 1.5},
        ),
        LayerReport(node="matmul", op_type="MatMul"),
    ),
    outputs=(OutputReport(name="y", sqnr_db=30.0, agreement=0.99),),
    floats=(FloatReport(node="softmax", op_type="Softmax", reason="why"),),
    stages=(StageReport(name="smooth", kept=False, detail="no gain"),),
    checks=(CheckReport(name="checker", passed=True),),
    notes=("größer",),
    files={"model.onnx": "ef"},
)


def test_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(REPORT.to_bytes())
    assert Report.load(path) == REPORT
    assert json.loads(path.read_bytes())["schema_version"] == SCHEMA_VERSION
    assert "größer" in path.read_text(encoding="utf-8")


def test_numbers_are_valid_json() -> None:
    layer = LayerReport(node="n", op_type="Conv", sqnr_db=math.inf, cosine=math.nan, input_scale=1 / 3)
    data = json.loads(dataclasses.replace(REPORT, layers=(layer,)).to_bytes())["layers"][0]
    assert data["sqnr_db"] == 200.0
    assert data["cosine"] is None
    assert data["input_scale"] == 0.333333


def test_passed() -> None:
    assert REPORT.passed
    failed = dataclasses.replace(REPORT, checks=(*REPORT.checks, CheckReport(name="integers", passed=False)))
    assert not failed.passed


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "the report is damaged"),
        ("[]", "found none"),
        ("{}", "expected schema_version 1, found none"),
        ('{"schema_version": 99}', "expected schema_version 1, found 99"),
        ('{"schema_version": 1, "model": "x"}', "the report is damaged"),
        ('{"schema_version": 1, "surprise": "x"}', "the report is damaged"),
    ],
)
def test_wrong_reports(tmp_path: pathlib.Path, content: str, sentence: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=sentence):
        Report.load(path)


def test_missing_report(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match=r"the report cannot be read.*No such file"):
        Report.load(tmp_path / "report.json")


def test_every_field_is_documented() -> None:
    text = (pathlib.Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    classes = (
        Report,
        SettingFile,
        LayerReport,
        OutputReport,
        PeerReport,
        FloatReport,
        StageReport,
        CheckReport,
        InputReport,
    )
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert f"| `{field.name}` |" in text, f"{cls.__name__}.{field.name} is not in docs/report.md"
