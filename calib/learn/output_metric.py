"""What errors of a value's channels do to the network's outputs together: :class:`OutputMetric`.

With ``e`` the errors of the C channels at one place and H what they do to the outputs (:mod:`.fisher`, in units of the
mean of its diagonal), an error of the value is the sum over places of

    e' (H + lambda I) e / (1 + lambda)

Plain squared errors are its ``H = I``. H of a hundred samples does not know everything: lambda keeps the rest in sight.
Few of H's directions matter, so that it costs a product with R x C numbers per place.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
# In units of the mean of H's diagonal (docs/learning.md, "What errors count").
_DAMPING = 0.1
# Share of the trace of H that its smallest eigenvalues may have together to be left out.
_LEFT_OUT = 0.01


def channel_products(gradient: Tensor, axis: int) -> Tensor:
    """Sum over places of ``g g'``, (C, C) float64 on the CPU.

    Args:
        gradient: Any shape.
        axis: That of the C channels; places are all others.
    """
    rows = gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1)
    return (rows @ rows.T).double().cpu()


class OutputMetric:
    """Measures errors of one value.

    Args:
        hessian: (C, C) float64, symmetric, of any unit, its trace > 0.
        axis: That of the channels, counted from the last one, -1.
    """

    def __init__(self, hessian: Tensor, axis: int) -> None:
        values, vectors = torch.linalg.eigh(hessian / hessian.diagonal().mean())
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        rank = int((values.cumsum(0) < (1 - _LEFT_OUT) * values.sum()).sum()) + 1
        self._factor = ((vectors[:, :rank] * values[:rank].sqrt()).T / (1 + _DAMPING) ** 0.5).float()
        self._own = _DAMPING / (1 + _DAMPING)
        self._axis = axis

    def to(self, device: torch.device) -> OutputMetric:
        """The same on a device; this one is moved there."""
        self._factor = self._factor.to(device)
        return self

    def energy(self, error: Tensor) -> Tensor:
        """Sum over places of the module docstring's error, (), differentiable.

        Args:
            error: float32, C channels on the axis.
        """
        result: Tensor = self._shared(error).square().sum() + self._own * error.square().sum()
        return result

    def image(self, x: Tensor) -> Tensor:
        """``x`` in units in which plain squared errors are what :meth:`energy` gives: (elements,)."""
        return torch.cat((self._shared(x).flatten(), self._own**0.5 * x.flatten()))

    def _shared(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and self._axis == -3:  # keeps the order of memory
            return torch.conv2d(x, self._factor[:, :, None, None])
        result: Tensor = torch.tensordot(self._factor, x, dims=([1], [x.ndim + self._axis]))
        return result
