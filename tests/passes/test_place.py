"""Which tensors are quantized, in which format, and why the others are not."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from postquant.passes.concat import share_concat
from postquant.passes.place import Override
from postquant.passes.semantics import activation_bounds
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.spec import QuantSpec

CONV = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
BIAS = np.ones(4, np.float32)
U8 = QuantSpec(8, signed=False, symmetric=False)
KEEP = "<pads = [1, 1, 1, 1]>"

# Two convolutions with a residual Add, then pooling and a classifier.
RESIDUAL = f"""
    a = Conv {KEEP} (x, w1, b1)
    r = Relu (a)
    c = Conv {KEEP} (r, w2, b2)
    s = Add (c, r)
    t = Relu (s)
    d = Conv {KEEP} (t, w3, b3)
    u = Add (d, t)
    p = GlobalAveragePool (u)
    f = Flatten (p)
    y = Gemm (f, w4, b4)
"""


def weights(count: int, **extra: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """w1, b1, w2, b2 ... for convolutions of 4 channels."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number in range(1, count + 1):
        arrays |= {f"w{number}": CONV * number, f"b{number}": BIAS}
    return arrays | extra


@pytest.fixture
def residual(bench: Any) -> Any:
    return bench.model(
        bench.graph(RESIDUAL, outputs="float[N,3] y"),
        **weights(3, w4=np.ones((4, 3), np.float32), b4=np.ones(3, np.float32)),
    )


def bits(plan: Any, table: str) -> dict[str, int]:
    return {name: entry.bits for name, entry in getattr(plan, table).items()}


class TestResidualNetwork:
    def test_stored_tensors_are_those_behind_clips_and_both_inputs_of_every_add(
        self, bench: Any, residual: ir.Model
    ) -> None:
        plan = bench.place(residual)
        assert set(plan.activations) == {"x", "r", "c", "t", "d", "u", "p"}
        assert set(plan.activations.values()) == {U8}
        assert plan.shared == {"f": "p"}
        assert plan.floats == {}
        assert plan.notes == ()

    def test_weights_have_a_scale_per_output_channel(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual)
        assert {name: entry.axis for name, entry in plan.weights.items()} == {"w1": 0, "w2": 0, "w3": 0, "w4": 1}
        assert all(entry.narrow and entry.qmin == -127 for entry in plan.weights.values())

    def test_biases_name_their_input_and_weight(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual)
        assert plan.int_biases == {"b1": ("x", "w1"), "b2": ("r", "w2"), "b3": ("t", "w3"), "b4": ("f", "w4")}

    def test_low_bits_apply_to_weights_and_inputs_of_weighted_nodes(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual, wbits=4, abits=4)
        assert bits(plan, "weights") == {"w1": 8, "w2": 4, "w3": 4, "w4": 8}
        # Sums stay at 8 bits and are requantized for the convolutions that read them.
        assert set(bits(plan, "activations").values()) == {8}
        assert bits(plan, "requants") == {"Conv_2:0": 4, "Conv_5:0": 4}
        assert plan.int_biases["b2"] == ("Conv_2:0", "w2")
        assert any("Conv_0" in note and "Gemm_9" in note for note in plan.notes)
        assert any("residual sums" in note for note in plan.notes)

    def test_first_and_last_can_be_treated_like_the_others(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual, wbits=4, abits=4, first_last_bits=None)
        assert set(bits(plan, "weights").values()) == {4}
        assert bits(plan, "activations")["x"] == 4
        assert bits(plan, "activations")["p"] == 4

    def test_avx2_lowers_weights_to_7_bits_and_says_so(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual, target="onnxruntime-avx2")
        assert {entry.qmax for entry in plan.weights.values()} == {63}
        assert any("7 instead of 8" in note for note in plan.notes)


class TestSums:
    """A sum that is the end of a convolution's kernel."""

    def test_the_convolution_in_front_of_it_is_not_stored(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual, target="openvino")
        assert set(plan.activations) == {"x", "r", "t", "u", "p"}  # c and d are added as they are
        assert set(plan.weights) == {"w1", "w2", "w3", "w4"}
        assert plan.int_biases["b2"] == ("r", "w2")
        assert plan.floats == {}

    def test_of_two_convolutions_the_later_one(self, bench: Any) -> None:
        body = f"a = Conv {KEEP} (x, w1, b1) b = Conv {KEEP} (x, w2, b2) s = Add (a, b) y = Conv {KEEP} (s, w3, b3)"
        plan = bench.place(bench.model(bench.graph(body), **weights(3)), target="openvino")
        assert set(plan.activations) == {"x", "a", "s", "y"}

    def test_a_result_that_something_else_reads_is_stored(self, bench: Any) -> None:
        body = f"a = Conv {KEEP} (x, w1, b1) s = Add (a, x) c = Conv {KEEP} (a, w2, b2) z = Add (s, c)"
        body += f" y = Conv {KEEP} (z, w3, b3)"
        plan = bench.place(bench.model(bench.graph(body), **weights(3)), target="openvino")
        assert "a" in plan.activations
        assert "c" not in plan.activations

    def test_a_convolution_added_to_itself_is_stored(self, bench: Any) -> None:
        body = f"a = Conv {KEEP} (x, w1, b1) s = Add (a, a) y = Conv {KEEP} (s, w2, b2)"
        assert "a" in bench.place(bench.model(bench.graph(body), **weights(2)), target="openvino").activations


class TestOverrides:
    def test_bits_by_name_and_by_type_where_the_later_wins(self, bench: Any, residual: ir.Model) -> None:
        overrides = (Override(op_type="Conv", wbits=5, abits=6), Override(node="Conv_2", wbits=3))
        plan = bench.place(residual, overrides=overrides)
        assert bits(plan, "weights") == {"w1": 5, "w2": 3, "w3": 5, "w4": 8}
        assert bits(plan, "activations")["x"] == 6
        assert bits(plan, "requants") == {"Conv_2:0": 6, "Conv_5:0": 6}

    def test_float(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual, overrides=(Override(node="Conv_5", float_=True),))
        assert plan.floats["Conv_5"] == "the configuration keeps it in float"
        assert "w3" not in plan.weights
        # The Add behind it still has one integer input and an integer reader.
        assert "d" in plan.activations

    def test_symmetric_applies_to_the_stored_output_also_behind_a_relu(self, bench: Any, residual: ir.Model) -> None:
        plan = bench.place(residual, overrides=(Override(node="Conv_0", symmetric=True),))
        assert [name for name, entry in plan.activations.items() if entry.symmetric] == ["r"]

    def test_nothing_selected_is_an_error(self, bench: Any, residual: ir.Model) -> None:
        with pytest.raises(ConfigError, match="conv_99"):
            bench.place(residual, overrides=(Override(node="conv_99", wbits=4),))


class TestRegions:
    def test_elementwise_nodes_between_float_nodes_stay_in_float(self, bench: Any) -> None:
        body = "m = MatMul (x, w) a = Add (m, x) y = LayerNormalization (a, g)"
        model = bench.model(
            bench.graph(body, inputs="float[N,4] x", outputs="float[N,4] y"),
            w=np.eye(4, dtype=np.float32),
            g=np.ones(4, np.float32),
        )
        plan = bench.place(model)
        assert set(plan.activations) == {"x"}
        assert plan.floats["Add_1"] == "nothing that it reads comes from an integer operator"
        assert "variance" in plan.floats["LayerNormalization_2"]

    def test_elementwise_node_before_an_output_stays_in_float(self, bench: Any) -> None:
        model = bench.model(bench.graph(f"c = Conv {KEEP} (x, w1, b1) y = Sub (x, c)"), **weights(1))
        plan = bench.place(model)
        assert set(plan.activations) == {"x", "c"}
        assert plan.floats == {"Sub_1": "nothing that reads it runs on integers"}

    def test_attention_quantizes_both_inputs_in_front_of_reshape_and_transpose(self, bench: Any) -> None:
        body = """
            q = MatMul (x, wq)
            k = MatMul (x, wk)
            kb = Add (k, bk)
            kr = Reshape (kb, s)
            kt = Transpose <perm = [0, 2, 1]> (kr)
            qk = MatMul (q, kt)
            y = Softmax (qk)
        """
        eye = np.eye(4, dtype=np.float32)
        model = bench.model(
            bench.graph(body, inputs="float[N,5,4] x", outputs="float[N,5,5] y"),
            wq=eye,
            wk=eye.copy(),
            bk=np.ones(4, np.float32),
            s=np.array([0, 5, 4]),
        )
        plan = bench.place(model)
        assert set(plan.activations) == {"x", "q", "kb"}
        assert plan.shared == {"kr": "kb", "kt": "kb"}
        # onnxruntime joins MatMul and Add to a Gemm, so the vector is a bias.
        assert plan.int_biases == {"bk": ("x", "wk")}
        assert set(plan.floats) == {"Add_2", "Softmax_6"}

    def test_pass_through_node_whose_output_is_read_in_float_keeps_precision(self, bench: Any) -> None:
        body = "n = Erf (x) r = Reshape (n, s) m = MatMul (r, w) y = Add (m, r)"
        model = bench.model(
            bench.graph(body, inputs="float[N,4] x", outputs="float[a,4] y"),
            s=np.array([-1, 4]),
            w=np.eye(4, dtype=np.float32),
        )
        plan = bench.place(model)
        assert set(plan.activations) == {"r"}
        assert "Reshape_1" in plan.floats

    def test_squeeze_and_excite_runs_on_integers(self, bench: Any) -> None:
        body = f"""
            c = Conv {KEEP} (x, w1, b1)
            p = GlobalAveragePool (c)
            e = Conv (p, we, b2)
            h = HardSigmoid (e)
            m = Mul (c, h)
            y = Conv {KEEP} (m, w3, b3)
        """
        arrays = weights(3, we=np.ones((4, 4, 1, 1), np.float32))
        del arrays["w2"]
        plan = bench.place(bench.model(bench.graph(body), **arrays))
        assert set(plan.activations) == {"x", "c", "p", "e", "h", "m", "y"}
        assert plan.floats == {}

    def test_softmax_stays_in_float_with_its_reason(self, bench: Any) -> None:
        model = bench.model(bench.graph(f"c = Conv {KEEP} (x, w1, b1) y = Softmax (c)"), **weights(1))
        assert "small outputs" in bench.place(model).floats["Softmax_1"]

    def test_unknown_domains_and_operators_are_named(self, bench: Any) -> None:
        model = bench.model(bench.graph(f"c = Conv {KEEP} (x, w1, b1) t = Tanh (c) y = Neg (t)"), **weights(1))
        node = next(node for node in model.graph if node.op_type == "Neg")
        node.domain = "com.example"
        floats = bench.place(model).floats
        assert floats["Tanh_1"] == "target onnxruntime has no integer form of Tanh"
        assert "com.example::Neg" in floats["Neg_2"]


class TestTensorsThatAreNotQuantized:
    def test_integers_and_shapes(self, bench: Any) -> None:
        body = f"""
            c = Conv {KEEP} (x, w1, b1)
            n = Shape (c)
            n2 = Gather (n, i)
            y = Reshape (c, n2)
        """
        plan = bench.place(bench.model(bench.graph(body), **weights(1, i=np.arange(4))))
        assert set(plan.activations) == {"x", "c"}
        assert set(plan.floats) == {"Reshape_3"}

    def test_computed_weight(self, bench: Any) -> None:
        model = bench.model(bench.graph("y = Conv (x, k)", inputs="float[N,4,8,8] x, float[4,4,3,3] k"))
        plan = bench.place(model)
        assert plan.floats == {"Conv_0": "its weight is computed at run time"}
        assert plan.activations == {}

    def test_other_float_types(self, bench: Any) -> None:
        text = bench.graph("y = Conv (x, w)", inputs="double[N,4,8,8] x", outputs="double[a,b,c,d] y")
        model = bench.model(text, w=CONV.astype(np.float64))
        assert bench.place(model).floats == {"Conv_0": "it does not compute in float32"}

    def test_subgraphs(self, bench: Any) -> None:
        text = bench.graph(
            f"""
            c = Conv {KEEP} (x, w1, b1)
            y = If <then_branch = t () => (float[a,b,c,d] p) {{ p = Relu (c) }},
                    else_branch = e () => (float[a,b,c,d] q) {{ q = Add (c, c) }}> (flag)
            """,
            inputs="float[N,4,8,8] x, bool flag",
        )
        proto = onnx.parser.parse_model(text)
        for name, array in weights(1).items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        for index, node in enumerate(model.graph.all_nodes()):
            node.name = f"{node.op_type}_{index}"
        plan = bench.place(model)
        assert plan.floats["If_1"] == "it holds subgraphs, which stay in float"
        assert plan.floats["If_1/Relu_2"] == "it is inside a subgraph"
        assert set(plan.activations) == {"x", "c"}

    def test_empty_graph(self, bench: Any) -> None:
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 17}, name="empty"), ir_version=8)
        plan = bench.place(model)
        assert (plan.activations, plan.weights, plan.floats) == ({}, {}, {})


class TestWeights:
    @pytest.mark.parametrize(
        ("node", "shape", "axis"),
        [
            ("Gemm <transB = 1> (x, w, b)", (3, 4), 0),
            ("Gemm (x, w, b)", (4, 3), 1),
            ("Gemm <transA = 1> (x, w, b)", (5, 3), 1),
            ("MatMul (x, w)", (4, 3), 1),
            ("MatMul (x, w)", (4,), None),
        ],
    )
    def test_channel_axis(self, bench: Any, node: str, shape: tuple[int, ...], axis: int | None) -> None:
        outputs = "float[a] y" if len(shape) == 1 else "float[a,b] y"
        text = bench.graph(f"y = {node}", inputs="float[5,4] x", outputs=outputs)
        arrays = {"w": np.ones(shape, np.float32)}
        if "Gemm" in node:
            arrays["b"] = np.ones(3, np.float32)
        assert bench.place(bench.model(text, **arrays)).weights["w"].axis == axis

    @pytest.mark.parametrize(("group", "axis"), [(1, 1), (2, None)])
    def test_conv_transpose(self, bench: Any, group: int, axis: int | None) -> None:
        text = bench.graph(f"y = ConvTranspose <group = {group}> (x, w)")
        plan = bench.place(bench.model(text, w=np.ones((4, 2, 3, 3), np.float32)))
        assert plan.weights["w"].axis == axis

    def test_constant_left_operand_is_unsigned(self, bench: Any) -> None:
        text = bench.graph("y = MatMul (w, x)", inputs="float[4,5] x", outputs="float[3,5] y")
        spec = bench.place(bench.model(text, w=np.ones((3, 4), np.float32))).weights["w"]
        assert (spec.signed, spec.symmetric, spec.axis) == (False, True, None)


class TestConcat:
    BODY = f"""
        a = Conv {KEEP} (x, w1, b1)
        ra = Relu (a)
        b = Conv {KEEP} (x, w2, b2)
        m = Concat <axis = 1> (ra, b)
        y = Conv {KEEP} (m, w3, b3)
    """

    @pytest.fixture
    def model(self, bench: Any) -> Any:
        return bench.model(bench.graph(self.BODY), **weights(2, w3=np.ones((4, 8, 3, 3), np.float32), b3=BIAS))

    def test_inputs_have_their_own_scales(self, bench: Any, model: ir.Model) -> None:
        assert set(bench.place(model).activations) == {"x", "ra", "b", "m", "y"}

    def test_inputs_can_share_the_output_scale(self, bench: Any, model: ir.Model) -> None:
        concat = next(node for node in model.graph if node.op_type == "Concat")
        plan = share_concat(bench.place(model), concat)
        assert set(plan.activations) == {"x", "m", "y"}
        assert plan.shared == {"ra": "m", "b": "m"}

    def test_another_width_or_an_undecided_input_is_left_alone(self, bench: Any, model: ir.Model) -> None:
        concat = next(node for node in model.graph if node.op_type == "Concat")
        plan = bench.place(model, abits=4, first_last_bits=None)
        assert share_concat(plan, concat) is plan


class TestBounds:
    @pytest.mark.parametrize(
        ("body", "bounds"),
        [
            ("y = Relu (x)", (0.0, np.inf)),
            ("y = Clip (x, lo, hi)", (-1.0, 6.0)),
            ("y = Clip (x, , hi)", (-np.inf, 6.0)),
            ("a = Clip (x, lo, hi) y = Relu (a)", (0.0, 6.0)),
            ("a = Relu (x) b = MaxPool <kernel_shape = [2, 2]> (a) y = Transpose (b)", (0.0, np.inf)),
            ("a = Sigmoid (x) y = Concat <axis = 1> (a, x)", (-np.inf, np.inf)),
            ("a = Sigmoid (x) b = Clip (x, lo, hi) y = Concat <axis = 1> (a, b)", (-1.0, 6.0)),
            ("a = Sigmoid (x) y = GlobalAveragePool (a)", (0.0, 1.0)),
            ("y = HardSwish (x)", (-0.375, np.inf)),
            ("y = Neg (x)", (-np.inf, np.inf)),
        ],
    )
    def test_bounds_follow_from_the_graph(self, bench: Any, body: str, bounds: tuple[float, float]) -> None:
        constants = {"lo": np.float32(-1), "hi": np.float32(6)}
        model = bench.model(bench.graph(body), **{k: v for k, v in constants.items() if f" {k}" in body})
        assert activation_bounds(model, "y") == bounds
        assert activation_bounds(model, "x") == (-np.inf, np.inf)

    def test_unknown_value(self, bench: Any) -> None:
        with pytest.raises(KeyError):
            activation_bounds(bench.model(bench.graph("y = Relu (x)")), "z")


def test_missing_types_are_inferred(bench: Any, residual: ir.Model) -> None:
    expected = bench.place(residual)
    for node in residual.graph:
        for value in node.outputs:
            value.type = None
    assert bench.place(residual) == expected


def test_minilm_quantizes_exactly_its_matrix_products(bench: Any, shared_data: pathlib.Path) -> None:
    model = bench.real_model(shared_data, "minilm")
    plan = bench.place(model)
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 48
    assert not {node.name for node in products} & set(plan.floats)
    assert (len(plan.weights), len(plan.int_biases)) == (36, 36)
    elementwise = {node.name for node in model.graph if node.op_type in ("Add", "Mul", "Sub", "Div", "Softmax")}
    elementwise = {name for name in elementwise if name in plan.floats}
    assert len(elementwise) >= 40
