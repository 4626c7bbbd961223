"""What elements count is the mean squared gradient of the outputs, and learning goes by it."""

import math
import pathlib

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from postquant.calib.input_spec import input_specs
from postquant.calib.learn import fisher
from postquant.calib.learn.block_cache import BlockCache
from postquant.calib.learn.block_objective import BlockObjective
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.fisher import Importance, measure_importance
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.recipe import Recipe
from postquant.calib.learn.visible import Visible
from postquant.calib.observers import MinMax
from postquant.calib.open_source import open_source
from postquant.calib.ranges import method_ranges
from postquant.calib.weight_start import start_weights
from postquant.passes.blocks import cut_blocks
from postquant.passes.place import PlacementSettings, place
from postquant.passes.target import load_target

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
W0, W1, W2 = (RNG.standard_normal(shape).astype(np.float32) for shape in [(4, 3, 3, 3), (4, 4, 3, 3), (4, 6)])
IMAGES = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, H, W] x) => (float[N, M] y) <float[4, 3, 3, 3] w0, float[4, 4, 3, 3] w1, float[4, K] w2> {
      c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)
      r0 = Relu (c0)
      c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1)
      a = Add (c1, r0)
      p = GlobalAveragePool (a)
      f = Flatten (p)
      t = Tanh (f)
      y = MatMul (t, w2)
    }
"""


def _model(text: str, **constants: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(proto)


def _measure(model: ir.Model, names: list[str], xs: list[np.ndarray], seed: int = 0) -> Importance:
    source = open_source([{"x": x.astype(np.float32)} for x in xs], input_specs(model))
    return measure_importance(model, names, source, range(len(xs)), seed=seed, device=CPU)


def _images(count: int = 60, size: int = 5) -> list[np.ndarray]:
    return [RNG.standard_normal((1, 3, size, size)) for _ in range(count)]


def _float_network(x: torch.Tensor, w2: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r0 = torch.nn.functional.conv2d(x, torch.from_numpy(W0), padding=1).relu().requires_grad_()
    a = torch.nn.functional.conv2d(r0, torch.from_numpy(W1), padding=1) + r0
    return r0, a, a.mean((2, 3)).tanh() @ torch.from_numpy(w2)


def _squared_jacobians(xs: list[np.ndarray], w2: np.ndarray) -> list[np.ndarray]:
    """Mean over samples of the sum over outputs of squared derivatives, in units of its mean, for r0 and a."""
    total = [np.zeros((1, 4, 5, 5)), np.zeros((1, 4, 5, 5))]
    for x in xs:
        r0, a, y = _float_network(torch.from_numpy(x.astype(np.float32)), w2)
        for output in y[0]:
            for index, gradient in enumerate(torch.autograd.grad(output, [r0, a], retain_graph=True)):
                total[index] += gradient.numpy().astype(float) ** 2
    return [found / found.mean() for found in total]


def test_with_one_output_it_is_the_mean_squared_gradient() -> None:
    xs = _images(20)
    found = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2[:, :1]), ["r0", "a"], xs)
    assert not found.reasons
    for name, expected in zip(["r0", "a"], _squared_jacobians(xs, W2[:, :1]), strict=True):
        np.testing.assert_allclose(found.weights[name].numpy(), expected, rtol=2e-4, atol=1e-5)


def test_with_several_outputs_random_signs_estimate_the_sum_over_them() -> None:
    xs = _images(128)
    found = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2), ["r0", "a"], xs)
    for name, expected in zip(["r0", "a"], _squared_jacobians(xs, W2), strict=True):
        got = found.weights[name].numpy()
        assert got.dtype == np.float32
        assert got.mean() == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(got, expected, rtol=0.6, atol=0.05)
        assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.9


def test_the_same_seed_gives_the_same_bytes() -> None:
    xs, model = _images(8), _model(IMAGES, w0=W0, w1=W1, w2=W2)
    first, again, other = (_measure(model, ["r0"], xs, seed).weights["r0"].numpy() for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_axes_of_different_lengths_are_averaged() -> None:
    xs = [x[..., : 4 + index % 3] for index, x in enumerate(_images(12, size=7))]
    found = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2[:, :1]), ["a"], xs).weights["a"]
    # Behind ``a`` each position counts alike, 1 / 49, 1 / 35 ... of its channel.
    assert found.shape == (1, 4, 7, 1)
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(found[:, :, :1].numpy(), found.shape), rtol=1e-4)


TWO = """
    <ir_version: 8, opset_import: ["" : 17]>
    two (float[N, 3] x) => (float[N, 2] y, float[N, 1] z, float[N, 1] still, int64[N, 1] best)
    <float[3, 3] w, float[3, 2] u, float[3, 1] v, float[3, 1] nothing, float[1] one> {
      h = MatMul (x, w)
      y = MatMul (h, u)
      z = MatMul (h, v)
      n = MatMul (h, nothing)
      still = Add (n, one)
      best = ArgMax <axis = 1> (h)
    }
"""


def test_every_varying_output_counts_the_same_whatever_its_unit() -> None:
    u, v = np.array([[2.0, 0], [0, 3], [0, 0]]), np.array([[0.0], [0], [1]])
    xs = [RNG.standard_normal((1, 3)) for _ in range(200)]
    weights = {"w": np.eye(3), "u": u, "nothing": np.zeros((3, 1)), "one": np.ones(1)}
    found = [_measure(_model(TWO, v=v * unit, **weights), ["h"], xs).weights["h"].numpy() for unit in (1, 1000)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
    # Each column of h reaches one output only, so that no sign matters.
    used = np.stack(xs)[:, 0][[200 * index // 128 for index in range(128)]]
    y = used @ u
    expected = np.array([4 / (2 * y.var()), 9 / (2 * y.var()), 1 / (used @ v).var()])
    np.testing.assert_allclose(found[0][0], expected / expected.mean(), rtol=0.05)


HARD = """
    <ir_version: 8, opset_import: ["" : 17]>
    hard (float[1, 4] x) => (float[1, 4] y) <float[4, 4] w> {
      h = MatMul (x, w)
      k = Hardmax (h)
      g = MatMul (k, w)
      s = Sign (g)
      y = MatMul (s, w)
    }
"""


def test_a_value_without_a_gradient_has_a_reason() -> None:
    weights = {"w": RNG.standard_normal((4, 4))}
    found = _measure(_model(HARD, **weights), ["h", "g", "s"], [np.ones((1, 4))] * 3)
    # What torch does not run in front of a value does no harm.
    assert list(found.weights) == ["s"]
    assert found.reasons == {
        "h": "torch does not run what lies behind: operator Hardmax",
        "g": "no output depends smoothly on it",
    }


def _fails(*args: object, **options: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("run_nodes", _fails, "out of memory"), ("_SAME", -1.0, "in torch it differs from onnxruntime")],
)
def test_where_torch_fails_no_value_counts_more_than_another(
    name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, name, value)
    found = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2), ["r0", "a"], _images(3))
    assert not found.weights
    assert [reason in told for told in found.reasons.values()] == [True, True]


BLOCK = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[1, 2, L] x) => (float[1, 2, L] y) <float[2, 2, 1] w> { [conv] y = Conv (x, w) }
"""


@pytest.mark.parametrize("limit", [math.inf, 0.75])
@pytest.mark.parametrize("lengths", [[3], [3, 4]])
def test_errors_of_a_block_are_weighed(lengths: list[int], limit: float, tmp_path: pathlib.Path) -> None:
    weight = RNG.standard_normal((2, 2, 1)).astype(np.float32) * [[[1.0]], [[4.0]]]
    model = _model(BLOCK, w=weight)
    xs = [RNG.standard_normal((1, 2, lengths[index % len(lengths)])).astype(np.float32) for index in range(12)]
    source = open_source([{"x": x} for x in xs], input_specs(model))
    plan = place(model, load_target("onnxruntime"), PlacementSettings(wbits=2, abits=2))
    plan = start_weights(model, method_ranges(model, plan, source, MinMax()).plan)
    (block,) = cut_blocks(model, {"conv"})
    recipe = Recipe(iterations=1, batch=4)
    nodes = list(model.graph)
    quantizers = BlockQuantizers(model, plan, nodes, frozenset(), recipe, CPU)
    weights = torch.tensor([[[0.5, 0.1, 0.3], [2.0, 1.1, 2.0]]])
    fitting = weights if lengths == [3] else weights.mean(2, keepdim=True)
    cache = BlockCache(model, (block,), source, tmp_path, memory=1 << 20)
    with ParallelSteps(1) as steps, cache.load(block, plan) as samples:
        parts = [index for index in range(12) if xs[index].shape[2] == 3][:4]

        def objective(importance: torch.Tensor | None) -> BlockObjective:
            return BlockObjective(nodes, "y", samples, 4, CPU, steps, Visible(high=limit), importance)

        plain, counted = objective(None), objective(weights)
        with torch.no_grad():
            got = plain.run(plain.inputs(parts), quantizers.reader(), ("y",))["y"].numpy()
        exact = np.concatenate([np.einsum("oi,nil->nol", weight[..., 0], xs[index]) for index in parts])
        # What lies above the limit in both networks is no error.
        error = np.where(exact >= limit, np.minimum(got - limit, 0), got - exact)
        square = np.square(error, dtype=np.float64) / plain.variance
        expected = float((square * fitting.numpy()).mean())
        assert expected != pytest.approx(square.mean(), rel=1e-2)
        (item,) = counted.items(parts, None)
        loss, count = counted.loss(item, quantizers.constants(), quantizers)
        assert count == 4
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            judged = counted.judged_sums(parts, quantizers.reader())
        assert judged == pytest.approx((expected * got.size, square.sum(), got.size), rel=1e-4)
        # The springs' curvature is that of the same loss: a unit of this output counts 1.
        root = counted.output(parts, quantizers.reader()).detach().numpy()
        np.testing.assert_allclose(root, np.minimum(got, limit) * np.sqrt(fitting.numpy()), rtol=1e-5)
