"""The look-up table kernels for AArch64, cross-compiled and run under an emulator, equal a plain loop."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).resolve().parents[2] / "runtime_ops" / "csrc"
SOURCES = ("isa", "lut_memory", "lut_pack", "lut_plan", "lut_prepare", "lut_run", "lut_table", "lut_isa_baseline")


def test_kernels_under_emulation(tmp_path: pathlib.Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("g++-aarch64-linux-gnu or qemu-user is not installed")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wold-style-cast"]
    flags += ["-Werror", "-ffp-contract=off", "-DPOSTQUANT_BUILD_NEONDOT", f"-I{CSRC}"]
    dot = tmp_path / "neondot.o"
    program = tmp_path / "selfcheck"
    check = pathlib.Path(__file__).with_name("lut_selfcheck.cc")
    sources = [*(str(CSRC / f"{name}.cc") for name in SOURCES), str(check), str(dot)]
    commands = (
        [compiler, *flags, "-march=armv8.2-a+dotprod", "-c", str(CSRC / "lut_isa_neondot.cc"), "-o", str(dot)],
        [compiler, *flags, "-static", *sources, "-o", str(program)],
    )
    for command in commands:
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    run = subprocess.run([emulator, "-cpu", "max", str(program)], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "baseline neondot ok\n"), run.stdout + run.stderr
