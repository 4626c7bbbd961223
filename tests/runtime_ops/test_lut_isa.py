"""Instruction sets of the look-up table kernels: no code of one in another, and which one is chosen."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ISAS = ("baseline", "neondot", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx")


def test_no_symbol_of_one_instruction_set_can_stand_in_for_another(lut_library: pathlib.Path) -> None:
    # The linker keeps one copy of a weak symbol, whatever the set it was compiled for.
    folder = lut_library.parent / "CMakeFiles" / "postquant_lut_test.dir" / "csrc"
    objects = sorted(folder.glob("lut_isa_*.o"))
    nm = shutil.which("nm")
    if nm is None or not objects:
        pytest.skip("there are no object files, or nm is not installed")
    for path in objects:
        listing = subprocess.run([nm, "--defined-only", str(path)], check=True, capture_output=True, text=True)
        shared = [line.split()[-1] for line in listing.stdout.splitlines() if line.split()[-2] not in "tbdr"]
        assert [name for name in shared if not name.endswith("TableEv")] == [], path.name


PRINT_SELECTED = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.lut_isa_problem.restype = ctypes.c_char_p
problem = library.lut_isa_problem()
print(library.lut_isa_selected(), (problem or b"").decode())
"""


@pytest.mark.parametrize("name", [*ISAS, "", "sse9"])
def test_instruction_set_is_forced_by_the_environment(lut_library: pathlib.Path, name: str) -> None:
    command = [sys.executable, "-c", PRINT_SELECTED, str(lut_library)]
    environment = os.environ | {"POSTQUANT_ISA": name}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    index, _, problem = result.stdout.strip().partition(" ")
    selected = ISAS[int(index)]
    library = ctypes.CDLL(str(lut_library))
    available = [isa for i, isa in enumerate(ISAS) if library.lut_isa_available(i)]
    if name in ISAS:
        assert selected == [isa for isa in available if ISAS.index(isa) <= ISAS.index(name)][-1]
        assert bool(problem) == (name not in available)
    else:
        assert selected == available[-1]
        assert bool(problem) == bool(name)
