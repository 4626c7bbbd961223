"""Gradients of a loss over a batch, its parts side by side: :class:`ParallelSteps`.

    L = sum over parts p of L_p        dL/dw = sum over parts p of dL_p/dw, added in the order of the parts

How many threads share a sum changes its last bits, so that a part is computed by one thread. Where a batch is cut
follows from the batch and from what it computes, never from the number of threads or the memory of the machine: any
number of threads gives the same bytes, and fewer threads take the same parts one after the other.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import torch

Tensor = torch.Tensor
Item = TypeVar("Item")
Result = TypeVar("Result")


class ParallelSteps:
    """Threads that share the parts of a batch; a context manager that ends them.

    The calling thread takes parts like the others. torch releases the interpreter's lock inside of its operators.

    Args:
        threads: How many parts are worked on at the same time, at least 1; never changes a result. The calling thread
            is expected to have limited torch to one thread per operator (``torch.set_num_threads(1)``).
    """

    def __init__(self, threads: int) -> None:
        self._helpers = threads - 1
        # The limit of the calling thread does not hold in others: oneDNN takes as many as OpenMP's default there.
        self._pool = (
            concurrent.futures.ThreadPoolExecutor(self._helpers, "learn", torch.set_num_threads, (1,))
            if self._helpers
            else None
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def each(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        take: Callable[[Result], None],
        *,
        at_once: int | None = None,
    ) -> None:
        """Works on all items, and takes the results in their order.

        Args:
            work: Called in any thread. Modes such as ``torch.no_grad`` belong to a thread: it sets them itself.
            items: At least one.
            take: Called once for every result, in the items' order, never twice at the same time, as soon as those
                before are there.
            at_once: How many items may be in work at the same time, at least 1; None for all threads.

        Raises:
            BaseException: What ``work`` or ``take`` raised first; items that nobody has begun are left out.
        """
        numbers, lock, stop = itertools.count(), threading.Lock(), threading.Event()
        waiting: dict[int, Result] = {}
        taken = 0

        def work_on() -> None:
            nonlocal taken
            try:
                while not stop.is_set() and (number := next(numbers)) < len(items):
                    result = work(items[number])
                    with lock:
                        waiting[number] = result
                        while taken in waiting and not stop.is_set():
                            take(waiting.pop(taken))
                            taken += 1
            except BaseException:
                stop.set()
                raise

        helpers = min(self._helpers, len(items) - 1, *(() if at_once is None else (at_once - 1,)))
        if self._pool is None or helpers < 1:
            work_on()
            return
        futures = [self._pool.submit(work_on) for _ in range(helpers)]
        try:
            work_on()
            for future in futures:
                future.result()
        finally:
            # After an interrupt, too, nobody is at work on what the caller may change next.
            stop.set()
            concurrent.futures.wait(futures)

    def gradients(
        self,
        loss: Callable[[Item], Tensor],
        parts: Sequence[Item],
        leaves: Sequence[Tensor],
        *,
        at_once: int | None = None,
    ) -> tuple[float, list[Tensor | None]]:
        """The sum of all losses, and its gradients.

        Args:
            loss: Computes L_p, () float32, of one part; called in any thread, with gradients on.
            parts: At least one.
            leaves: What the gradients are to; a loss need not depend on all of them.
            at_once: How many parts may be in work at the same time; None for all threads.

        Returns:
            L, and a gradient of the shape of every leaf; None for one that no loss depends on.
        """
        total = 0.0
        sums: list[Tensor | None] = [None] * len(leaves)

        def work(part: Item) -> tuple[float, Sequence[Tensor | None]]:
            with torch.enable_grad():
                value = loss(part)
            if not (leaves and value.requires_grad):
                return float(value), [None] * len(leaves)
            return float(value.detach()), torch.autograd.grad(value, leaves, allow_unused=True)

        def take(result: tuple[float, Sequence[Tensor | None]]) -> None:
            nonlocal total
            total += result[0]
            sums[:] = [_sum(before, more) for before, more in zip(sums, result[1], strict=True)]

        self.each(work, parts, take, at_once=at_once)
        return total, sums

    def backward(
        self,
        loss: Callable[[Item, Mapping[str, Tensor]], Tensor],
        parts: Sequence[Item],
        leaves: Sequence[Tensor],
        shared: Mapping[str, Tensor],
        *,
        at_once: int | None = None,
    ) -> float:
        """Adds the gradients of the sum of all losses to ``grad`` of the leaves, as ``torch.autograd.backward`` does.

        Args:
            loss: Computes L_p, () float32, from one part and copies of ``shared``; called in any thread.
            parts: At least one.
            leaves: Leaves that the losses depend on, directly or through ``shared``.
            shared: What is the same for all parts and computed once, such as quantized weights: the losses get
                copies without history, and what they were computed from gets its gradients at the end.
            at_once: How many parts may be in work at the same time; None for all threads.

        Returns:
            L.
        """
        copies = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in shared.items()}
        learned = [name for name, tensor in shared.items() if tensor.requires_grad]
        total, gradients = self.gradients(
            lambda part: loss(part, copies), parts, [*(copies[name] for name in learned), *leaves], at_once=at_once
        )
        for leaf, gradient in zip(leaves, gradients[len(learned) :], strict=True):
            leaf.grad = _sum(leaf.grad, gradient)
        reached = [
            (shared[name], g) for name, g in zip(learned, gradients[: len(learned)], strict=True) if g is not None
        ]
        if reached:
            torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])
        return total


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Of gradients; None is nothing."""
    if before is None or more is None:
        return more if before is None else before
    return before + more
