"""Every command of docs/tutorial.md runs, in order, and prints what the page says, but for numbers."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+(\.\d+)*")


@pytest.mark.slow
def test_the_tutorial(tmp_path: pathlib.Path) -> None:
    for program in ("openssl", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    programs = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("sh") == 5
    printed = ""
    for kind, text in blocks:
        if kind == "text":
            for line in text.splitlines():
                assert NUMBER.sub("0", line) in NUMBER.sub("0", printed).splitlines(), (line, printed)
            continue
        command = {"python": [sys.executable, "-c"], "sh": ["bash", "-ec"]}[kind]
        done = subprocess.run(
            [*command, text],
            cwd=tmp_path,
            env={**os.environ, "PATH": programs},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        printed = done.stdout
    assert (tmp_path / "good.xml").is_file()
    assert (tmp_path / "wrong.html").is_file()
