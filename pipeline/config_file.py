"""Reads ``quant.toml`` strictly: an unknown key, a wrong type or a wrong value is an error that names its line."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from postquant.pipeline.config import QuantConfig
from postquant.pipeline.settings import BadValueError, Setting, close_match, setting_of, shown
from postquant.runtime_ops.errors import ConfigError

_HEADER = re.compile(r"^\s*\[(\[)?\s*([A-Za-z0-9_\-]+)\s*\]?\]")
_ASSIGNMENT = re.compile(r"^\s*[\"']?([A-Za-z0-9_\-]+)[\"']?\s*[.=]")


def read_config(path: pathlib.Path, options: Mapping[str, Any]) -> QuantConfig:
    """The configuration in ``path`` with ``options`` on top (None: not given).

    Raises:
        ConfigError: See :meth:`QuantConfig.from_toml`.
    """
    try:
        content = path.read_bytes().decode("utf-8")
        data = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the configuration is not valid TOML", where=str(path), found=str(error)) from None
    except UnicodeDecodeError:
        raise ConfigError("the configuration is not a text file", where=str(path), expected="TOML in UTF-8") from None
    except OSError as error:
        raise ConfigError(
            "the configuration cannot be read", where=str(path), found=error.strerror or str(error)
        ) from None
    reader = _Reader(path, content)
    values = reader.table(data, QuantConfig, "", 0)
    values.update({name: value for name, value in options.items() if value is not None})
    config: QuantConfig = reader.build(QuantConfig, values, "", 0)
    return config


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Turns parsed tables into configuration classes and knows where each key stands."""

    path: pathlib.Path
    content: str

    def table(self, data: Mapping[str, Any], cls: type[Any], name: str, index: int) -> dict[str, Any]:
        """Values of the keyword arguments of ``cls``."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, value in data.items():
            where = self._where(name, index, key)
            if key not in fields:
                raise ConfigError(
                    f"unknown key {shown(key)}",
                    where=where,
                    expected="one of " + ", ".join(fields),
                    hint=close_match(key, fields),
                )
            setting = setting_of(fields[key])
            if setting.record is not None:
                values[key] = self._nested(setting, key, value, where)
                continue
            try:
                values[key] = setting.read(value)
            except BadValueError as error:
                raise ConfigError(
                    f"{shown(key)} has a wrong value",
                    where=where,
                    expected=setting.expected,
                    found=error.found,
                    hint=error.hint,
                ) from None
        if cls is QuantConfig:
            self._resolve_paths(values)
        return values

    def build(self, cls: type[Any], values: Mapping[str, Any], name: str, index: int) -> Any:
        """An object of ``cls``; contradictions between keys are reported with the file's name."""
        try:
            return cls(**values)
        except ConfigError as error:
            where = f"{self._where(name, index, None)}: {error.where}"
            raise ConfigError(
                error.what, where=where, expected=error.expected, found=error.found, hint=error.hint
            ) from None

    def _nested(self, setting: Setting, key: str, value: Any, where: str) -> Any:
        tables = value if setting.many else [value]
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            form = f"[[{key}]]" if setting.many else f"[{key}]"
            raise ConfigError(f"{shown(key)} has a wrong value", where=where, expected=form, found=shown(value))
        cls = setting.record
        assert cls is not None
        built = tuple(self.build(cls, self.table(t, cls, key, i), key, i) for i, t in enumerate(tables))
        return built if setting.many else built[0]

    def _resolve_paths(self, values: dict[str, Any]) -> None:
        """Paths in a file are relative to the file."""
        folder = self.path.parent
        if "custom_ops" in values:
            values["custom_ops"] = tuple(str(folder / item) for item in values["custom_ops"])
        if values.get("encodings") is not None:
            values["encodings"] = str(folder / values["encodings"])
        if str(values.get("target", "")).endswith(".toml"):
            values["target"] = str(folder / values["target"])

    def _where(self, table: str, index: int, key: str | None) -> str:
        """Where a key, or the header of a table, stands: "quant.toml, line 3"."""
        current, seen = "", {"": 0}
        for number, line in enumerate(self.content.splitlines(), start=1):
            header = _HEADER.match(line)
            if header:
                current = header.group(2)
                seen[current] = seen.get(current, -1) + 1
            inside = current == table and seen[current] == index
            if inside and key is None and (header or not table):
                return str(self.path) if not table else f"{self.path}, line {number}"
            assignment = _ASSIGNMENT.match(line)
            if key is not None and inside and assignment and assignment.group(1) == key:
                return f"{self.path}, line {number}"
            if key is not None and not table and header and header.group(2) == key:
                return f"{self.path}, line {number}"
        return str(self.path)
