"""Values of all samples: in memory up to the limit, in a file beyond it, gone afterwards."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from postquant.calib.learn.sample_arrays import SampleArrays, Spool
from postquant.runtime_ops.errors import OutputError


def arrays(count: int = 6) -> list[npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 3, 5)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("memory", [0, 100, 10_000])
def test_samples_come_back_whatever_fits_into_memory(tmp_path: pathlib.Path, memory: int) -> None:
    given = arrays()
    spool = Spool(tmp_path, memory)
    kept = SampleArrays(spool)
    for array in given:
        kept.append(array)
    in_memory = memory // given[0].nbytes
    assert spool.spilled == max(len(given) - in_memory, 0) * given[0].nbytes
    assert len(kept) == len(given)
    assert kept.shape(2) == (1, 3, 5)
    chosen = [4, 0, 5]
    assert np.array_equal(kept.take(chosen).numpy(), np.concatenate([given[i] for i in chosen]))
    assert np.array_equal(kept.take(torch.tensor(chosen)).numpy(), np.concatenate([given[i] for i in chosen]))
    spool.close()


def test_what_is_taken_belongs_to_the_caller(tmp_path: pathlib.Path) -> None:
    spool = Spool(tmp_path, 1000)
    kept = SampleArrays(spool)
    kept.append(np.ones((1, 2), np.float32))
    kept.take([0]).zero_()
    assert kept.take([0]).tolist() == [[1.0, 1.0]]


def test_types_and_scalars(tmp_path: pathlib.Path) -> None:
    spool = Spool(tmp_path, 0)
    whole, single = SampleArrays(spool), SampleArrays(spool)
    for number in range(3):
        whole.append(np.array([[number, -number]], np.int64))
        single.append(np.array(number, np.float32))
    assert whole.take([2, 1]).dtype == torch.int64
    assert whole.take([2, 1]).tolist() == [[2, -2], [1, -1]]
    assert single.take([2, 1]).tolist() == [2.0, 1.0]
    spool.close()


def test_the_file_has_no_name(tmp_path: pathlib.Path) -> None:
    spool = Spool(tmp_path, 0)
    spool.put(np.ones(100, np.float32))
    assert spool.spilled == 400
    assert list(tmp_path.iterdir()) == []
    spool.close()


def test_no_room_is_told_in_a_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OutputError, match="cannot be set aside"):
        Spool(tmp_path / "missing", 0).put(np.ones(10, np.float32))
