"""One library binary on old and new onnxruntimes. ``make test-ort-versions`` makes the environments.

Each environment holds nothing but onnxruntime and NumPy. From 1.17 on the native kernels run; below, the library loads
and the function bodies run.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.runtime_ops.native.conftest import Native, Node, Nodes

FOLDER = os.environ.get("POSTQUANT_ORT_VERSIONS", "")
VERSIONS = sorted(path.parents[1] for path in pathlib.Path(FOLDER).glob("*/bin/python")) if FOLDER else []
FIRST_WITH_KERNELS = (1, 17)

pytestmark = pytest.mark.skipif(not FOLDER, reason="make test-ort-versions runs this")


def some_of_each(nodes: Nodes) -> dict[str, Node]:
    rng = np.random.default_rng(4)
    made = {
        "conv": nodes.lut_conv(rng, w_shape=(9, 3, 3, 3), pads=[1] * 4, batch=2),
        "conv_signed": nodes.lut_conv(rng, dtype=np.int8, bits=2),
        "conv_line": nodes.lut_conv(rng, w_shape=(4, 2, 3), spatial=(9,)),
        "matmul": nodes.lut_matmul(rng, outer=(2, 3), outputs=33, inputs=40),
        "matmul_signed": nodes.lut_matmul(rng, dtype=np.int8),
        "float": nodes.lut_matmul_to_float(rng, outer=(2, 3), outputs=33, inputs=40),
        "float_signed": nodes.lut_matmul_to_float(rng, dtype=np.int8),
        "adaptive": nodes.adaptive(rng),
        "requantize": nodes.adaptive(rng, requantize=True),
        "border": nodes.border(rng, window=(3, 3), rank=2, table=True),
        "levels": nodes.levels(rng),
        "feedback": nodes.feedback(rng),
        "feedback_cells": nodes.feedback(rng, shape=(2, 3, 5, 7), cell=2),
    }
    matmul = nodes.lut_matmul(rng)
    made["computed"] = matmul.changed(fed=set(matmul.inputs))
    return made


@pytest.mark.parametrize("environment", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("native_kernels", [True, False], ids=["native", "body"])
def test_version(
    native: Native, nodes: Nodes, environment: pathlib.Path, native_kernels: bool, tmp_path: pathlib.Path
) -> None:
    python = str(environment / "bin" / "python")
    made = some_of_each(nodes)
    results, version = native.run_apart(made, tmp_path, threads=(1, 2), python=python, native=native_kernels)
    has_kernels = native_kernels and tuple(int(part) for part in version.split(".")[:2]) >= FIRST_WITH_KERNELS
    for name, node in made.items():
        for outputs in results[name]:
            assert not isinstance(outputs, str), f"{name} on onnxruntime {version}: {outputs}"
            for output, expected in zip(outputs, node.expected(), strict=True):
                assert output.shape == expected.shape
                if has_kernels:
                    np.testing.assert_array_equal(output, expected, err_msg=name)
                else:  # onnxruntime's kernels may break a tie differently
                    np.testing.assert_allclose(
                        output.astype(np.float64), expected.astype(np.float64), rtol=1e-6, atol=1, err_msg=name
                    )
