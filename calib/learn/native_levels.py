"""Learned code books simulated by the native library, to the bit as torch does: :func:`simulate`, :func:`gradients`.

Dozens of element-wise operators of torch, each of which reads and writes all values, are one pass over tiles that stay
in the cache (``runtime_ops/csrc/simulate_levels.h``). The definition stands in :mod:`postquant.calib.learn.levels` and
:mod:`postquant.calib.learn.feedback`, which compute by themselves wherever :func:`usable` says no: without the library,
with one of an older build, on other devices than the CPU. Any number of threads may call; ctypes releases the
interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from postquant.runtime_ops.law_feedback import GROUPS, Feedback
from postquant.runtime_ops.library import library_path

Tensor = torch.Tensor
_MOST_LEVELS = 16
_SYMBOLS = ("postquant_simulate_levels", "postquant_simulate_levels_back")


class _Coefficients(ctypes.Structure):
    """``PostquantFeedback``."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ends", "order", "left", "left_scale", "right", "right_scale")),
    )


class _Call(ctypes.Structure):
    """``PostquantLevels``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "channels", "inner", "count")),
        *((name, ctypes.c_void_p) for name in ("levels", "mask", "feedback")),
    )


class NativeFeedback:
    """Coefficients in the order in which kernels read them.

    Args:
        feedback: Groups and coefficients.
    """

    def __init__(self, feedback: Feedback) -> None:
        order = np.argsort(feedback.group, kind="stable")
        sizes = np.bincount(feedback.group, minlength=GROUPS)
        sizes = sizes[sizes > 0]
        ends = np.cumsum(sizes)
        left = feedback.left[:, order]
        parts = [_even(left[:, end - size : end]).ravel() for size, end in zip(sizes, ends, strict=True)]
        arrays: dict[str, npt.NDArray[Any]] = {
            "ends": ends.astype(np.int64),
            "order": order.astype(np.int64),
            "left": np.concatenate(parts),
            "left_scale": feedback.left_scale.copy(),
            "right": _even(feedback.right[order]),
            "right_scale": feedback.right_scale[order],
        }
        # What the struct points to lives as long as this.
        self._arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        addresses = (array.ctypes.data for array in self._arrays.values())
        self._struct = _Coefficients(feedback.rank, len(sizes), *addresses)
        self.channels = len(feedback.group)

    @property
    def address(self) -> int:
        """Of the struct, as long as this lives."""
        return ctypes.addressof(self._struct)


def _even(rows: npt.NDArray[np.int8]) -> npt.NDArray[np.int16]:
    """With a column of zeros where that makes their number even."""
    return np.pad(rows.astype(np.int16), ((0, 0), (0, rows.shape[1] % 2)))


def usable(x: Tensor, levels: Tensor) -> bool:
    """Whether the library computes this.

    Args:
        x: What is simulated, any shape.
        levels: (C, n).
    """
    fits = all(part.device.type == "cpu" and part.dtype == torch.float32 for part in (x, levels))
    return fits and x.numel() > 0 and 2 <= levels.shape[1] <= _MOST_LEVELS and _library() is not None


def simulate(x: Tensor, levels: Tensor, mask: Tensor | None, feedback: NativeFeedback | None) -> tuple[Tensor, Tensor]:
    """Every value's nearest level.

    Args:
        x: (outer, C, inner) float32; :func:`usable`.
        levels: (C, n) float32, every row sorted.
        mask: (outer, C, inner) float32, 0 where a value stays as it is and 1 elsewhere; all 1 when None.
        feedback: Of C channels, or None.

    Returns:
        float32 values, and int16 places that :func:`gradients` asks for, both (outer, C, inner).
    """
    x = x.contiguous()
    simulated, places = torch.empty_like(x), torch.empty_like(x, dtype=torch.int16)
    _run(_SYMBOLS[0], x, levels, mask, feedback, (simulated, places))
    return simulated, places


def gradients(
    grad: Tensor, places: Tensor, levels: Tensor, mask: Tensor | None, *, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to values and levels.

    Args:
        grad: (outer, C, inner) float32, those of the simulated values.
        places: Of the simulation.
        levels: (C, n), the simulation's.
        mask: The simulation's.
        wanted: Which of both are.

    Returns:
        (outer, C, inner) and (C, n), or None where they are not wanted.
    """
    grad = grad.contiguous()
    to_x = torch.empty_like(grad) if wanted[0] else None
    to_levels = torch.empty(levels.shape) if wanted[1] else None
    _expect(places, grad.shape, torch.int16)
    _run(_SYMBOLS[1], grad, levels, mask, None, (places, to_x, to_levels))
    return to_x, to_levels


def _run(
    symbol: str,
    x: Tensor,
    levels: Tensor,
    mask: Tensor | None,
    feedback: NativeFeedback | None,
    others: tuple[Tensor | None, ...],
) -> None:
    outer, channels, inner = x.shape
    levels = levels.contiguous()
    mask = None if mask is None else mask.contiguous()
    _expect(x, x.shape, torch.float32)
    _expect(levels, torch.Size((channels, levels.shape[-1])), torch.float32)
    if mask is not None:
        _expect(mask, x.shape, torch.float32)
    if feedback is not None and feedback.channels != channels:
        raise ValueError(f"feedback of {feedback.channels} channels for {channels}")
    call = _Call(
        outer,
        channels,
        inner,
        levels.shape[1],
        levels.data_ptr(),
        None if mask is None else mask.data_ptr(),
        None if feedback is None else feedback.address,
    )
    found = _library()
    assert found is not None
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in others)
    status = getattr(found, symbol)(ctypes.byref(call), x.data_ptr(), *addresses)
    if status == 2:
        raise MemoryError("no memory to simulate a code book")
    if status != 0:
        raise ValueError(f"{symbol} does not take {tuple(x.shape)} with {levels.shape[1]} levels")


def _expect(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Before its address is handed out."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
    if not fits:
        raise ValueError(f"expected a contiguous {dtype} of {tuple(shape)}, found {tensor.dtype} {tuple(tensor.shape)}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, or None where there is none with these functions."""
    path = library_path()
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    for symbol, pointers in zip(_SYMBOLS, (4, 5), strict=True):
        if not hasattr(found, symbol):
            return None
        getattr(found, symbol).argtypes = (ctypes.c_void_p,) * pointers
        getattr(found, symbol).restype = ctypes.c_int
    return found
