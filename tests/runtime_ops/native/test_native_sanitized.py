"""Operators and kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set.

``fuzz_operators.cc`` plays onnxruntime: random nodes, valid ones and spoiled ones, in memory that is exactly as large
as the tensors say. ``make fuzz`` runs it for longer. The first build takes minutes; it is kept in ``build/sanitize``.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
BUILD = REPOSITORY / "build" / "sanitize"
DRIVER = pathlib.Path(__file__).with_name("fuzz_operators.cc")
SETS = ["baseline", "neondot", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"]
SECONDS = "2"
NODES = "600"


def has_sanitizers(compiler: str, folder: pathlib.Path) -> bool:
    source = folder / "empty.cc"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = [compiler, "-fsanitize=address,undefined", str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The driver with all sources, built with sanitizers."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    # The build tools may stand beside this Python only: an environment need not be activated.
    folders = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=folders), shutil.which("ninja", path=folders)
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are not installed")
    if not has_sanitizers(compiler, tmp_path_factory.mktemp("probe")):
        pytest.skip("the C++ compiler has no sanitizers")
    configure = [cmake, "-S", str(REPOSITORY / "runtime_ops"), "-B", str(BUILD), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DPOSTQUANT_SANITIZE=ON", f"-DPOSTQUANT_TEST_DRIVER={DRIVER}"]
    for command in (configure, [cmake, "--build", str(BUILD), "--target", "postquant_operator_test"]):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "postquant_operator_test"


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_random_nodes(program: pathlib.Path, isa: str) -> None:
    environment = {**os.environ, "POSTQUANT_ISA": isa}
    seed = str(SETS.index(isa))
    done = subprocess.run(
        [str(program), seed, SECONDS, NODES], check=False, capture_output=True, text=True, env=environment
    )
    if "POSTQUANT_ISA" in done.stderr:
        pytest.skip(f"this machine or this build has no {isa}")
    assert done.returncode == 0, done.stderr
    word, runs, ran = done.stdout.split()
    assert word == "ok"
    assert int(ran) > int(runs) // 3, "too few of the nodes were valid"
