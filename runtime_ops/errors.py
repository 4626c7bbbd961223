"""One error family: what failed, where, what was expected, what was found, what to do.

Every mistake that a user can make ends in a :class:`PostquantError`, whose text is one clear sentence.
The command line prints it and leaves with :attr:`PostquantError.exit_code`; nothing else may reach a
user as a traceback.
"""

from __future__ import annotations


class PostquantError(Exception):
    """A failure that is explained to the user in one sentence.

    Args:
        what: What failed, as a clause without a full stop ("the model cannot be read").
        where: The file, node, value, option or sample at which it failed.
        expected: What would have been right.
        found: What was there instead.
        hint: What the user can do about it.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = self.what if self.where is None else f"{self.what} ({self.where})"
        if self.expected is not None:
            text += f": expected {self.expected}"
        if self.found is not None:
            text += f"{',' if self.expected is not None else ':'} found {self.found}"
        if self.hint is not None:
            text += f"; {self.hint}"
        return text + "."

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.found, self.hint))


def _rebuild(cls: type[PostquantError], what: str, *rest: str | None) -> PostquantError:
    where, expected, found, hint = rest
    return cls(what, where=where, expected=expected, found=found, hint=hint)


class ModelError(PostquantError):
    """The model file, or something in its graph, is not usable."""


class CalibrationError(PostquantError):
    """The calibration data do not fit the model, or hold NaN or infinity."""


class ConfigError(PostquantError):
    """An option, a configuration file or a target file is wrong."""


class OutputError(PostquantError):
    """A result cannot be written."""


class VerificationError(PostquantError):
    """The written model does not do what the plan says; the files are kept aside."""

    exit_code = 3
