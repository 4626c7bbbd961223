"""What the configuration means for placement: :func:`placement_settings`."""

from __future__ import annotations

from postquant.passes.place import Override, PlacementSettings
from postquant.passes.target import Target
from postquant.pipeline.config import QuantConfig


def placement_settings(config: QuantConfig) -> PlacementSettings:
    """The part of the settings that :func:`postquant.passes.place.place` reads."""
    return PlacementSettings(
        wbits=config.wbits,
        abits=config.abits,
        first_last_bits=config.first_last_bits,
        depthwise_bits=config.depthwise_bits,
        sums_bits=config.sums_bits,
        overrides=tuple(
            Override(
                node=override.node,
                op_type=override.op_type,
                wbits=override.wbits,
                abits=override.abits,
                float_=override.float,
                symmetric=override.symmetric,
            )
            for override in config.override
        ),
    )


def check_widths(config: QuantConfig, target: Target) -> None:
    """Widths that a target lacks are told before any work, not when quantizers are placed.

    Raises:
        ConfigError: If it has no weights, or no activations, of a width that is asked for.
    """
    target.weights.spec(min(config.wbits, target.weights.max_bits))
    target.activations.spec(min(config.abits, target.activations.max_bits))
