"""One streaming pass over the calibration data: :func:`collect`.

Memory holds one sample's activations and a few kilobytes per tensor, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from postquant.calib.input_spec import Sample
from postquant.calib.source import CalibrationSource
from postquant.calib.statistics import UNBOUNDED, Bounds, TensorStatistics

# Runs the float model (or a part of it) on one feed: tensor name -> array.
Run = Callable[[Sample], Mapping[str, npt.NDArray[np.generic]]]
# Called after every sample with the number done and the number of all.
Progress = Callable[[int, int], None]


def collect(
    run: Run,
    source: CalibrationSource,
    names: Iterable[str],
    *,
    histogram: bool = True,
    progress: Progress | None = None,
    max_elements_per_tensor: int | None = None,
    bounds: Mapping[str, Bounds] | None = None,
) -> dict[str, TensorStatistics]:
    """Statistics of tensors over all samples.

    Args:
        run: Returns at least the tensors in ``names`` for a feed; model inputs among the names may come from the feed.
        source: The samples.
        names: Which tensors.
        histogram: Whether to keep histograms; min-max and mean-of-samples ranges need none.
        progress: Called after every sample.
        max_elements_per_tensor: At most so many values of a tensor and sample enter its histogram; minimum and
            maximum stay exact, and ``subsampled`` of the statistics says where it happened. None takes all.
        bounds: What the values of some tensors will be clipped to.

    Returns:
        Tensor name -> statistics, in the order of ``names``.

    Raises:
        CalibrationError: If a value is NaN or infinite; it names the tensor and the sample.
        KeyError: If ``run`` does not return a tensor.
    """
    limits = bounds or {}
    statistics = {
        name: TensorStatistics(
            name, histogram=histogram, bounds=limits.get(name, UNBOUNDED), max_elements=max_elements_per_tensor
        )
        for name in dict.fromkeys(names)
    }
    total = len(source)
    for index, sample in enumerate(source):
        found = run(sample)
        for name, tensor in statistics.items():
            tensor.update(found[name] if name in found else sample[name])
        if progress is not None:
            progress(index + 1, total)
    return statistics


def subsampling_note(statistics: Iterable[TensorStatistics]) -> str | None:
    """What a report says about histograms that were not fed every value; None if all were.

    >>> subsampling_note([])
    """
    names = [tensor.name for tensor in statistics if tensor.subsampled]
    if not names:
        return None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if len(names) == 1:
        return f"the histogram of {shown} was fed an even sample of its values, not all"
    return f"histograms of {len(names)} tensors were fed an even sample of their values, not all ({shown})"
