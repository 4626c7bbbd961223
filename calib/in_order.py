"""Runs samples side by side, with results in the samples' order: :func:`in_order`."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Applies ``work`` to every item, several at a time.

    Sums over samples come out the same with any number of threads, because results keep the items' order. At most
    ``threads`` items are in work, so that memory does not grow with their number.

    Args:
        work: Releases the interpreter's lock most of the time, as a run of onnxruntime does, or nothing is gained.
        items: Taken from the calling thread, when needed.
        threads: How many are worked on at the same time; 1 works in the calling thread.

    Yields:
        Results, in the order of the items.

    >>> list(in_order(abs, [-3, 2, -1], 2))
    [3, 2, 1]
    """
    if threads == 1:
        yield from map(work, items)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
