"""Per-channel scales between layers: float outputs stay equal, and what must not be scaled is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.equalize import EqualizePass, ScaleGroup, scale_groups

KEEP = "<pads = [1, 1, 1, 1]>"
DEPTHWISE = "<pads = [1, 1, 1, 1], group = 4>"


class Lab:
    """Models between weights that are given by name: w 4 -> 4 channels, d depthwise, g Gemm, t transposed."""

    def __init__(self, bench: Any, rng: np.random.Generator) -> None:
        self.bench, self.rng = bench, rng

    def model(self, body: str, outputs: str = "float[a,b,c,d] y", inputs: str = "float[N,4,8,8] x", **more: Any) -> Any:
        shapes = {"w": (4, 4, 3, 3), "d": (4, 1, 3, 3), "g": (4, 3), "t": (4, 4, 2, 2), "b": (4,), "k": (3,)}
        arrays = dict(more)
        for kind, shape in shapes.items():
            for number in range(10):
                name = f"{kind}{number}"
                if f" {name}" in body and name not in arrays:
                    arrays[name] = self.rng.standard_normal(shape).astype(np.float32)
        return self.bench.model(self.bench.graph(body, inputs, outputs), **arrays)

    def equalized(self, model: ir.Model, groups: list[ScaleGroup], largest: float = 8.0) -> ir.Model:
        """The model with random factors in every group."""
        copy = model.clone()
        factors = [(group, np.exp(self.rng.uniform(0, np.log(largest), group.channels))) for group in groups]
        result = EqualizePass(factors)(copy)
        assert result.modified == bool(groups)
        self.bench.check(copy)
        return copy

    def assert_equal(self, model: ir.Model, changed: ir.Model, feed: dict[str, Any] | None = None) -> None:
        feed = feed or {"x": self.rng.standard_normal((2, 4, 8, 8)).astype(np.float32)}
        expected, found = self.bench.run(model, feed), self.bench.run(changed, feed)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4 * np.abs(array).max())


@pytest.fixture
def lab(bench: Any, rng: np.random.Generator) -> Lab:
    return Lab(bench, rng)


CHAINS = {
    "two layers": (f"a = Conv {KEEP} (x, w1, b1) y = Conv {KEEP} (a, w2, b2)", ["a"]),
    "into depthwise": (f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) y = Conv {DEPTHWISE} (r, d2, b2)", ["a r"]),
    "from depthwise": (f"a = Conv {DEPTHWISE} (x, d1, b1) r = LeakyRelu (a) y = Conv {KEEP} (r, w2, b2)", ["a r"]),
    "without biases": (f"a = Conv {KEEP} (x, w1) r = Relu (a) y = Conv {KEEP} (r, w2)", ["a r"]),
    "pooling": (
        f"""a = Conv {KEEP} (x, w1, b1)
            p = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (a)
            q = AveragePool <kernel_shape = [2, 2], pads = [0, 0, 1, 1], count_include_pad = 1> (p)
            y = Conv {KEEP} (q, w2, b2)""",
        ["a p q"],
    ),
    "transposed": (
        """a = ConvTranspose <strides = [2, 2]> (x, t1, b1) r = Relu (a)
           y = ConvTranspose <pads = [1, 0, 1, 1]> (r, t2, b2)""",
        ["a r"],
    ),
    "clip": (f"a = Conv {KEEP} (x, w1, b1) r = Clip (a, , top) y = Conv {KEEP} (r, w2, b2)", ["a r"]),
    # One group for everything that is added up, with a layer that both reads from it and writes into it.
    "residual stream": (
        f"""a = Conv {KEEP} (x, w1, b1) r = Relu (a) c = Conv {KEEP} (r, w2, b2) s = Add (c, r)
            e = Conv {KEEP} (s, w3, b3) u = Add (s, e) v = Relu (u) y = Conv {KEEP} (v, w4, b4)""",
        ["a r c s e u v"],
    ),
    "residual block": (
        f"""a = Conv {KEEP} (x, w1, b1) r = Relu (a)
            c = Conv {KEEP} (r, w2, b2) e = Relu (c) f = Conv {KEEP} (e, w3, b3) s = Add (f, r)
            y = Conv {KEEP} (s, w4, b4)""",
        ["a r f s", "c e"],
    ),
    "added to itself": (f"a = Conv {KEEP} (x, w1, b1) s = Add (a, a) y = Conv {KEEP} (s, w2, b2)", ["a s"]),
    "two readers": (
        f"""a = Conv {KEEP} (x, w1, b1) c = Conv {DEPTHWISE} (a, d2, b2) e = Conv {KEEP} (a, w3, b3)
            y = Conv {KEEP} (c, w4, b4) z = Abs (e)""",
        ["a", "c"],
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_outputs_stay_equal(lab: Lab, chain: str) -> None:
    body, values = CHAINS[chain]
    outputs = "float[a,b,c,d] y" + (", float[a,b,c,d] z" if " z = " in body else "")
    constants: dict[str, Any] = {"top": np.float32(1e9)} if " top" in body else {}
    model = lab.model(body, outputs, **constants)
    groups = scale_groups(model)
    assert [" ".join(group.values) for group in groups] == values
    changed = lab.equalized(model, groups)
    lab.assert_equal(model, changed)
    # Something did change inside.
    name = values[0].split()[0]
    feed = {"x": lab.rng.standard_normal((1, 4, 8, 8)).astype(np.float32)}
    before, after = (lab.bench.values(m, [name], feed)[name] for m in (model, changed))
    assert not np.allclose(before, after, rtol=1e-2)


@pytest.mark.parametrize("transposed", [0, 1])
def test_into_a_classifier(lab: Lab, transposed: int) -> None:
    body = (
        f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) p = GlobalAveragePool (r) f = Flatten (p) "
        f"h = Gemm <transB = {transposed}> (f, q1, b2) e = Relu (h) y = Gemm (e, g2, k2)"
    )
    q1 = lab.rng.standard_normal((4, 4)).astype(np.float32)
    model = lab.model(body, "float[a,b] y", q1=q1)
    groups = scale_groups(model)
    assert [group.values for group in groups] == [("a", "r", "p", "f"), ("h", "e")]
    assert [(group.producers, group.consumers) for group in groups] == [
        (("Conv_0",), ("Gemm_4",)),
        (("Gemm_4",), ("Gemm_6",)),
    ]
    lab.assert_equal(model, lab.equalized(model, groups))


def test_grouped_convolutions(lab: Lab) -> None:
    body = "a = Conv <group = 2> (x, v1, b1) r = Relu (a) y = Conv <group = 2> (r, v2, b2)"
    weights: dict[str, Any] = {name: lab.rng.standard_normal((4, 2, 3, 3)).astype(np.float32) for name in ("v1", "v2")}
    model = lab.model(body, **weights)
    (group,) = scale_groups(model)
    assert not group.depthwise
    lab.assert_equal(model, lab.equalized(model, [group]))


def test_what_a_group_says_about_itself(lab: Lab) -> None:
    body = (
        f"a = Conv {KEEP} (x, w1, b1) r = Clip (a, zero, six) c = Conv {DEPTHWISE} (r, d2, b2) "
        f"e = Clip (c, zero, four) y = Conv {KEEP} (e, w3, b3)"
    )
    model = lab.model(body, zero=np.float32(0), six=np.float32(6), four=np.float32(4))
    first, second = scale_groups(model)
    assert (first.depthwise, first.ceiling, first.channels) == (True, 6.0, 4)
    assert (second.depthwise, second.ceiling) == (False, 4.0)
    assert (first.producers, first.consumers) == (("Conv_0",), ("Conv_2",))


def test_clip_within_the_observed_range(lab: Lab) -> None:
    """Factors of at least 1 that keep every channel below the bound change nothing, the clipped channel included."""
    body = f"a = Conv {KEEP} (x, w1, b1) r = Clip (a, zero, six) y = Conv {DEPTHWISE} (r, d2, b2)"
    w1 = lab.rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * np.float32(0.05)
    w1[2] *= 40  # the only channel that reaches the bound
    model = lab.model(body, zero=np.float32(0), six=np.float32(6), w1=w1, b1=np.zeros(4, np.float32))
    (group,) = scale_groups(model)
    feed = {"x": lab.rng.standard_normal((2, 4, 8, 8)).astype(np.float32)}
    seen = lab.bench.values(model, ["r"], feed)["r"].max(axis=(0, 2, 3))
    assert seen[2] == 6
    assert (np.delete(seen, 2) < 3).all()
    copy = model.clone()
    EqualizePass([(group, 6 / seen.astype(np.float64))])(copy)
    lab.assert_equal(model, copy, feed)
    after = lab.bench.values(copy, ["r"], feed)["r"].max(axis=(0, 2, 3))
    np.testing.assert_allclose(after, 6, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "outputs", "why"),
    [
        (f"a = Conv {KEEP} (x, w1, b1) y = Conv {KEEP} (a, w2, b2)", ", float[a,b,c,d] a", "an output of the model"),
        (
            f"a = Conv {KEEP} (x, w1, b1) y = Conv {KEEP} (a, w2, b2) z = Abs (a)",
            ", float[a,b,c,d] z",
            "another reader",
        ),
        (f"a = Conv {KEEP} (x, w1, b1) s = Sigmoid (a) y = Conv {KEEP} (s, w2, b2)", "", "not homogeneous"),
        (f"a = Conv {KEEP} (x, w1, b1) s = Add (a, x) y = Conv {KEEP} (s, w2, b2)", "", "the input is added"),
        (f"a = Conv {KEEP} (x, w1, b1) s = Mul (a, a) y = Conv {KEEP} (s, w2, b2)", "", "a product"),
        (f"a = Conv {KEEP} (x, w1, b1) s = Add (a, c) y = Conv {KEEP} (s, w2, b2)", "", "a constant is added"),
        (f"a = Conv {KEEP} (x, w1, b1) s = Clip (a, c, top) y = Conv {KEEP} (s, w2, b2)", "", "a lower bound"),
        (f"a = Conv {KEEP} (x, w1, b1) s = Softmax <axis = 1> (a) y = Conv {KEEP} (s, w2, b2)", "", "mixes channels"),
        (f"a = Conv {KEEP} (x, w1, b1) s = Transpose <perm = [0, 2, 1, 3]> (a) y = Abs (s)", "", "no layer reads it"),
    ],
)
def test_no_group(lab: Lab, body: str, outputs: str, why: str) -> None:
    constants: dict[str, Any] = {"c": np.float32(-0.5), "top": np.float32(3)}
    used = {name: value for name, value in constants.items() if f" {name}" in body}
    model = lab.model(body, f"float[a,b,c,d] y{outputs}", **used)
    assert scale_groups(model) == [], why


def test_the_weight_input_is_no_reader(lab: Lab) -> None:
    """A value that a layer reads as its weight or bias is not scaled."""
    body = f"a = Conv {KEEP} (x, w1, b1) v = Reshape (a, shape) y = Conv {KEEP} (a, v, b2)"
    model = lab.model(body, inputs="float[1,4,6,6] x", shape=np.array([4, 4, 3, 3]))
    assert scale_groups(model) == []


def test_shared_weights_are_scaled_for_one_reader_only(lab: Lab) -> None:
    body = f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) c = Conv {KEEP} (r, w1, b1) y = Abs (c)"
    model = lab.model(body)
    groups = scale_groups(model)
    assert [group.values for group in groups] == [("a", "r")]
    lab.assert_equal(model, lab.equalized(model, groups))


def test_a_transposed_gemm_input_has_no_channels_on_axis_1(lab: Lab) -> None:
    body = "h = Gemm (x, q1, b1) e = Relu (h) y = Gemm <transA = 1> (e, q2, b2)"
    square = {name: lab.rng.standard_normal((4, 4)).astype(np.float32) for name in ("q1", "q2")}
    model = lab.model(body, "float[a,b] y", "float[4,4] x", **square)
    changed = lab.equalized(model, scale_groups(model))
    lab.assert_equal(model, changed, {"x": lab.rng.standard_normal((4, 4)).astype(np.float32)})


def test_a_reader_in_a_subgraph(lab: Lab) -> None:
    body = f"""
        a = Conv {KEEP} (x, w1, b1)
        s = Conv {KEEP} (a, w2, b2)
        u = If <then_branch = t () => (float[a,b,c,d] p) {{ p = Conv {KEEP} (a, w3, b3) }},
                else_branch = e () => (float[a,b,c,d] q) {{ q = Neg (s) }}> (flag)
        y = Add (s, u)
        """
    model = lab.model(body, inputs="float[N,4,8,8] x, bool flag")
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}_{index}"
    changed = lab.equalized(model, scale_groups(model))
    x = lab.rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    for flag in (True, False):
        lab.assert_equal(model, changed, {"x": x, "flag": np.array(flag)})


def test_sums_that_broadcast_across_channels(lab: Lab) -> None:
    """(N, 4) + (N, 4, H, 4): the channels of one are the columns of the other."""
    body = f"a = Conv {KEEP} (x, w1, b1) h = Gemm (i, q1, b2) s = Add (a, h) y = Conv {KEEP} (s, w2, b3)"
    q1 = lab.rng.standard_normal((4, 4)).astype(np.float32)
    model = lab.model(body, inputs="float[1,4,8,4] x, float[1,4] i", q1=q1)
    changed = lab.equalized(model, scale_groups(model))
    feed = {
        "x": lab.rng.standard_normal((1, 4, 8, 4)).astype(np.float32),
        "i": lab.rng.standard_normal((1, 4)).astype(np.float32),
    }
    lab.assert_equal(model, changed, feed)


def test_flattened_maps_are_no_channels(lab: Lab) -> None:
    body = f"a = Conv {KEEP} (x, w1, b1) f = Flatten (a) y = Gemm (f, q1, k1)"
    model = lab.model(body, "float[a,b] y", "float[N,4,2,2] x", q1=lab.rng.standard_normal((16, 3)).astype(np.float32))
    assert scale_groups(model) == []
    body = f"a = Conv {KEEP} (x, w1, b1) p = GlobalAveragePool (a) f = Flatten <axis = 2> (p) y = Gemm (f, q1, k1)"
    model = lab.model(body, "float[a,b] y", q1=lab.rng.standard_normal((1, 3)).astype(np.float32))
    assert scale_groups(model) == []


def test_nothing_to_do(lab: Lab) -> None:
    model = lab.model(f"y = Conv {KEEP} (x, w1, b1)")
    assert scale_groups(model) == []
    assert not EqualizePass([])(model).modified
