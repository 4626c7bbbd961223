"""Large networks get smaller batches, fewer steps, and none of all layers together where too few would be left."""

import math

import pytest

from postquant.calib.learn.recipe import Effort, Recipe, block_recipe, network_recipe, recipe_for
from postquant.calib.work import ForwardWork

RESNET_20, MOBILENET_V2, RESNET_50 = (ForwardWork(products) for products in (4.1e7, 3e8, 4.1e9))
# An image out for an image in.
DENOISER = ForwardWork(1.8e10, 180 * 180)


def test_all_steps_together_cost_about_the_same_whatever_the_network() -> None:
    small, middle, large = (recipe_for(Effort.FAST, work) for work in (RESNET_20, MOBILENET_V2, RESNET_50))
    assert (small.iterations, small.batch) == (500, 32)
    assert (middle.iterations, middle.batch) == (500, 5)
    assert (large.iterations, large.batch) == (200, 4)
    assert recipe_for(Effort.FAST, ForwardWork(0.0)).iterations == 500


@pytest.mark.parametrize(("positions", "batch"), [(1, 8), (49, 8), (56, 7), (121, 4), (391, 2), (392, 1), (32400, 1)])
def test_a_batch_shows_every_layer_of_a_block_enough_positions(positions: int, batch: int) -> None:
    large = recipe_for(Effort.FAST, ForwardWork(1e12, 180 * 180))
    assert large.batch == 1
    assert block_recipe(large, positions, 8, 8, 1e3).batch == batch
    small = recipe_for(Effort.FAST, RESNET_20)
    assert block_recipe(small, positions, 8, 8, 1e3).batch == small.batch == 32


@pytest.mark.parametrize(("bits", "keep"), [(2, 1.0), (3, 1.0), (4, 0.5), (8, 0.5)])
def test_masks_are_for_activations_of_at_least_4_bits(bits: int, keep: float) -> None:
    assert block_recipe(recipe_for(Effort.FAST, RESNET_20), 64, bits, 8, 1e3).keep == keep
    assert block_recipe(Recipe(100), 64, bits, 8, 1e3).keep == 1.0


@pytest.mark.parametrize(("rows", "exact"), [(0.2, True), (31.9, True), (32.0, False), (math.inf, False)])
def test_blocks_that_see_few_rows_get_exact_inputs(rows: float, exact: bool) -> None:
    assert block_recipe(Recipe(100), 49, 4, 4, rows).exact == exact
    assert block_recipe(Recipe(100, exact=True), 49, 4, 4, rows).exact


@pytest.mark.parametrize(("bits", "weight_bits"), [(3, 8), (4, 3), (8, 2)])
def test_what_less_than_4_bits_make_of_inputs_is_not_hidden(bits: int, weight_bits: int) -> None:
    assert not block_recipe(Recipe(100), 49, bits, weight_bits, 0.2).exact


def test_what_a_network_can_afford_does_not_depend_on_positions() -> None:
    assert recipe_for(Effort.FAST, ForwardWork(3e8, 10**6)) == recipe_for(Effort.FAST, MOBILENET_V2)


def test_more_effort_never_means_less() -> None:
    for work in (ForwardWork(0.0), RESNET_20, MOBILENET_V2, RESNET_50, DENOISER):
        steps = [recipe_for(effort, work).iterations for effort in Effort]
        assert steps == sorted(steps)


def test_the_whole_network_is_learned_where_the_effort_allows_enough_steps() -> None:
    small, middle = (network_recipe(Effort.FAST, work, 2) for work in (RESNET_20, MOBILENET_V2))
    assert small is not None
    assert middle is not None
    assert (small.iterations, middle.iterations) == (1000, 500)
    assert network_recipe(Effort.FAST, RESNET_50, 2) is None
    assert network_recipe(Effort.NORMAL, RESNET_50, 2) is not None


@pytest.mark.parametrize(("positions", "share"), [(1, 8 / 32), (392, 1 / 32), (392 * 8, 8 / 32), (32400, 1.0)])
def test_noisy_gradients_mean_low_rates(positions: int, share: float) -> None:
    found = network_recipe(Effort.MAX, ForwardWork(4.1e9, positions), 2)
    small = network_recipe(Effort.MAX, RESNET_20, 2)
    assert found is not None
    assert small is not None
    for name in ("rounding_rate", "bias_rate", "weight_scale_rate", "step_rate"):
        assert getattr(found, name) == pytest.approx(share * getattr(small, name))


@pytest.mark.parametrize(("bits", "rates", "steps"), [(3, 1.0, 1000), (4, 0.25, 500), (8, 0.25, 500)])
def test_few_errors_mean_low_rates_and_few_steps_of_the_whole_network(bits: int, rates: float, steps: int) -> None:
    found, coarse = (network_recipe(Effort.FAST, RESNET_20, width) for width in (bits, 2))
    assert found is not None
    assert coarse is not None
    assert found.iterations == steps
    for name in ("rounding_rate", "bias_rate", "weight_scale_rate", "step_rate"):
        assert getattr(found, name) == pytest.approx(rates * getattr(coarse, name))
