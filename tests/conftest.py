"""Fixtures for every test: where the real models and data lie."""

import os
import pathlib

import pytest

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real models and data: ``POSTQUANT_DATA``, else ``../shared/data`` beside the repository.

    They are too large to ship, so a test that needs them is skipped where they are absent; with ``CI=true``
    it fails instead, because there nothing may be left out unnoticed.
    """
    folder = pathlib.Path(os.environ.get("POSTQUANT_DATA", _REPOSITORY.parent / "shared" / "data"))
    if not (folder / "eval.py").is_file():
        reason = f"no real models in {folder}; set POSTQUANT_DATA to the folder that holds eval.py"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
