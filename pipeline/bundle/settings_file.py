"""The settings of a run as ``quant.toml``, which the same run can be started from: :func:`settings_toml`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def settings_toml(settings: Mapping[str, Any]) -> bytes:
    """TOML of a report's settings; settings that are None are left to their defaults.

    Args:
        settings: :meth:`postquant.pipeline.config.QuantConfig.to_json`.

    >>> print(settings_toml({"wbits": 4, "samples": None, "image": {"size": [2, 3]}}).decode(), end="")
    wbits = 4
    <BLANKLINE>
    [image]
    size = [2, 3]
    """
    lines = list(_assignments(settings))
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", *_assignments(value)]
        elif _is_tables(value):
            for table in value:
                lines += ["", f"[[{name}]]", *_assignments(table)]
    return ("\n".join(lines) + "\n").encode()


def _assignments(table: Mapping[str, Any]) -> Iterable[str]:
    for name, value in table.items():
        if value is not None and value != [] and not isinstance(value, Mapping) and not _is_tables(value):
            yield f"{name} = {_shown(value)}"


def _is_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _shown(value: Any) -> str:
    # Strings, numbers and lists are written alike in JSON and TOML; DEL is the one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
