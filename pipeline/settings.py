"""Fields of configuration classes that know what they accept.

Each function here makes a ``dataclasses.field`` whose metadata holds a :class:`Setting`; :func:`check_fields` holds
every field of a built object to its setting. One description serves the constructor, the TOML reader, the command
line help and the documentation.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from postquant.runtime_ops.errors import ConfigError

_KEY = "postquant"
_MISSING: Any = object()


class BadValueError(Exception):
    """A value that a setting does not accept; ``found`` says what it was."""

    def __init__(self, found: str, hint: str | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.hint = hint


# What a setting that is on or off accepts.
SWITCH = "true or false"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field accepts.

    Attributes:
        doc: What the setting does, one clause.
        allowed: What is accepted, in words ("a whole number from 2 to 8").
        convert: Turns an accepted value into the stored one, raises :class:`BadValueError` otherwise.
        none: The word that stands for None in a file and on the command line; None where None is not accepted.
        record: The class of nested tables, else None.
        many: Whether ``record`` stands for a list of tables.
    """

    doc: str
    allowed: str
    convert: Callable[[Any], Any]
    none: str | None = None
    record: type[Any] | None = None
    many: bool = False

    def read(self, value: Any) -> Any:
        """The stored form of ``value``.

        Raises:
            BadValueError: If the setting does not accept it.
        """
        if self.none is not None and (value is None or value == self.none):
            return None
        return self.convert(value)

    @property
    def expected(self) -> str:
        """What is accepted, the word for None included."""
        return self.allowed if self.none is None or self.record else f'{self.allowed}, or "{self.none}"'


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """The setting behind a field."""
    setting = field.metadata[_KEY]
    assert isinstance(setting, Setting)
    return setting


def check_fields(instance: Any, what: str) -> None:
    """Converts and checks every field of a frozen dataclass built from settings.

    Raises:
        ConfigError: Naming ``what``, the field, what is allowed and what was found.
    """
    for field in dataclasses.fields(instance):
        setting = setting_of(field)
        try:
            value = setting.read(getattr(instance, field.name))
        except BadValueError as error:
            raise ConfigError(
                f"a setting of the {what} has a wrong value",
                where=field.name,
                expected=setting.expected,
                found=error.found,
                hint=error.hint,
            ) from None
        object.__setattr__(instance, field.name, value)


def close_match(word: str, known: Iterable[str]) -> str | None:
    """A hint at the right spelling of a misspelt word, or None."""
    spellings = {name.lower(): name for name in sorted(known)}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), spellings, n=1, cutoff=0.6)
    return f'perhaps "{spellings[found[0]]}" was meant' if found else None


def shown(value: Any) -> str:
    """A value as it is shown in an error."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return "a table" if isinstance(value, dict) else str(value)


def _field(setting: Setting, default: Any) -> Any:
    if default is _MISSING and setting.none is not None:
        default = None
    if default is _MISSING:
        return dataclasses.field(metadata={_KEY: setting})
    return dataclasses.field(default=default, metadata={_KEY: setting})


def _range(low: float | None, high: float | None, above: float | None) -> str:
    parts = [f"above {above:g}"] if above is not None else []
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if high < 10**6 else f" from {low:g} to {high}"
    parts += [f"at least {low:g}"] if low is not None else []
    parts += [f"at most {high:g}"] if high is not None else []
    return f" {' and '.join(parts)}" if parts else ""


def _many(one: Callable[[Any], Any], length: tuple[int, ...]) -> Callable[[Any], Any]:
    def convert(value: Any) -> tuple[Any, ...]:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(items) not in length:
            raise BadValueError(shown(value))
        return tuple(one(item) for item in items)

    return convert


def _count(length: tuple[int, ...]) -> str:
    return " or ".join(str(n) for n in length) + " of: "


def integer(
    doc: str,
    *,
    default: Any = _MISSING,
    low: int | None = None,
    high: int | None = None,
    also: int | None = None,
    none: str | None = None,
    length: tuple[int, ...] | None = None,
) -> Any:
    """A whole number in ``[low, high]``, or ``also``, or a list of as many as ``length`` allows."""

    def convert(value: Any) -> int:
        if hasattr(value, "__index__") and not isinstance(value, bool):
            whole = int(value.__index__())
            if whole == also:
                return whole
            if (low is None or whole >= low) and (high is None or whole <= high):
                return whole
        raise BadValueError(shown(value))

    allowed = f"a whole number{_range(low, high, None)}" + ("" if also is None else f", or {also}")
    if length is None:
        return _field(Setting(doc, allowed, convert, none), default)
    return _field(Setting(doc, _count(length) + allowed, _many(convert, length), none), default)


def number(
    doc: str,
    *,
    default: Any = _MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    length: tuple[int, ...] | None = None,
) -> Any:
    """A finite number in ``[low, high]`` and above ``above``, or a list of as many as ``length`` allows."""

    def convert(value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            inside = (low is None or value >= low) and (high is None or value <= high)
            if inside and (above is None or value > above):
                return float(value)
        raise BadValueError(shown(value))

    allowed = f"a number{_range(low, high, above)}"
    if length is None:
        return _field(Setting(doc, allowed, convert), default)
    return _field(Setting(doc, _count(length) + allowed, _many(convert, length)), default)


def flag(doc: str, *, default: Any = _MISSING, none: str | None = None) -> Any:
    """True or false."""

    def convert(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise BadValueError(shown(value))

    return _field(Setting(doc, SWITCH, convert, none), default)


def text(doc: str, *, default: Any = _MISSING, none: str | None = None) -> Any:
    """A string that is not empty."""

    def convert(value: Any) -> str:
        if isinstance(value, (str, os.PathLike)) and os.fspath(value):
            return str(os.fspath(value))
        raise BadValueError(shown(value))

    return _field(Setting(doc, "a string", convert, none), default)


def formatted(doc: str, allowed: str, check: Callable[[str], object], *, none: str) -> Any:
    """A string that ``check`` accepts: it raises ValueError otherwise."""

    def convert(value: Any) -> str:
        if isinstance(value, str):
            try:
                check(value)
            except ValueError:
                pass
            else:
                return value.strip()
        raise BadValueError(shown(value))

    return _field(Setting(doc, allowed, convert, none), _MISSING)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def byte_count(doc: str, *, default: str) -> Any:
    """A number of bytes, with or without a unit ("500MB", "2GiB"); kept as a whole number."""

    def convert(value: Any) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or isinstance(value, bool) or match[2].upper() not in _UNITS:
            raise BadValueError(shown(value))
        count = int(float(match[1]) * _UNITS[match[2].upper()])
        if count < 1:
            raise BadValueError(shown(value))
        return count

    return _field(Setting(doc, 'a number of bytes like "500MB" or "2GiB"', convert), default)


def choice(members: type[enum.Enum], doc: str, *, default: Any = _MISSING, none: str | None = None) -> Any:
    """A member of an enumeration, or its string."""
    words = [str(member.value) for member in members]

    def convert(value: Any) -> enum.Enum:
        if isinstance(value, members):
            return value
        if value in words:
            return members(value)
        raise BadValueError(shown(value), close_match(value, words) if isinstance(value, str) else None)

    return _field(Setting(doc, "one of " + ", ".join(f'"{word}"' for word in words), convert, none), default)


def paths(doc: str) -> Any:
    """A list of file names."""

    def convert(value: Any) -> tuple[str, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, (str, os.PathLike)) and os.fspath(item) for item in items):
            raise BadValueError(shown(value))
        return tuple(str(os.fspath(item)) for item in items)

    return _field(Setting(doc, "a list of file names", convert), ())


def record(cls: type[Any], doc: str, *, none: str) -> Any:
    """An optional nested table."""

    def convert(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        raise BadValueError(shown(value))

    return _field(Setting(doc, "a table", convert, none, record=cls), None)


def records(cls: type[Any], doc: str) -> Any:
    """A list of nested tables."""

    def convert(value: Any) -> tuple[Any, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(item, cls) for item in value):
            return tuple(value)
        raise BadValueError(shown(value))

    return _field(Setting(doc, "a list of tables", convert, record=cls, many=True), ())
