"""The examples in docs/calibration.md run, and its table of preprocessing is a valid one."""

import pathlib
import re
import tomllib
from typing import Any

from postquant.calib.image_preprocess import ImagePreprocess

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_python_examples_run() -> None:
    names: dict[str, Any] = {}
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        exec(compile(block, "calibration.md", "exec"), names)


def test_preprocessing_table_is_valid() -> None:
    (block,) = blocks("toml")
    assert ImagePreprocess.from_mapping(tomllib.loads(block)["image"]).shorter_side == 256
