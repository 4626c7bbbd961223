"""The stiffness is the second derivative of the loss, and springs of that stiffness let weights rest."""

import itertools

import numpy as np
import pytest
import torch

from postquant.calib.learn.curvature import measure_stiffness
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.recipe import Rounding
from postquant.calib.learn.weights import WeightQuantizer, weight_quantizer
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
SCALES = np.array([0.5, 1.0, 2.0], np.float32)
VARIANCE = 3.0


def _weight(values: np.ndarray) -> WeightQuantizer:
    spec = QuantSpec(4, signed=True, symmetric=True, axis=0, narrow=True)
    return weight_quantizer(Rounding.FREE, values, TensorQuantizer(spec, SCALES, np.zeros(3, np.int32)), CPU)


@pytest.mark.parametrize("threads", [1, 2])
def test_stiffness_of_a_linear_layer_is_that_of_its_formula(threads: int) -> None:
    rng = np.random.default_rng(0)
    weight = _weight(rng.standard_normal((3, 5)).astype(np.float32))
    x = torch.from_numpy((rng.standard_normal((400, 5)) * [1, 2, 3, 4, 0]).astype(np.float32))
    with ParallelSteps(threads) as steps:
        measure_stiffness(
            {"w": weight},
            lambda part, constants: x[part] @ constants["w"].mT,
            lambda: [range(130), range(130, 400)],
            VARIANCE,
            torch.Generator().manual_seed(0),
            steps,
        )
    # y_ij = sum_k x_ik s_j u_jk has dy_ij / du_jk = s_j x_ik; the loss is a mean over 400 x 3 elements.
    expected = 2 / (1200 * VARIANCE) * np.square(SCALES)[:, None] * np.square(x.numpy()).sum(axis=0)
    got = weight.stiffness.numpy()
    assert got.shape == (3, 5)
    assert np.all(got[:, 4] == 0)
    np.testing.assert_allclose(got[:, :4], expected[:, :4], rtol=1.5)
    np.testing.assert_allclose((got[:, :4] / expected[:, :4]).mean(), 1.0, atol=0.25)


def test_with_springs_codes_rest_at_the_smallest_error() -> None:
    target = torch.tensor([[0.9, -1.2], [1.3, 0.1], [-2.2, 3.4]])  # in units of the scales: 1.8 -2.4 1.3 0.1 -1.1 1.7
    best = torch.tensor([[2.0, -2.0], [1.0, 0.0], [-1.0, 2.0]])

    def changes(damping: float) -> tuple[int, bool]:
        weight = _weight(np.zeros((3, 2), np.float32))
        weight.stiffness = torch.from_numpy(2 * np.square(SCALES))[:, None].expand(3, 2)
        optimizer = torch.optim.Adam([weight.variable], lr=0.02)
        codes = []
        for _ in range(400):
            loss = (weight.simulate(hard=False) - target).square().sum() + damping * weight.regulariser(2.0)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            codes.append(weight.levels())
        late = codes[200:]
        return sum(int((a != b).sum()) for a, b in itertools.pairwise(late)), bool((codes[-1] == best).all())

    assert changes(1.0) == (0, True)
    assert changes(0.0)[0] > 0
