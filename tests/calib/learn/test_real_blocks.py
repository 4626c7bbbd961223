"""Blocks of real networks in torch, several samples at once, equal onnxruntime on single samples."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from postquant.calib.learn.executor import constant_values, run_nodes, supported
from postquant.passes import semantics
from postquant.passes.blocks import cut_blocks
from postquant.passes.session import make_session

SAMPLES = 3


def feeds_of(model: ir.Model, rng: np.random.Generator) -> dict[str, Any]:
    """One random sample: images, or seven tokens of a sentence."""
    feeds: dict[str, Any] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.name is not None
        if value.dtype is ir.DataType.FLOAT:
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            whole = rng.integers(5, 900, (1, 7)) if value.name == "input_ids" else np.zeros((1, 7))
            feeds[value.name] = (whole if value.name != "attention_mask" else np.ones((1, 7))).astype(np.int64)
    return feeds


@pytest.mark.parametrize(
    "file",
    [
        "cifar10/resnet20.onnx",
        "cifar10/resnet8_mlperftiny.onnx",
        "coco/fastestdet.onnx",
        "coco/face_rfb320.onnx",
        "coco/vww_mobilenetv1_0.25_96.onnx",
        "sts/minilm_l6.onnx",
    ],
)
def test_blocks_of_real_networks(shared_data: pathlib.Path, file: str) -> None:
    model = ir.load(shared_data / file)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    layers = [node.name or "" for node in model.graph if semantics.weight_index(node) is not None]
    blocks = cut_blocks(model, layers)
    assert sorted(name for block in blocks for name in block.layers) == sorted(layers)
    assert {supported(node) for node in model.graph} == {None}
    names = list(dict.fromkeys(name for block in blocks for name in (*block.inputs, block.output)))
    rng = np.random.default_rng(0)
    samples = [feeds_of(model, rng) for _ in range(SAMPLES)]
    session = make_session(model, outputs=names)
    results = [session.run(sample) for sample in samples]
    together = {name: torch.from_numpy(np.concatenate([result[name] for result in results])) for name in names}
    nodes = {node.name: node for node in model.graph}
    for block in blocks:
        part = [nodes[name] for name in block.nodes]
        values = {**constant_values(part), **{name: together[name] for name in block.inputs}}
        with torch.no_grad():
            run_nodes(part, values)
        expected = together[block.output]
        torch.testing.assert_close(
            values[block.output], expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()), msg=block.name
        )
