"""Windows of large images, for measurements that full images make too expensive: :func:`cropped`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from postquant.calib.input_spec import InputSpec, Sample
from postquant.calib.source import CalibrationSource

# Windows lie at fractions of the free room that are far from regular: multiples of the golden ratio and its square.
_STEPS = (0.6180339887498949, 0.3819660112501051)


class CroppedSource(CalibrationSource):
    """One window of every sample of another source.

    Args:
        source: Whose only input is an image of rank 4 with two dynamic spatial axes (:func:`cropped`).
        side: Largest height and width of a window, in pixels.
    """

    def __init__(self, source: CalibrationSource, side: int) -> None:
        super().__init__(source.inputs, notes=source.notes)
        self._source = source
        self._side = side

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        name = self.inputs[0].name
        for index, sample in zip(indices, self._source.read(indices), strict=True):
            image = sample[name]
            for axis, step in zip((2, 3), _STEPS, strict=True):
                room = max(image.shape[axis] - self._side, 0)
                start = int((index + 1) * step % 1.0 * (room + 1))
                image = image[(slice(None),) * axis + (slice(start, start + self._side),)]
            yield {name: image.copy()}


def cropped(source: CalibrationSource, side: int) -> CroppedSource | None:
    """Windows of ``side`` x ``side`` pixels, or None where the model does not take images of any size."""
    if len(source.inputs) != 1 or not _any_size(source.inputs[0]):
        return None
    return CroppedSource(source, side)


def _any_size(spec: InputSpec) -> bool:
    return spec.shape is not None and len(spec.shape) == 4 and spec.shape[2] is None and spec.shape[3] is None
