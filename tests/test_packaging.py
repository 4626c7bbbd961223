"""What a user installs: the source archive builds a wheel, and the wheel is complete without the repository."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("runtime_ops", "passes", "calib", "pipeline")
# What a module needs beside it at run time; csrc and CMakeLists.txt build the library and stay behind.
DATA_SUFFIXES = (".toml", ".onnx", ".npz", ".md", ".j2")

# Without a compiler the library is left out (CONTRIBUTING.md).
NATIVE = os.environ.get("POSTQUANT_NATIVE", "ON") != "OFF"

SMOKE = """
import pathlib, sys
import onnxruntime
import postquant
from postquant.runtime_ops import library
assert pathlib.Path(postquant.__file__).is_relative_to(sys.prefix), postquant.__file__
print(library.library_path() if library.register(onnxruntime.SessionOptions()) else "")
"""


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        # What the caller's environment adds to the path is not what is installed.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def call_backend(hook: str, out: pathlib.Path, *, cwd: pathlib.Path) -> pathlib.Path:
    """Calls a build hook as an installer would, but with the build tools of this environment: no network."""
    code = f"import sys; from scikit_build_core.build import {hook}; print({hook}(sys.argv[1]))"
    return out / run(sys.executable, "-c", code, out, cwd=cwd).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return call_backend("build_sdist", tmp_path_factory.mktemp("sdist"), cwd=REPOSITORY)


@pytest.fixture(scope="module")
def wheel(sdist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return call_backend("build_wheel", folder, cwd=source)


def files_to_ship() -> set[str]:
    """Every file of the layers that a user needs, as a path below the package."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for layer in LAYERS
        for path in (REPOSITORY / layer).rglob("*")
        if path.suffix in (".py", *DATA_SUFFIXES) and "__pycache__" not in path.parts
    }


def test_sdist_holds_each_file_once(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    top = sdist.name.removesuffix(".tar.gz")
    names = [member.name for member in members]
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert {f"{top}/src/postquant/{name}" for name in files_to_ship()} <= set(names)
    assert f"{top}/src/postquant/runtime_ops/csrc/register.cc" in names
    assert f"{top}/LICENSE" in names
    assert not [name for name in names if name.split("/")[1] in LAYERS]


def test_wheel_is_complete(wheel: pathlib.Path) -> None:
    assert wheel.name.startswith("postquant-")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("postquant/") for name in archive.namelist() if name.startswith("postquant/")}
    assert files_to_ship() | {"__init__.py", "py.typed"} <= names
    assert not [name for name in names if "csrc" in name or "CMake" in name]
    assert len([name for name in names if name.startswith("runtime_ops/libpostquant_ops.")]) == NATIVE


def test_wheel_works_in_a_fresh_environment(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    environment = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    packages = pathlib.Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # The dependencies of this environment, without its own (possibly editable) postquant: a .pth file that is
    # reached through another .pth file is not executed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)
    library = run(python, "-P", "-c", SMOKE, cwd=tmp_path).strip()
    assert pathlib.Path(library).is_relative_to(environment) if NATIVE else not library
    assert "Usage" in run(environment / "bin" / "postquant", "--help", cwd=tmp_path)
