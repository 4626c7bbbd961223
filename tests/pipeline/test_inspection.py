"""Inspection of files, plans and result folders."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from rich.console import Console

from postquant.passes.place import PlacementSettings
from postquant.pipeline.inspection import inspect_model
from postquant.pipeline.kernels import integer_coverage, optimized_op_counts
from postquant.pipeline.save import save_model
from postquant.pipeline.tables import integer_table, output_table, print_inspection, quality_table
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.errors import ModelError


def printed(inspection: Any) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        print_inspection(inspection, console)
    return captured.get()


def test_a_float_model(cnn: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "float.onnx"
    save_model(cnn.model, path)
    seen = inspect_model(path)
    assert not seen.quantized
    assert seen.ops["Conv"] == 4
    assert seen.opsets == {"": 17}
    assert [(t.name, t.dtype, t.shape) for t in seen.inputs] == [("image", "float", ("N", 3, 16, 16))]
    assert [w.name for w in seen.weights] == ["w1", "w2", "w3", "w4", "w5"]
    assert all(w.bits is None for w in seen.weights)
    assert seen.floats == ()
    assert "image: float [N, 3, 16, 16]" in printed(seen)


def test_a_quantized_model(cases: Any, tmp_path: pathlib.Path) -> None:
    case = cases.build(settings=PlacementSettings(wbits=4, abits=4))
    path = tmp_path / "model.onnx"
    save_model(case.emitted, path)
    seen = inspect_model(path)
    assert seen.quantized
    assert seen.kernels is not None
    assert seen.kernels["QLinearConv"] == 4
    assert seen.coverage is not None
    assert seen.coverage.share == 1.0
    bits = {w.node: w.bits for w in seen.weights}
    assert bits == {"conv1": 8, "depthwise": 4, "project": 4, "reduce": 4, "head": 8}
    assert {w.dtype for w in seen.weights} == {"int8"}
    weight = next(w for w in seen.weights if w.node == "depthwise")
    assert weight.scales == 8
    assert weight.code_range is not None
    assert -8 <= weight.code_range[0] < weight.code_range[1] <= 7
    assert {a.bits for a in seen.activations} == {4, 8}
    assert seen.qdq_pairs == len(seen.activations)
    json.dumps(seen.to_json(), allow_nan=False)
    text = printed(seen)
    assert "5 of 5 weighted nodes run as integer kernels" in text


def test_a_result_folder_and_its_plan(cnn: Any, tmp_path: pathlib.Path) -> None:
    save_model(cnn.emitted, tmp_path / "model.onnx")
    cnn.plan.save(tmp_path / "plan.safetensors")
    seen = inspect_model(tmp_path)
    assert seen.target == "onnxruntime"
    alone = inspect_model(tmp_path / "plan.safetensors")
    assert alone.file_bytes is None
    assert {a.name for a in alone.activations} == set(cnn.plan.activations)
    assert {w.name for w in alone.weights} == set(cnn.plan.weights)
    assert "quantized for onnxruntime" in printed(alone)


def test_an_empty_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="holds no result"):
        inspect_model(tmp_path)


def test_kernels(cnn: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(cnn.emitted, path)
    counts = optimized_op_counts(path)
    assert counts == optimized_op_counts(cnn.emitted)
    assert (counts["QLinearConv"], counts["QGemm"], counts["QLinearAdd"], counts["Conv"]) == (4, 1, 1, 0)
    assert integer_coverage(path).share == 1.0
    floating = integer_coverage(cnn.model)
    assert floating.share == 0.0
    assert set(floating.floating) == {"conv1", "depthwise", "project", "reduce", "head"}


def test_tables_of_a_verification(cnn: Any) -> None:
    result = verify_model(cnn.model, cnn.emitted, cnn.plan, cnn.samples)
    console = Console(width=140)
    with console.capture() as captured:
        for table in (integer_table(result), quality_table(result), output_table(result.outputs)):
            console.print(table)
    text = captured.get()
    assert "QLinearConv" in text
    assert "logits" in text
    assert "sum" in text
