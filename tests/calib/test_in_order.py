"""Samples side by side: the order of results, how many are in work, and what an error leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from postquant.calib.in_order import in_order


@pytest.mark.parametrize("threads", [1, 2, 5, 30])
def test_results_keep_the_order_of_the_items(threads: int) -> None:
    def slow(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item * item

    assert list(in_order(slow, range(20), threads)) == [i * i for i in range(20)]
    assert list(in_order(slow, [], threads)) == []


def test_no_more_than_the_threads_are_in_work() -> None:
    lock, running, most, taken = threading.Lock(), [0], [0], [0]

    def items() -> Iterator[int]:
        for item in range(30):
            taken[0] += 1
            yield item

    def work(item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.001)
        with lock:
            running[0] -= 1
        return item

    results = in_order(work, items(), 3)
    assert next(results) == 0
    assert taken[0] == 3, "items are read when they are needed"
    assert list(results) == list(range(1, 30))
    assert 1 < most[0] <= 3


def test_an_error_reaches_the_caller() -> None:
    def fails(item: int) -> int:
        if item == 2:
            raise ValueError("sample 2")
        return item

    results = in_order(fails, range(100), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="sample 2"):
        next(results)
