"""The examples run as they are."""

import pathlib
import re
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quantize_cnn(tmp_path: pathlib.Path) -> None:
    output = run("quantize_cnn.py", "--out", str(tmp_path / "out"))
    numbers = dict(re.findall(r"(\w+): +(0\.\d+)", output))
    assert float(numbers["int8"]) >= float(numbers["float"]) - 0.005
    assert (tmp_path / "out" / "int8" / "report.json").is_file()


def test_from_python() -> None:
    output = run("from_python.py")
    assert re.search(r"weights quantized: [1-9]", output)
    assert "left in float: " in output
