"""Whether torch is there: :func:`require_torch`."""

from __future__ import annotations

import importlib.util

from postquant.runtime_ops.errors import ConfigError


def require_torch() -> None:
    """Complains where torch is not installed.

    Raises:
        ConfigError: If it is not.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "learning needs torch, which is not installed",
            where="learn",
            hint="install it with: pip install 'postquant[learn]'",
        )
