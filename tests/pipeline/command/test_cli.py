"""The command: exit codes, one-line errors, nothing but results on standard output."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from postquant.pipeline.cli import app
from postquant.pipeline.cli_options import read_options
from postquant.runtime_ops.errors import ConfigError

runner = CliRunner()


def _run(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def _one_line(result: Result, code: int = 2) -> str:
    """The only line on standard error, which starts with "error: "."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    return line


@pytest.mark.usefixtures("quick_stages")
class TestQuantize:
    def test_writes_prints_and_ends_with_0(
        self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        out = tmp_path / "out"
        result = _run("quantize", network, "--calib", samples, "--out", out, "--wbits", 4, "--no-smooth")
        assert result.exit_code == 0, result.output
        assert {p.name for p in out.iterdir()} >= {"model.onnx", "plan.safetensors", "report.json", "manifest.json"}
        settings = json.loads((out / "report.json").read_bytes())["settings"]
        assert (settings["wbits"], settings["abits"], settings["smooth"]) == (4, 8, False)
        for words in (
            "conv",
            "W4A8",
            "SQNR",
            "1 x Softmax (soft): ",
            "size ",
            "time ",
            "peak memory",
            "written to ",
        ):
            assert words in result.stdout
        assert "activations ..." in result.stderr
        assert "\x1b" not in result.output

    def test_quiet_prints_nothing(self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
        result = _run("quantize", network, "--calib", samples, "--out", tmp_path / "out", "--quiet")
        assert (result.exit_code, result.output) == (0, "")

    def test_json(self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
        result = _run("quantize", network, "--calib", samples, "--out", tmp_path / "out", "--json")
        data = json.loads(result.stdout)
        assert data["report"] == json.loads((tmp_path / "out" / "report.json").read_bytes())
        assert data["run"]["seconds"] > 0
        assert result.stderr == ""

    def test_options_win_over_the_file(
        self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        (tmp_path / "quant.toml").write_text("wbits = 4\nabits = 4\nfirst_last_bits = 7\nrounds = 3\n")
        result = _run(
            *("quantize", network, "--calib", samples, "--out", tmp_path / "out", "--config", tmp_path / "quant.toml"),
            *("--abits", 6, "--first-last-bits", "same", "--rounds", "auto", "--json"),
        )
        settings = json.loads(result.stdout)["report"]["settings"]
        assert [settings[k] for k in ("wbits", "abits", "first_last_bits", "rounds")] == [4, 6, None, None]

    def test_a_failed_verification_is_3(
        self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAIL_VERIFICATION", "1")
        result = _run("quantize", network, "--calib", samples, "--out", tmp_path / "out")
        assert "kept aside in" in _one_line(result, 3)

    def test_an_interrupt_is_130_and_says_how_to_go_on(
        self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = ("quantize", network, "--calib", samples, "--out", tmp_path / "out")
        monkeypatch.setenv("INTERRUPT_AFTER", "weights")
        result = _run(*arguments)
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1].startswith("interrupted; run the same command again to go on")
        monkeypatch.delenv("INTERRUPT_AFTER")
        again = _run(*arguments)
        assert again.exit_code == 0
        assert "resuming after 2 finished stages" in again.stderr

    def test_too_little_memory(
        self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(job: object) -> None:
            raise MemoryError

        monkeypatch.setattr("postquant.pipeline.api.run_pipeline", fail)
        result = _run("quantize", network, "--calib", samples, "--out", tmp_path / "out")
        assert "not enough memory" in _one_line(result)

    @pytest.mark.parametrize(
        ("changed", "sentence"),
        [
            (("--wbits", "9"), "option --wbits has a wrong value: expected a whole number from 2 to 8, found "),
            (("--wbits", "many"), 'found "many"'),
            (("--method", "easyqant"), 'perhaps "easyquant" was meant'),
            (("--rounds", "never"), 'expected a whole number from 1 to 100, or "auto", found "never"'),
            (("--target", "toaster"), "there is no such target (target): expected generic, ncnn, onnxruntime, "),
            (("--config", "absent.toml"), "the configuration cannot be read (absent.toml)"),
            (("--custom-ops", "absent.so"), "no such library of custom operators"),
            (("--alpha", "1.5"), "the candidates of the scale search leave out the starting scale"),
        ],
    )
    def test_wrong_options(
        self,
        network: pathlib.Path,
        samples: pathlib.Path,
        tmp_path: pathlib.Path,
        changed: tuple[str, str],
        sentence: str,
    ) -> None:
        result = _run("quantize", network, "--calib", samples, "--out", tmp_path / "out", *changed)
        assert sentence in _one_line(result)
        assert not (tmp_path / "out").exists()

    def test_wrong_files(
        self, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path, small_pipeline: types.ModuleType
    ) -> None:
        def message(model: pathlib.Path, data: pathlib.Path, out: pathlib.Path = tmp_path / "out") -> str:
            return _one_line(_run("quantize", model, "--calib", data, "--out", out))

        (tmp_path / "cut.onnx").write_bytes(network.read_bytes()[:100])
        (tmp_path / "text.onnx").write_text("hello")
        array = np.load(samples)["x"]
        files = {"empty": {"x": array[:0]}, "extra": {"x": array, "z": array}, "rank": {"x": array[:, 0]}}
        nan = array.copy()
        nan[3, 0, 1, 2] = np.nan
        files["nan"] = {"x": nan}
        for name, content in files.items():
            np.savez(tmp_path / f"{name}.npz", **content)
        assert "truncated" in message(tmp_path / "cut.onnx", samples)
        assert "not an ONNX model" in message(tmp_path / "text.onnx", samples)
        assert "there is no such model file" in message(tmp_path / "absent.onnx", samples)
        assert "do not exist" in message(network, tmp_path / "absent.npz")
        assert "no samples" in message(network, tmp_path / "empty.npz")
        assert "'z'" in message(network, tmp_path / "extra.npz")
        assert "shape" in message(network, tmp_path / "rank.npz")
        assert re.search(r"NaN.*sample 3|sample 3.*NaN", message(network, tmp_path / "nan.npz"))
        assert "the output folder is a file" in message(network, samples, samples)


def test_usage_errors_are_2() -> None:
    unknown = ("quantize", "m.onnx", "--calib", "c", "--out", "o", "--wbit", "4")
    for arguments in ((), ("quantize",), ("quantise",), unknown):
        result = _run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"postquant": "1.2.3"}.get(name, "0"))
    result = _run("--version")
    assert (result.exit_code, result.stdout) == (0, "postquant 1.2.3\n")


def test_targets() -> None:
    assert "onnxruntime-avx2" in _run("targets").stdout
    names = [target["name"] for target in json.loads(_run("targets", "--json").stdout)]
    assert "onnxruntime" in names


def test_help_names_every_setting_and_is_quick() -> None:
    text = re.sub(r"\s+", " ", _run("quantize", "--help").stdout)
    for option in ("--wbits", "--first-last-bits", "--no-bias-correction", "--weight-storage", "--custom-ops"):
        assert option in text
    assert "one of easyquant, mse, minmax, entropy, percentile [default: easyquant]" in text
    assert "from 2 to 8, or same [default: 8]" in text
    command = [sys.executable, "-c", "from postquant.pipeline.cli import main; main()", "--help"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    assert time.perf_counter() - start < 5.0  # half a second on an idle machine


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "import sys, postquant, postquant.pipeline.cli; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"onnx", "onnxruntime", "scipy", "onnx_ir", "torch"} & set(modules)


def test_a_closed_pipe_is_no_error(network: pathlib.Path) -> None:
    code = "from postquant.pipeline.cli import main; main()"
    command = f"{sys.executable} -c '{code}' targets --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_options_are_read_by_their_settings() -> None:
    given = {
        "wbits": "4",
        "beta": "3",
        "rounds": "auto",
        "target": "8",
        "smooth": False,
        "seed": None,
        "custom_ops": [],
    }
    assert read_options(given) == {"wbits": 4, "beta": 3.0, "rounds": "auto", "target": "8", "smooth": False}
    with pytest.raises(ConfigError, match=r"the option --first-last-bits has a wrong value.*\"same\".*found \"1\""):
        read_options({"first_last_bits": "1"})
