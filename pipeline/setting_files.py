"""Files that settings name, which a run reads beside the model and the data: :func:`setting_files`.

A bundle has their names only. With their digests, whoever makes it again knows whether he has the right ones.
"""

from __future__ import annotations

import dataclasses
import pathlib

from postquant.passes.target import target_files
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.fingerprint import digest_file
from postquant.pipeline.report import SettingFile


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """A file and the setting that names it."""

    setting: str
    path: pathlib.Path

    def digested(self) -> SettingFile:
        """Name and digest, without the folder."""
        return SettingFile(setting=self.setting, name=self.path.name, sha256=digest_file(self.path))


def setting_files(config: QuantConfig) -> tuple[NamedFile, ...]:
    """The files that the settings name: target files with those that they extend, encodings, operator libraries.

    Raises:
        ConfigError: If there is no such target.
    """
    found = [NamedFile("target", path) for path in target_files(config.target)]
    if config.encodings is not None:
        found.append(NamedFile("encodings", pathlib.Path(config.encodings)))
    return (*found, *(NamedFile("custom_ops", pathlib.Path(library)) for library in config.custom_ops))
