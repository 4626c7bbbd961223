"""What a model expects is read from its graph."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.input_spec import InputSpec, input_specs
from postquant.runtime_ops.errors import ModelError


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}'))


def test_names_dtypes_and_dynamic_axes() -> None:
    specs = input_specs(
        model("g (float[N, 3, 4] x, int64[N, L] ids, float s, uint8[2] b) => (float[N, 3, 4] y) { y = Mul(x, s) }")
    )
    assert specs == (
        InputSpec("x", np.dtype(np.float32), (None, 3, 4)),
        InputSpec("ids", np.dtype(np.int64), (None, None)),
        InputSpec("s", np.dtype(np.float32), ()),
        InputSpec("b", np.dtype(np.uint8), (2,)),
    )
    assert str(specs[0]) == "float32 [?, 3, 4]"


def test_inputs_with_a_default_need_no_data() -> None:
    found = model("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    assert [spec.name for spec in input_specs(found)] == ["x"]


@pytest.mark.parametrize("kind", ["seq(float[2])", "string[2]"])
def test_inputs_that_cannot_be_fed(kind: str) -> None:
    with pytest.raises(ModelError, match="input 's'"):
        input_specs(model(f"g (float[2] x, {kind} s) => (float[2] y) {{ y = Relu(x) }}"))


def test_fits() -> None:
    spec = InputSpec("x", np.dtype(np.float32), (None, 3))
    assert spec.fits((7, 3))
    assert not spec.fits((7, 4))
    assert not spec.fits((3,))
    assert InputSpec("x", np.dtype(np.float32), None).fits((1, 2, 3))
