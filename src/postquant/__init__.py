"""postquant: post-training quantization of exported ONNX models.

The names below are imported when they are used, so that ``import postquant`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postquant.calib.source import CalibrationSource
    from postquant.passes.plan import QuantPlan
    from postquant.pipeline.api import QuantizationResult, quantize
    from postquant.pipeline.config import ImageConfig, Method, Objective, OverrideConfig, QuantConfig
    from postquant.pipeline.ort_compat import quantize_static
    from postquant.pipeline.report import Report
    from postquant.pipeline.runtime import session
    from postquant.runtime_ops.errors import (
        CalibrationError,
        ConfigError,
        ModelError,
        OutputError,
        PostquantError,
        VerificationError,
    )

__all__ = [
    "CalibrationError",
    "CalibrationSource",
    "ConfigError",
    "ImageConfig",
    "Method",
    "ModelError",
    "Objective",
    "OutputError",
    "OverrideConfig",
    "PostquantError",
    "QuantConfig",
    "QuantPlan",
    "QuantizationResult",
    "Report",
    "VerificationError",
    "quantize",
    "quantize_static",
    "session",
]

_HOMES = {
    "postquant.calib.source": ("CalibrationSource",),
    "postquant.passes.plan": ("QuantPlan",),
    "postquant.pipeline.api": ("QuantizationResult", "quantize"),
    "postquant.pipeline.config": ("ImageConfig", "Method", "Objective", "OverrideConfig", "QuantConfig"),
    "postquant.pipeline.ort_compat": ("quantize_static",),
    "postquant.pipeline.report": ("Report",),
    "postquant.pipeline.runtime": ("session",),
    "postquant.runtime_ops.errors": (
        "CalibrationError",
        "ConfigError",
        "ModelError",
        "OutputError",
        "PostquantError",
        "VerificationError",
    ),
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used."""
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'postquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
