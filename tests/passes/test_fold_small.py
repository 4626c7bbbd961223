"""Pad, Relu and Clip, Identity and constants: what folds, what must not, and equal outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.fold_clip import FoldClipPass
from postquant.passes.fold_constants import FoldConstantsPass
from postquant.passes.fold_identity import FoldIdentityPass
from postquant.passes.fold_pad import FoldPadPass

W = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32)
P1 = np.array([0, 0, 1, 1, 0, 0, 1, 2], np.int64)
INPUT = "float[N,4,6,6] x"


def check(bench: Any, model: ir.Model, passes: ir.passes.PassBase, nodes: list[str]) -> None:
    x = {"x": np.random.default_rng(2).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    before = bench.run(model, x, optimize=False)
    assert passes(model).modified
    assert [node.op_type for node in model.graph] == nodes
    bench.check(model)
    for name, expected in bench.run(model, x, optimize=False).items():
        np.testing.assert_allclose(expected, before[name], rtol=1e-5, atol=1e-6)
    assert not passes(model).modified


@pytest.mark.parametrize(
    ("body", "nodes"),
    [
        ("p = Pad (x, pads) y = Conv (p, w)", ["Conv"]),
        ("p = Pad (x, pads, zero) y = Conv <pads = [0, 1, 0, 1], strides = [2, 2]> (p, w)", ["Conv"]),
        ("p = Pad (x, pads) y = Conv <auto_pad = 'VALID'> (p, w)", ["Conv"]),
        ("p = Pad (x, two, , axes) y = Conv (p, w)", ["Conv"]),
        ("p = Pad (x, pads) a = Conv (p, w) b = Conv (p, w) y = Add (a, b)", ["Conv", "Conv", "Add"]),
        ("p = Pad (x, pads) y = AveragePool <kernel_shape = [3, 3]> (p)", ["AveragePool"]),
        (
            "p = Pad (x, pads) y = AveragePool <kernel_shape = [4, 4], pads = [1, 1, 1, 1], count_include_pad = 1> (p)",
            ["AveragePool"],
        ),
        ("r = Relu (x) p = Pad (r, pads) y = MaxPool <kernel_shape = [3, 3]> (p)", ["Relu", "MaxPool"]),
        ("c = Clip (x, zero) p = Pad (c, pads) y = MaxPool <kernel_shape = [3, 3]> (p)", ["Clip", "MaxPool"]),
        ("p = Pad (x, pads, least) y = MaxPool <kernel_shape = [3, 3]> (p)", ["MaxPool"]),
    ],
)
def test_pad_folds(bench: Any, body: str, nodes: list[str]) -> None:
    model = bench.model(
        bench.graph(body.replace("'", '"'), INPUT, opset=18),
        w=W,
        pads=P1,
        two=np.array([1, 2, 1, 0], np.int64),
        axes=np.array([-2, 3], np.int64),
        zero=np.float32(0),
        least=np.float32(-np.inf),
    )
    check(bench, model, FoldPadPass(), nodes)


@pytest.mark.parametrize(
    "body",
    [
        "p = Pad (x, pads, one) y = Conv (p, w)",
        "p = Pad <mode = 'reflect'> (x, pads) y = Conv (p, w)",
        "p = Pad (x, batch) y = Conv (p, w)",
        "p = Pad (x, crop) y = Conv (p, w)",
        "p = Pad (x, pads) y = Conv <auto_pad = 'SAME_UPPER'> (p, w)",
        "p = Pad (x, pads) a = Conv <pads = [1, 1, 1, 1]> (p, w) y = Add (a, p)",
        "p = Pad (x, pads) y = MaxPool <kernel_shape = [3, 3]> (p)",
        "p = Pad (x, pads) y = AveragePool <kernel_shape = [2, 2]> (p)",
        "p = Pad (x, pads) y = AveragePool <kernel_shape = [3, 3], ceil_mode = 1, strides = [2, 2]> (p)",
        "p = Pad (x, pads) y = AveragePool <kernel_shape = [4, 4], pads = [1, 1, 1, 1]> (p)",
        "p = Pad (x, pads) y = ConvTranspose (p, w)",
    ],
)
def test_pad_stays(bench: Any, body: str) -> None:
    model = bench.model(
        bench.graph(body.replace("'", '"'), INPUT),
        w=W,
        pads=P1,
        batch=np.array([1, 0, 0, 0, 0, 0, 0, 0], np.int64),
        crop=np.array([0, 0, -1, 0, 0, 0, 0, 0], np.int64),
        one=np.float32(1),
    )
    assert not FoldPadPass()(model).modified


@pytest.mark.parametrize(
    ("body", "nodes", "bounds"),
    [
        ("a = Relu (x) y = Relu (a)", ["Relu"], None),
        ("a = Relu (x) y = Clip (a, , six)", ["Clip"], (0, 6)),
        ("a = Relu (x) y = Clip (a, less, six)", ["Clip"], (0, 6)),
        ("a = Clip (x, less, six) y = Relu (a)", ["Clip"], (0, 6)),
        ("a = Clip (x, less, six) y = Clip (a, half)", ["Clip"], (0.5, 6)),
        ("a = Clip (x, half, six) y = Clip (a, , less)", ["Clip"], (-1, -1)),
        ("a = Clip (x, less) b = Relu (a) y = Relu (b)", ["Relu"], None),
        ("a = Clip (x) y = Clip (a)", ["Clip"], (None, None)),
    ],
)
def test_clips_merge(bench: Any, body: str, nodes: list[str], bounds: tuple[float, float] | None) -> None:
    arrays = {"six": np.float32(6), "less": np.float32(-1), "half": np.float32(0.5)}
    model = bench.model(bench.graph(body, INPUT), **arrays)
    check(bench, model, FoldClipPass(), nodes)
    node = model.graph.node(0)
    assert node.outputs[0].name == "y"
    if bounds is not None:
        found = [None if v is None else v.const_value.numpy().item() for v in node.inputs[1:]]
        assert [*found, None, None][:2] == list(bounds)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("a = Relu (x) b = Relu (a) y = Add (a, b)", "float[a,b,c,d] y"),
        ("a = Relu (x) y = Relu (a)", "float[a,b,c,d] y, float[N,4,6,6] a"),
        ("a = Clip (x, bound) y = Relu (a)", "float[a,b,c,d] y"),
        ("a = Clip (x, six, less) y = Relu (a)", "float[a,b,c,d] y"),
    ],
)
def test_clips_stay(bench: Any, body: str, outputs: str) -> None:
    arrays = {"six": np.float32(6), "less": np.float32(-1)}
    model = bench.model(bench.graph(body, f"{INPUT}, float bound", outputs), **arrays)
    assert not FoldClipPass()(model).modified


@pytest.mark.parametrize(
    ("body", "nodes"),
    [
        ("a = Identity (x) y = Relu (a)", ["Relu"]),
        ("a = Relu (x) y = Identity (a)", ["Relu"]),
        ("a = Dropout (x) y = Relu (a)", ["Relu"]),
        ("a = Dropout (x, , no) y = Relu (a)", ["Relu"]),
        ("a = Concat <axis = 1> (x) y = Relu (a)", ["Relu"]),
        ("a = Transpose <perm = [0, 1, 2, 3]> (x) y = Relu (a)", ["Relu"]),
    ],
)
def test_identities_go(bench: Any, body: str, nodes: list[str]) -> None:
    model = bench.model(bench.graph(body, INPUT), no=np.array(False))
    check(bench, model, FoldIdentityPass(), nodes)
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = Identity (x)", "float[a,b,c,d] y"),
        ("a = Relu (x) y = Identity (a)", "float[a,b,c,d] y, float[N,4,6,6] a"),
        ("y = Identity (w)", "float[a,b,c,d] y"),
        ("y = Transpose (x)", "float[a,b,c,d] y"),
        ("a, m = Dropout (x) b = Cast <to = 1> (m) y = Add (a, b)", "float[a,b,c,d] y"),
        ("y = Dropout (x, half, yes)", "float[a,b,c,d] y"),
    ],
)
def test_identities_stay(bench: Any, body: str, outputs: str) -> None:
    model = bench.model(bench.graph(body, INPUT, outputs), w=W, half=np.float32(0.5), yes=np.array(True))
    assert not FoldIdentityPass()(model).modified
    assert {value.name for value in model.graph.outputs} >= {"y"}


def test_constants_are_computed(bench: Any) -> None:
    body = """
        t = Transpose <perm = [1, 0, 2, 3]> (w)
        s = Mul (t, two)
        c = Conv <pads = [1, 1, 1, 1]> (x, s)
        z = Sqrt (two)
        y = Mul (c, z)
    """
    model = bench.model(bench.graph(body, INPUT), w=W, two=np.float32(2))
    check(bench, model, FoldConstantsPass(), ["Conv", "Mul"])
    np.testing.assert_array_equal(model.graph.initializers["s"].const_value.numpy(), W.transpose(1, 0, 2, 3) * 2)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("q = DequantizeLinear (codes, s) y = Add (x, q)", "float[a,b,c,d] y"),
        ("r = RandomNormal <shape = [1]> () y = Add (x, r)", "float[a,b,c,d] y"),
        ("z = Neg (w) y = Relu (x)", "float[a,b,c,d] y, float[4,4,3,3] z"),
    ],
)
def test_what_is_not_computed(bench: Any, body: str, outputs: str) -> None:
    model = bench.model(bench.graph(body, INPUT, outputs), w=W, codes=np.array([1], np.int8), s=np.float32(2))
    assert not FoldConstantsPass()(model).modified


def test_constant_that_would_grow_the_model_stays_with_a_note(bench: Any) -> None:
    body = "big = ConstantOfShape (size) s = ReduceSum (big) y = Add (x, s) z = Relu (big)"
    outputs = "float[a,b,c,d] y, float[N] z"
    model = bench.model(bench.graph(body, INPUT, outputs), size=np.array([5_000_000], np.int64))
    fold = FoldConstantsPass()
    assert fold(model).modified
    assert "ConstantOfShape" in bench.ops(model)
    assert "ReduceSum" not in bench.ops(model)


def test_overridable_initializer_is_not_constant(bench: Any) -> None:
    model = bench.model(bench.graph("s = Neg (k) y = Add (x, s)", INPUT), k=np.float32(2))
    model.graph.inputs.append(model.graph.initializers["k"])
    assert not FoldConstantsPass()(model).modified
