"""Learning and judging samples are disjoint, and batches hold samples of equal shapes."""

import torch

from postquant.calib.learn.recipe import judging_samples
from postquant.calib.learn.sample_split import SampleSplit


def _split(groups: list[list[int]], seed: int = 0) -> SampleSplit:
    return SampleSplit(groups, judging_samples(sum(map(len, groups)), 0.25), torch.Generator().manual_seed(seed))


def test_batches_come_from_one_group_and_never_from_judging_samples() -> None:
    groups = [list(range(12)), list(range(12, 16))]
    split = _split(groups)
    judging = {index for part in split.judging(3) for index in part}
    assert judging == {2, 6, 10, 14}
    seen = set()
    for _ in range(100):
        batch = split.batch(5)
        assert len(set(batch)) == len(batch) <= 5
        assert any(set(batch) <= set(group) for group in groups)
        seen.update(batch)
    assert seen == set(range(16)) - judging


def test_judging_parts_hold_at_most_so_many() -> None:
    assert [len(part) for part in _split([list(range(40))]).judging(4)] == [4, 4, 2]


def test_a_single_sample_does_both() -> None:
    split = _split([[0]])
    assert split.batch(4) == [0]
    assert list(split.judging(4)) == [[0]]
    assert split.few() == [0]


def test_equal_seeds_give_equal_batches() -> None:
    first, again, other = (_split([list(range(40))], seed) for seed in (1, 1, 2))
    batches = [[split.batch(8) for _ in range(5)] for split in (first, again, other)]
    assert batches[0] == batches[1] != batches[2]
