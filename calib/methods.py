"""The methods whose ranges calibration compares by default, in one literal list."""

from __future__ import annotations

from postquant.calib.entropy import Entropy
from postquant.calib.lp_error import LpError
from postquant.calib.observers import MinMax, Percentile, RangeMethod, SampleMean

DEFAULT_METHODS: tuple[RangeMethod, ...] = (MinMax(), SampleMean(), Percentile(), LpError(), Entropy())
