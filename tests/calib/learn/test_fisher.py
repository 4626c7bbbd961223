"""Errors count by what they do to the outputs, channels at a place together, and learning goes by it."""

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
from postquant.calib.learn.fisher import Metrics, measure_metrics
from postquant.calib.learn.output_metric import OutputMetric
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


def _measure(model: ir.Model, axes: dict[str, int], xs: list[np.ndarray], seed: int = 0) -> Metrics:
    source = open_source([{"x": x.astype(np.float32)} for x in xs], input_specs(model))
    return measure_metrics(model, axes, source, range(len(xs)), seed=seed, device=CPU)


def _matrix(metric: OutputMetric, shape: tuple[int, ...]) -> np.ndarray:
    """What an error of one place counts, (C, C), found by its energies alone."""
    channels = shape[metric._axis]
    rows = np.eye(channels, dtype=np.float32)

    def energy(row: np.ndarray) -> float:
        moved = np.zeros(np.moveaxis(np.empty(shape), metric._axis, -1).shape, np.float32)
        moved.reshape(-1, channels)[0] = row
        return float(metric.energy(torch.from_numpy(np.ascontiguousarray(np.moveaxis(moved, -1, metric._axis)))))

    own = [energy(row) for row in rows]
    return np.array([[(energy(a + b) - own[i] - own[j]) / 2 for j, b in enumerate(rows)] for i, a in enumerate(rows)])


def _images(count: int = 60, size: int = 5) -> list[np.ndarray]:
    return [RNG.standard_normal((1, 3, size, size)) for _ in range(count)]


def _float_network(x: torch.Tensor, w2: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r0 = torch.nn.functional.conv2d(x, torch.from_numpy(W0), padding=1).relu().requires_grad_()
    a = torch.nn.functional.conv2d(r0, torch.from_numpy(W1), padding=1) + r0
    return r0, a, a.mean((2, 3)).tanh() @ torch.from_numpy(w2)


def _expected(xs: list[np.ndarray], w2: np.ndarray) -> list[np.ndarray]:
    """H of r0 and of a, with a tenth of its mean diagonal added, in units of that."""
    total = [np.zeros((4, 4)), np.zeros((4, 4))]
    for x in xs:
        r0, a, y = _float_network(torch.from_numpy(x.astype(np.float32)), w2)
        for output in y[0]:
            for index, gradient in enumerate(torch.autograd.grad(output, [r0, a], retain_graph=True)):
                rows = gradient.numpy().astype(float).reshape(4, -1)
                total[index] += rows @ rows.T
    return [_damped(found) for found in total]


def _damped(hessian: np.ndarray) -> np.ndarray:
    result: np.ndarray = (hessian / np.diag(hessian).mean() + 0.1 * np.eye(len(hessian))) / 1.1
    return result


def test_with_one_output_errors_count_by_the_mean_product_of_gradients() -> None:
    xs = _images(20)
    result = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2[:, :1]), {"r0": -3, "a": -3}, xs)
    assert not result.reasons
    for name, expected in zip(["r0", "a"], _expected(xs, W2[:, :1]), strict=True):
        # Directions with a hundredth of the trace are left out.
        np.testing.assert_allclose(_matrix(result.found[name], (1, 4, 5, 5)), expected, atol=0.05)


def test_with_several_outputs_random_signs_estimate_the_sum_over_them() -> None:
    xs = _images(128)
    result = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2), {"r0": -3, "a": -3}, xs)
    for name, expected in zip(["r0", "a"], _expected(xs, W2), strict=True):
        got = _matrix(result.found[name], (1, 4, 5, 5))
        assert np.trace(got) == pytest.approx(4.0, abs=0.05)
        np.testing.assert_allclose(got, expected, atol=0.4)
        assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.9


def test_the_same_seed_gives_the_same_numbers() -> None:
    xs, model = _images(8), _model(IMAGES, w0=W0, w1=W1, w2=W2)
    error = torch.from_numpy(RNG.standard_normal((1, 4, 5, 5)).astype(np.float32))
    first, again, other = (float(_measure(model, {"r0": -3}, xs, seed).found["r0"].energy(error)) for seed in (0, 0, 1))
    assert first == again != other


def test_places_may_differ_in_number_and_channels_may_not() -> None:
    xs = [x[..., : 4 + index % 3] for index, x in enumerate(_images(12, size=7))]
    model = _model(IMAGES, w0=W0, w1=W1, w2=W2[:, :1])
    assert not _measure(model, {"a": -3}, xs).reasons
    assert _measure(model, {"a": -1}, xs).reasons == {"a": "the number of its channels depends on the sample"}


def test_few_places_say_nothing() -> None:
    result = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2), {"f": -1, "a": -3}, _images(12))
    assert list(result.found) == ["a"]
    assert result.reasons == {"f": "12 places are too few for 4 channels"}


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), -3), ((2, 4, 3), -1), ((6, 3), -1), ((2, 3, 4), -2)])
def test_the_energy_is_that_of_the_matrix_and_of_the_image(shape: tuple[int, ...], axis: int) -> None:
    root = RNG.standard_normal((3, 3))
    metric = OutputMetric(torch.from_numpy(root @ root.T + np.eye(3)), axis)
    error = RNG.standard_normal(shape).astype(np.float32)
    rows = np.moveaxis(error, axis, -1).reshape(-1, 3).astype(np.float64)
    expected = np.einsum("pi,ij,pj->", rows, _damped(root @ root.T + np.eye(3)), rows)
    tensor = torch.from_numpy(error)
    assert float(metric.energy(tensor)) == pytest.approx(expected, rel=0.03)
    assert float(metric.image(tensor).square().sum()) == pytest.approx(float(metric.energy(tensor)), rel=1e-5)


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
    found = [_measure(_model(TWO, v=v * unit, **weights), {"h": -1}, xs).found["h"] for unit in (1, 1000)]
    matrices = [_matrix(metric, (1, 3)) for metric in found]
    np.testing.assert_allclose(matrices[0], matrices[1], rtol=1e-3, atol=1e-4)
    # Each column of h reaches one output only, so that no sign matters.
    used = np.stack(xs)[:, 0][[200 * index // 128 for index in range(128)]]
    y = used @ u
    expected = np.array([4 / (2 * y.var()), 9 / (2 * y.var()), 1 / (used @ v).var()])
    np.testing.assert_allclose(np.diag(matrices[0]), np.diag(_damped(np.diag(expected))), rtol=0.05)


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
    result = _measure(_model(HARD, **weights), {"h": -1, "g": -1, "s": -1}, [np.ones((1, 4))] * 16)
    # What torch does not run in front of a value does no harm.
    assert list(result.found) == ["s"]
    assert result.reasons == {
        "h": "torch does not run what lies behind: operator Hardmax",
        "g": "no output depends smoothly on it",
    }


def _fails(*args: object, **options: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("run_nodes", _fails, "out of memory"), ("_SAME", -1.0, "in torch it differs from onnxruntime")],
)
def test_where_torch_fails_errors_count_by_their_squares(
    name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, name, value)
    result = _measure(_model(IMAGES, w0=W0, w1=W1, w2=W2), {"r0": -3, "a": -3}, _images(3))
    assert not result.found
    assert [reason in told for told in result.reasons.values()] == [True, True]


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
    hessian = np.array([[0.5, 0.6], [0.6, 1.5]])
    cache = BlockCache(model, (block,), source, tmp_path, memory=1 << 20)
    with ParallelSteps(1) as steps, cache.load(block, plan) as samples:
        parts = [index for index in range(12) if xs[index].shape[2] == 3][:4]

        def objective(metric: OutputMetric | None) -> BlockObjective:
            return BlockObjective(nodes, "y", samples, 4, CPU, steps, Visible(high=limit), metric)

        plain, counted = objective(None), objective(OutputMetric(torch.from_numpy(hessian), -2))
        with torch.no_grad():
            got = plain.run(plain.inputs(parts), quantizers.reader(), ("y",))["y"].numpy()
        exact = np.concatenate([np.einsum("oi,nil->nol", weight[..., 0], xs[index]) for index in parts])
        # What lies above the limit in both networks is no error.
        error = np.where(exact >= limit, np.minimum(got - limit, 0), got - exact)
        square = np.square(error, dtype=np.float64) / plain.variance
        energy = np.einsum("nil,ij,njl->", error, _damped(hessian), error, dtype=np.float64)
        expected = float(energy / plain.variance / got.size)
        assert expected != pytest.approx(square.mean(), rel=1e-2)
        (item,) = counted.items(parts, None)
        loss, count = counted.loss(item, quantizers.constants(), quantizers)
        assert count == 4
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            judged = counted.judged_sums(parts, quantizers.reader())
        assert judged == pytest.approx((expected * got.size, square.sum(), got.size), rel=1e-4)
        # The springs' curvature is that of the same loss: a unit of this output counts 1.
        image = counted.output(parts, quantizers.reader()).detach().square().sum()
        seen = np.minimum(got, limit)
        assert float(image) == pytest.approx(np.einsum("nil,ij,njl->", seen, _damped(hessian), seen), rel=1e-4)
