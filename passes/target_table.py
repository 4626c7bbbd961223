"""Strict reading of one TOML table of a target file: :class:`TargetTable`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, TypeVar

from postquant.runtime_ops.errors import ConfigError

_E = TypeVar("_E", bound=enum.Enum)
_REQUIRED: Any = object()


class TargetTable:
    """Takes typed keys out of a table, and complains about those that nobody took.

    Args:
        data: The table.
        where: Its place for error messages.

    Raises:
        ConfigError: From every method: a key is missing, unknown or has a wrong value.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError("a key of the target file is wrong", where=where, expected="a table")
        self._data = dict(data)
        self._where = where
        self._taken: list[str] = []

    def _take(self, key: str, default: Any) -> Any:
        self._taken.append(key)
        if key in self._data:
            return self._data.pop(key)
        if default is _REQUIRED:
            raise ConfigError("a key is missing in the target file", where=f"{self._where}: {key}")
        return default

    def _wrong(self, key: str, expected: str, found: object) -> ConfigError:
        return ConfigError(
            "a key of the target file is wrong", where=f"{self._where}: {key}", expected=expected, found=repr(found)
        )

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """A text."""
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def integer(self, key: str, allowed: range | tuple[int, ...], default: int = _REQUIRED) -> int:
        """A whole number out of ``allowed``."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise self._wrong(key, f"a whole number from {allowed[0]} to {allowed[-1]}", value)
        return value

    def integers(
        self, key: str, default: tuple[int, ...] | None, allowed: range | tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """A list of whole numbers out of ``allowed``."""
        value = self._take(key, default)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(isinstance(v, bool) or v not in allowed for v in value):
            raise self._wrong(key, f"a list of whole numbers out of {', '.join(map(str, allowed))}", value)
        return tuple(value)

    def choice(self, key: str, kind: type[_E]) -> _E:
        """A member of an enumeration, by its value."""
        value = self._take(key, _REQUIRED)
        try:
            return kind(value)
        except ValueError:
            raise self._wrong(key, ", ".join(f'"{m.value}"' for m in kind), value) from None

    def table(self, key: str, default: Mapping[str, Any] = _REQUIRED) -> Mapping[str, Any]:
        """A nested table."""
        value = self._take(key, default)
        if not isinstance(value, Mapping):
            raise self._wrong(key, "a table", value)
        return value

    def finish(self) -> None:
        """Raises for a key that nobody took."""
        for key in self._data:
            raise ConfigError(
                "the target file has an unknown key",
                where=f"{self._where}: {key}",
                expected=f"one of {', '.join(sorted(self._taken))}",
            )
