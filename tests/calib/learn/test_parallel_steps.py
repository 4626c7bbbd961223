"""Parts of a batch give the gradients of the whole batch, and the same bytes with any number of threads."""

import _thread
import signal
import threading
import time
from collections.abc import Iterator, Mapping

import pytest
import torch

from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.quantizers import fake_quantize

Tensor = torch.Tensor
PARTS = [range(5), range(5, 10), range(10, 16)]


class Case:
    """A convolution, a quantizer and a matrix product; what is common to all parts is the doubled weight."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 3, 12, 12, generator=rng)
        self.y = torch.randn(16, 4, generator=rng)
        self.weight = torch.randn(8, 3, 3, 3, generator=rng, requires_grad=True)
        self.head = torch.randn(8, 4, generator=rng, requires_grad=True)
        self.step = torch.tensor(0.3, requires_grad=True)
        self.unused = torch.ones(3, requires_grad=True)
        self.leaves = [self.weight, self.head, self.step, self.unused]

    def shared(self) -> dict[str, Tensor]:
        return {"weight": self.weight * 2, "constant": torch.tensor(0.5)}

    def loss(self, part: range, shared: Mapping[str, Tensor]) -> Tensor:
        hidden = torch.conv2d(self.x[list(part)], shared["weight"]).relu()
        hidden = fake_quantize(hidden, self.step, 0.0, 15.0, None).mean((2, 3))
        error = (hidden @ self.head * shared["constant"] - self.y[list(part)]).square().mean()
        return error * (len(part) / len(self.x))


def _backward(threads: int) -> tuple[float, list[Tensor | None]]:
    case = Case()
    with ParallelSteps(threads) as steps:
        loss = steps.backward(case.loss, PARTS, case.leaves, case.shared())
    return loss, [leaf.grad for leaf in case.leaves]


def test_gradients_are_those_of_the_whole_batch() -> None:
    case = Case()
    whole = case.loss(range(16), case.shared())
    expected = torch.autograd.grad(whole, case.leaves[:3])
    loss, found = _backward(2)
    assert loss == pytest.approx(float(whole.detach()), rel=1e-6)
    for gradient, law in zip(found[:3], expected, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, law, rtol=1e-4, atol=1e-5)
    assert found[3] is None


def test_gradients_are_added_to_those_that_are_there() -> None:
    case = Case()
    case.weight.grad, case.head.grad = torch.ones_like(case.weight), torch.ones_like(case.head)
    with ParallelSteps(2) as steps:
        steps.backward(case.loss, PARTS, case.leaves, case.shared())
    _, alone = _backward(1)
    assert alone[0] is not None
    assert alone[1] is not None
    torch.testing.assert_close(case.weight.grad, alone[0] + 1)
    torch.testing.assert_close(case.head.grad, alone[1] + 1)


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    loss, gradients = _backward(1)
    for threads in (2, 3, 5):
        for _ in range(3):
            again, found = _backward(threads)
            assert again == loss
            for one, other in zip(gradients[:3], found[:3], strict=True):
                assert one is not None
                assert other is not None
                assert one.numpy().tobytes() == other.numpy().tobytes()


def test_results_come_in_order_and_at_most_so_many_are_in_work() -> None:
    found: list[int] = []
    most, now, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002 * (item % 3))
        with lock:
            now -= 1
        return item

    with ParallelSteps(4) as steps:
        steps.each(work, range(20), found.append, at_once=2)
        assert most <= 2
        steps.each(work, range(20), found.append)
    assert found == [*range(20), *range(20)]
    assert most <= 4


def test_every_thread_has_one_thread_per_operator() -> None:
    seen: dict[int, int] = {}
    meet = threading.Barrier(3)

    def work(_: int) -> None:
        meet.wait(10)  # nobody takes two
        seen[threading.get_ident()] = torch.get_num_threads()

    with ParallelSteps(3) as steps:
        steps.each(work, range(3), lambda _: None)
    assert len(seen) == 3
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_errors_reach_the_caller_and_end_the_work(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise LookupError("two")
        time.sleep(0.001)
        return item

    with ParallelSteps(threads) as steps:
        with pytest.raises(LookupError, match="two"):
            steps.each(work, range(1000), lambda _: None)
        count = len(begun)
        assert count < 100
        time.sleep(0.02)
        assert len(begun) == count  # nobody is at work any more
        found: list[int] = []
        steps.each(abs, [-1, 2], found.append)
        assert found == [1, 2]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler, which a shell turns off for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_ends_the_work(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            _thread.interrupt_main()
        time.sleep(0.002)

    with ParallelSteps(threads) as steps:
        with pytest.raises(KeyboardInterrupt):
            steps.each(work, range(1000), lambda _: None)
        count = len(begun)
        assert count < 100
        time.sleep(0.02)
        assert len(begun) == count
