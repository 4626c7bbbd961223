"""The native library simulates learned code books to the bit as torch does, on every instruction set."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from postquant.calib.feedback import feedback_of
from postquant.calib.learn import native_levels
from postquant.calib.learn.feedback import FeedbackShift
from postquant.calib.learn.levels import level_quantize
from postquant.runtime_ops import library
from postquant.runtime_ops.code_book import nearest_codes
from postquant.runtime_ops.law_feedback import Feedback, feedback_levels

CPU = torch.device("cpu")
ISA = "POSTQUANT_ISA"
ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _built() -> None:
    if library.library_path() is None:
        reason = "postquant was installed without the native library"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@dataclasses.dataclass(frozen=True)
class Case:
    """Values, levels and options of one simulation."""

    shape: tuple[int, ...]
    axis: int | None
    levels: int = 16
    last: bool = False
    masked: bool = False
    fed: bool = False

    def draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values, also beside, on and outside of the levels; levels, some of them equal; a mask or None."""
        channels = 1 if self.axis is None else self.shape[self.axis]
        gaps = rng.uniform(0.05, 1.0, (channels, self.levels - 1)) * (rng.random((channels, self.levels - 1)) > 0.2)
        levels = np.concatenate((np.zeros((channels, 1)), gaps.cumsum(1)), 1) * np.geomspace(0.1, 3, channels)[:, None]
        levels -= levels[:, [self.levels // 3]]
        levels[0] = levels[0, :1] if channels > 5 else levels[0]  # all the same
        size = int(np.prod(self.shape))
        x = rng.uniform(levels.min() - 1, levels.max() + 1, size)
        special = np.concatenate((levels.ravel(), (levels[:, 1:] + levels[:, :-1]).ravel() / 2, [0.0, 1e30, -1e30]))
        chosen = rng.random(size)
        x = np.where(chosen < 0.3, rng.choice(special, size), np.where(chosen < 0.6, np.maximum(x, 0), x))
        values = torch.from_numpy(x.astype(np.float32).reshape(self.shape))
        mask = torch.from_numpy(rng.integers(0, 2, self.shape).astype(np.float32)) if self.masked else None
        if self.last:
            values = values.contiguous(memory_format=torch.channels_last)
            mask = None if mask is None else mask.contiguous(memory_format=torch.channels_last)
        return values, torch.from_numpy(levels.astype(np.float32)), mask


def feedback(channels: int, rng: np.random.Generator) -> Feedback:
    """Of errors of about 10 codes."""
    weight = rng.standard_normal((max(channels // 4, 1), channels))
    found = feedback_of(weight.T @ weight, np.full(channels, 100.0), 1.0)
    assert found is not None
    return found


def both_ways(case: Case, seed: int = 0) -> list[torch.Tensor]:
    """The values, and the gradients to x and levels."""
    rng = np.random.default_rng(seed)
    x, levels, mask = case.draw(rng)
    grad = torch.from_numpy(rng.standard_normal(case.shape).astype(np.float32))
    shift = None
    if case.fed:
        assert case.axis is not None
        shift = FeedbackShift(feedback(case.shape[case.axis], rng), case.axis, CPU)
    x, levels = x.requires_grad_(), levels.requires_grad_()
    result = level_quantize(x, levels, mask, case.axis, shift)
    torch.autograd.backward(result, grad)
    assert x.grad is not None
    assert levels.grad is not None
    return [result.detach(), x.grad, levels.grad]


PLAIN = (
    Case((7,), None),
    Case((2, 5, 30, 1001), None, last=True),
    Case((3, 3, 13, 11), -3, levels=2),
    Case((2, 17, 7, 7), -3, levels=8),
    Case((3, 17, 5, 5), -3, levels=16, last=True),
    Case((2, 96, 9, 9), -3, levels=4),
    Case((1, 3, 300, 400), -3),
    Case((2, 960, 7, 7), -3),
    Case((2, 960, 3, 3), -3, last=True),
    Case((35, 17), -1, levels=5),
    Case((3, 4, 70), -2),
    Case((5, 6, 1), -2),
)
FED = (
    Case((3, 3, 13, 11), -3, fed=True),
    Case((2, 17, 7, 7), -3, levels=8, fed=True),
    Case((3, 17, 5, 5), -3, fed=True, last=True),
    Case((2, 96, 8, 8), -3, levels=4, fed=True),
    Case((3, 960, 7, 7), -3, fed=True),
    Case((2, 960, 7, 7), -3, fed=True, last=True),
    Case((5, 2), -1, fed=True),
    Case((130, 20), -1, fed=True),
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", [*PLAIN, *FED], ids=str)
def test_native_is_torch_to_the_bit(case: Case, monkeypatch: pytest.MonkeyPatch, *, masked: bool) -> None:
    case = dataclasses.replace(case, masked=masked)
    assert native_levels.usable(torch.zeros(1), torch.zeros(1, 2))
    native = both_ways(case)
    monkeypatch.setattr(native_levels, "usable", lambda x, levels: False)
    expected = both_ways(case)
    if case.fed and case.shape != (5, 2):
        assert (expected[0] != both_ways(dataclasses.replace(case, fed=False))[0]).float().mean() > 0.01
    for name, one, other in zip(("values", "to x", "to levels"), native, expected, strict=True):
        assert one.stride() == other.stride()
        assert torch.isfinite(other).all()
        assert other.any()
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=name)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets_too(isa: str) -> None:
    """In a process of its own, since the library reads its choice once; a set that is not there is a lower one."""
    if os.environ.get(ISA):
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), str(pathlib.Path(__file__)), "-k", "to_the_bit and not 960 and not 300"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment | {ISA: isa})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("channels", [2, 17, 96])
@pytest.mark.parametrize("last", [False, True])
def test_feedback_is_that_of_the_law(channels: int, *, last: bool) -> None:
    """To the bit, on values that are codes; levels of a channel end where they like."""
    rng = np.random.default_rng(1)
    codes = np.sort(rng.choice(255, (channels, 16)), axis=1)
    codes = (codes * rng.uniform(0.2, 1, (channels, 1))).astype(np.int64)
    codes[:, 0], codes[0, -1] = 0, 255
    table = codes.astype(np.uint8)
    coefficients = feedback(channels, rng)
    x = rng.integers(0, 256, (2, channels, 7, 5))
    expected = feedback_levels(x, nearest_codes(table), coefficients, -3)
    values, levels = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(codes.astype(np.float32))
    if last:
        values = values.contiguous(memory_format=torch.channels_last)
    got = level_quantize(values, levels, None, -3, FeedbackShift(coefficients, -3, CPU)).numpy()
    assert (expected != feedback_levels(x, nearest_codes(table), silent(coefficients), -3)).mean() > 0.05
    np.testing.assert_array_equal(got, expected)


def silent(coefficients: Feedback) -> Feedback:
    return dataclasses.replace(coefficients, left=np.zeros_like(coefficients.left))


def test_values_and_levels_are_codes_of_8_bits_and_ties_go_up() -> None:
    """By NumPy, with a step of 1/4 and code 85 for 0."""
    rng = np.random.default_rng(2)
    codes = np.sort(rng.integers(0, 256, (5, 16)), axis=1)
    codes[0, 0], codes[1, -1] = 0, 255
    x = rng.integers(-20, 280, (3, 5, 40))
    distance = np.abs(np.clip(x, 0, 255)[..., None] - codes[:, None])
    # Of two levels that are equally near, the last one is the upper one.
    nearest = 15 - distance[..., ::-1].argmin(-1)
    expected = np.take_along_axis(np.broadcast_to(codes[:, None], distance.shape), nearest[..., None], -1)[..., 0]
    # Off the codes, but by less than half a step.
    off = rng.uniform(-0.4, 0.4, x.shape), rng.uniform(-0.4, 0.4, codes.shape)
    off[1][0, 0] = off[1][1, -1] = 0
    values = torch.from_numpy(((x + off[0] - 85) / 4).astype(np.float32))
    levels = torch.from_numpy(((codes + off[1] - 85) / 4).astype(np.float32))
    got = level_quantize(values, levels, None, -2).numpy()
    np.testing.assert_array_equal(got, (expected - 85) / 4)


def test_other_types_and_sizes_are_left_to_torch() -> None:
    x, levels = torch.rand(3, 4), torch.tensor([[0.0, 1.0]])
    assert not native_levels.usable(x.double(), levels.double())
    assert not native_levels.usable(x[:0], levels)
    assert not native_levels.usable(x, torch.zeros(1, 17))
    assert torch.equal(level_quantize(x.double(), levels.double(), None, None), (x.double() >= 0.5).double())
    assert level_quantize(x[:0], levels, None, None).shape == (0, 4)


def test_without_the_library_or_its_functions_torch_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    x, levels = torch.zeros(1), torch.zeros(1, 2)
    garbage = tmp_path / "library"
    garbage.write_bytes(b"no library")
    system = next(pathlib.Path(np.__file__).parent.glob("_core/_multiarray_umath*"), None)
    for path in (None, garbage, system):
        monkeypatch.setattr(native_levels, "library_path", lambda path=path: path)
        native_levels._library.cache_clear()
        assert not native_levels.usable(x, levels)
    monkeypatch.undo()
    native_levels._library.cache_clear()
    assert native_levels.usable(x, levels)


def test_what_does_not_fit_is_refused() -> None:
    x, levels = torch.zeros(2, 3, 4), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="expected a contiguous"):
        native_levels.simulate(x, levels[:2], None, None)
    with pytest.raises(ValueError, match="expected a contiguous"):
        native_levels.simulate(x, levels, torch.zeros(2, 3, 5), None)
    with pytest.raises(ValueError, match="does not take"):
        native_levels.simulate(x, torch.zeros(3, 17), None, None)
    coefficients = native_levels.NativeFeedback(feedback(4, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="channels for"):
        native_levels.simulate(x, levels, None, coefficients)
    with pytest.raises(ValueError, match="expected a contiguous"):
        native_levels.gradients(x, torch.zeros(2, 3, 4), levels, None, wanted=(True, True))
