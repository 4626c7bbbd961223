"""Places of cells in torch are those of the law, and levels learned across them are the law's."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import pytest
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import feedback_of
from postquant.calib.learn import native_levels
from postquant.calib.learn.cells import existing_places, in_cells, out_of_cells
from postquant.calib.learn.levels import LevelsActivation
from postquant.calib.learn.quantizers import DropMasks
from postquant.runtime_ops import law_feedback
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
CHANNELS = 5
PLANES = [(4, 6), (5, 7), (1, 1), (13, 13)]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("cell", [2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_they_are_those_of_the_law_and_come_back(plane: tuple[int, int], cell: int, last: bool) -> None:
    x = RNG.standard_normal((3, CHANNELS, *plane)).astype(np.float32)
    order = torch.channels_last if last else torch.contiguous_format
    tensor = torch.from_numpy(x).to(memory_format=order)
    cells = in_cells(tensor, cell)
    law = law_feedback.in_cells(np.moveaxis(x, 1, 0), cell)
    np.testing.assert_array_equal(cells.numpy(), np.moveaxis(law, 0, 1))
    back = out_of_cells(cells, cell, tensor)
    assert torch.equal(back, tensor)
    assert back.is_contiguous(memory_format=order)
    np.testing.assert_array_equal(law_feedback.out_of_cells(law, (CHANNELS, 3, *plane)), np.moveaxis(x, 1, 0))
    exists = existing_places(tensor, cell)
    if exists is None:
        assert plane[0] % cell == plane[1] % cell == 0
    else:
        assert torch.equal(exists, in_cells(torch.ones_like(tensor), cell))


def quantizer(cell: int) -> TensorQuantizer:
    """Levels of channels, and coefficients across all places of a cell."""
    spec = QuantSpec(3, signed=False, symmetric=False)
    levels = np.concatenate((np.zeros((CHANNELS, 1)), np.cumsum(RNG.uniform(0.1, 0.5, (CHANNELS, 7)), axis=1)), axis=1)
    size = cell * cell * CHANNELS
    seen = RNG.standard_normal((size // 3, size))
    feedback = feedback_of(seen.T @ seen, np.full(size, 0.02), 0.02, cell)
    return dataclasses.replace(quantizer_with_levels(spec, levels, -3), feedback=feedback)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("native", [False, True])
def test_levels_are_those_of_the_law(plane: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(native_levels, "usable", lambda *_: False)
    given = quantizer(2)
    codes = RNG.integers(0, 256, (3, CHANNELS, *plane))
    x = ((codes - int(given.zero_point)) * given.scale).astype(np.float32)
    activation = LevelsActivation(given, CPU)
    got = activation.simulate(torch.from_numpy(x), None).detach().numpy()
    np.testing.assert_allclose(got, given.simulate(x), atol=1e-5)
    learned = activation.learned()
    assert learned.feedback is given.feedback
    # What is left out stays, and nobody makes up for it.
    masks = cast(DropMasks, type("None", (), {"like": staticmethod(torch.zeros_like)}))
    np.testing.assert_array_equal(activation.simulate(torch.from_numpy(x), masks).detach().numpy(), x)
    every = cast(DropMasks, type("All", (), {"like": staticmethod(torch.ones_like)}))
    np.testing.assert_array_equal(activation.simulate(torch.from_numpy(x), every).detach().numpy(), got)


def test_gradients_pass_as_without_cells() -> None:
    """Rounding and shifts pass them inside the levels' range; levels get those of all their places."""
    given = quantizer(2)
    x = torch.from_numpy(RNG.uniform(0.05, 0.6, (2, CHANNELS, 5, 4)).astype(np.float32)).requires_grad_()
    upstream = torch.from_numpy(RNG.standard_normal(tuple(x.shape)).astype(np.float32))
    activation = LevelsActivation(given, CPU)
    torch.autograd.backward(activation.simulate(x, None), upstream)
    assert x.grad is not None
    inside = x.grad != 0
    assert inside.float().mean() > 0.9
    assert torch.equal(x.grad[inside], upstream[inside])
    factor = activation.scale.factor
    assert factor.grad is not None
    assert factor.grad.shape == (CHANNELS, 7)
    assert (factor.grad.abs().sum(1) > 0).all()
