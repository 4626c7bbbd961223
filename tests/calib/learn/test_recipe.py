"""Large networks get smaller batches, fewer steps, and none of all layers together where too few would be left."""

from postquant.calib.learn.recipe import Effort, network_recipe, recipe_for

RESNET_20, MOBILENET_V2, RESNET_50 = 4.1e7, 3e8, 4.1e9


def test_a_step_and_a_block_cost_about_the_same_whatever_the_network() -> None:
    small, middle, large = (recipe_for(Effort.FAST, work) for work in (RESNET_20, MOBILENET_V2, RESNET_50))
    assert (small.iterations, small.batch) == (500, 32)
    assert (middle.iterations, middle.batch) == (250, 10)
    assert (large.iterations, large.batch) == (200, 8)
    assert recipe_for(Effort.FAST, 0.0).iterations == 500


def test_more_effort_never_means_less() -> None:
    for work in (0.0, RESNET_20, MOBILENET_V2, RESNET_50):
        steps = [recipe_for(effort, work).iterations for effort in Effort]
        assert steps == sorted(steps)


def test_the_whole_network_is_learned_where_the_effort_allows_enough_steps() -> None:
    small, middle = (network_recipe(Effort.FAST, work) for work in (RESNET_20, MOBILENET_V2))
    assert small is not None
    assert middle is not None
    assert (small.iterations, middle.iterations) == (1000, 500)
    assert network_recipe(Effort.FAST, RESNET_50) is None
    assert network_recipe(Effort.NORMAL, RESNET_50) is not None
