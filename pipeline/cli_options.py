"""Command line options of ``postquant quantize``, made from the settings of :class:`QuantConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import typer

from postquant.pipeline.config import QuantConfig
from postquant.pipeline.settings import SWITCH, BadValueError, setting_of, shown
from postquant.runtime_ops.errors import ConfigError

_FIELDS = {field.name: field for field in dataclasses.fields(QuantConfig)}


def option(name: str) -> Any:
    """The option ``--name`` of a field, with help and default from its setting."""
    field = _FIELDS[name]
    setting = setting_of(field)
    default = field.default
    shown_default = getattr(default, "value", setting.none if default is None else default)
    dashed = name.replace("_", "-")
    if setting.allowed == SWITCH:  # it may leave the choice to other settings until it is given
        text = f"{setting.doc} [default: {setting.none if default is None else 'on' if default else 'off'}]"
        return typer.Option(f"--{dashed}/--no-{dashed}", help=text, show_default=False)
    if default == ():
        return typer.Option(f"--{dashed}", metavar="FILE", help=f"{setting.doc}; may be repeated", show_default=False)
    allowed = setting.expected.replace('"', "").replace("a whole number ", "").replace("a number ", "")
    note = "" if setting.allowed == "a string" else f": {allowed}"
    help_text = f"{setting.doc}{note} [default: {shown_default}]"
    return typer.Option(f"--{dashed}", metavar="VALUE", help=help_text, show_default=False)


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the options that were given, held to their settings.

    Raises:
        ConfigError: If a value is not allowed; the text names the option.
    """
    values = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        setting = setting_of(_FIELDS[name])
        if isinstance(value, str) and value == setting.none:
            values[name] = value  # the word that stands for None; None itself means "not given"
            continue
        try:
            values[name] = setting.read(_number(value) if isinstance(value, str) and not _is_text(name) else value)
        except BadValueError as error:
            raise ConfigError(
                f"the option --{name.replace('_', '-')} has a wrong value",
                expected=setting.expected,
                found=shown(value) if isinstance(value, str) else error.found,
                hint=error.hint,
            ) from None
    return values


def _is_text(name: str) -> bool:
    return isinstance(_FIELDS[name].default, str)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
