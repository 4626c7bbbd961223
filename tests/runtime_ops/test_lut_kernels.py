"""The look-up table kernels, driven through their C interface without onnxruntime, equal the NumPy law to the bit.

Every instruction set of this machine, both bit widths, both types, sizes around every tile.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.law_lut import (
    LutWeight,
    lut_matmul_integer_to_float,
    lut_qlinear_conv,
    lut_qlinear_matmul,
    pack_codes,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY_VARIABLE = "POSTQUANT_LUT_TEST_LIBRARY"
ISAS = ("baseline", "neondot", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx")
OK, OUT_OF_MEMORY, BAD_SHAPE, BAD_NUMBERS = range(4)

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution: weight (outputs, inputs of a group, height, width), pairs for the axes, pads begin then end."""

    shape: tuple[int, int, int, int]
    group: int = 1
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def geometry(self) -> list[int]:
        """The integers of ``lut_make``."""
        outputs, inner, *kernel = self.shape
        return [outputs, inner * self.group, self.group, *kernel, *self.strides, *self.dilations, *self.pads]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Numbers of a layer; ``conv`` is None for a matrix product, whose output is float where its bias is."""

    weight: LutWeight
    bias: Array
    xq: Affine
    yq: Affine
    conv: Conv | None = None

    @property
    def floats(self) -> bool:
        """Whether the output is float."""
        return self.bias.dtype == np.float32

    def law(self, x: Array) -> Array:
        """What the kernels must write."""
        if self.floats:
            return lut_matmul_integer_to_float(x, self.xq, self.weight, self.bias)
        if self.conv is None:
            codes = lut_qlinear_matmul(x, self.xq, self.weight, self.bias, self.yq).codes
        else:
            c = self.conv
            codes = lut_qlinear_conv(
                x, self.xq, self.weight, self.bias, self.yq,
                group=c.group, strides=c.strides, dilations=c.dilations, pads=c.pads,
            ).codes  # fmt: skip
        return codes.astype(self.yq.dtype)


def pointer(array: Array) -> ctypes.c_void_p:
    """The address of a dense array."""
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


class Kernels:
    """The library of ``lut_test_entry.cc``."""

    def __init__(self, path: pathlib.Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.lut_isa_name.restype = ctypes.c_char_p
        self.library.lut_free.argtypes = [ctypes.c_void_p]
        names = [self.library.lut_isa_name(i).decode() for i in range(len(ISAS))]
        assert tuple(names) == ISAS

    def has(self, isa: str) -> bool:
        """Whether the machine and the build have the set."""
        return bool(self.library.lut_isa_available(ISAS.index(isa)))

    def make(self, isa: str, layer: Layer, out: ctypes.c_void_p) -> int:
        """Prepares a layer; the status."""
        geometry = np.array(layer.conv.geometry if layer.conv else layer.weight.shape, np.int64)
        integers = np.array(
            [layer.xq.zero_point, layer.xq.dtype == np.int8, layer.yq.zero_point, layer.yq.dtype == np.int8], np.int32
        )
        w = layer.weight
        status = self.library.lut_make(
            ISAS.index(isa), int(layer.conv is None), pointer(geometry), pointer(w.codes), w.bits, pointer(w.table),
            pointer(w.scale), pointer(layer.bias), ctypes.c_float(float(layer.xq.scale)),
            ctypes.c_float(float(layer.yq.scale)), pointer(integers), pointer(layer.bias) if layer.floats else None,
            ctypes.byref(out),
        )  # fmt: skip
        return int(status)

    def run(self, isa: str, layer: Layer, x: Array, *, backwards: bool = False) -> Array:
        """The output of one call; ``backwards`` runs the items of each phase in reverse order, one at a time."""
        made = ctypes.c_void_p()
        assert self.make(isa, layer, made) == OK
        try:
            size = np.array([x.shape[0], *(x.shape[2:] if layer.conv else ())], np.int64)
            spatial = np.zeros(2, np.int64)
            assert self.library.lut_run(made, pointer(size), pointer(x), None, pointer(spatial), 0, 1) == OK
            shape = (x.shape[0], len(layer.bias), *(spatial if layer.conv else ()))
            # A guard behind the result: nothing is written there.
            buffer = np.full(int(np.prod(shape)) + 64, 77, np.float32 if layer.floats else layer.yq.dtype)
            status = self.library.lut_run(
                made, pointer(size), pointer(x), pointer(buffer), pointer(spatial), int(backwards), 1
            )
            assert status == OK
            assert (buffer[-64:] == 77).all()
            return buffer[:-64].reshape(shape)
        finally:
            self.library.lut_free(made)


@pytest.fixture(scope="session")
def kernels(lut_library: pathlib.Path) -> Kernels:
    return Kernels(lut_library)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, kernels: Kernels) -> str:
    name = str(request.param)
    if not kernels.has(name):
        pytest.skip(f"this machine or build has no {name}")
    return name


def numbers(scale: float, zero_point: int, dtype: Any) -> Affine:
    """Numbers of an activation."""
    return Affine(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), np.dtype(dtype))


def random_layer(
    rng: np.random.Generator, shape: Sequence[int], bits: int, dtype: Any, conv: Conv | None = None
) -> Layer:
    """A layer whose outputs fill the range of their type, saturating at both ends now and then."""
    terms = int(np.prod(shape[1:]))
    info = np.iinfo(dtype)
    codes = pack_codes(rng.integers(0, 1 << bits, (shape[0], terms)), bits)
    table = rng.integers(-128, 128, 1 << bits).astype(np.int8)
    scale = rng.uniform(0.5, 2, shape[0]).astype(np.float32)
    zero = [int(z) for z in rng.integers(info.min, info.max + 1, 2)]
    xq = numbers(0.05, zero[0], dtype)
    yq = numbers(0.05 * 150 * terms**0.5, zero[1], dtype)
    bias = rng.integers(-9000, 9000, shape[0]).astype(np.int32)
    return Layer(LutWeight(codes, table, scale, bits, tuple(shape)), bias, xq, yq, conv)


def float_layer(rng: np.random.Generator, layer: Layer) -> Layer:
    """The same layer with a float output."""
    return dataclasses.replace(layer, bias=rng.normal(0, 100, len(layer.bias)).astype(np.float32))


def random_codes(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> Array:
    """Codes of the whole type, its ends included."""
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def check(kernels: Kernels, isa: str, layer: Layer, x: Array, *, backwards: bool = False) -> None:
    """Kernel equals law."""
    np.testing.assert_array_equal(kernels.run(isa, layer, x, backwards=backwards), layer.law(x))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("bits", [4, 2])
def test_matrix_product(kernels: Kernels, isa: str, bits: int, dtype: Any) -> None:
    rng = np.random.default_rng(bits)
    inputs = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 200]
    outputs = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 128, 130]
    for index, rows in enumerate([1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 95, 96, 97, 130]):
        for _ in range(4):
            layer = random_layer(rng, (int(rng.choice(outputs)), int(rng.choice(inputs))), bits, dtype)
            x = random_codes(rng, (rows, layer.weight.shape[1]), dtype)
            check(kernels, isa, layer, x, backwards=index % 2 == 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("bits", [4, 2])
def test_float_outputs(kernels: Kernels, isa: str, bits: int, dtype: Any) -> None:
    rng = np.random.default_rng(bits + 7)
    for index, rows in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 13, 15, 16, 17, 32, 33, 95, 96, 97, 130]):
        for outputs in (1, 8, 16, 17, int(rng.integers(1, 64)), 64, int(rng.integers(65, 200))):
            layer = float_layer(rng, random_layer(rng, (outputs, int(rng.integers(1, 200))), bits, dtype))
            x = random_codes(rng, (rows, layer.weight.shape[1]), dtype)
            check(kernels, isa, layer, x, backwards=index % 2 == 1)
    layer = float_layer(rng, random_layer(rng, (200, 4099), bits, dtype))
    for rows in (1, 40):
        check(kernels, isa, layer, random_codes(rng, (rows, 4099), dtype))


def test_float_outputs_of_extreme_sums(kernels: Kernels, isa: str) -> None:
    # Sums beyond int32 wrap around; those beyond 2^24 are rounded when they become float.
    rng = np.random.default_rng(1)
    layer = random_layer(rng, (5, 70000), 4, np.uint8)
    table = np.array([-128, 127] * 8, np.int8)
    weight = dataclasses.replace(layer.weight, table=table, codes=np.full_like(layer.weight.codes, 0x11))
    layer = float_layer(rng, dataclasses.replace(layer, weight=weight, xq=numbers(0.37, 0, np.uint8)))
    for rows in (1, 9):
        check(kernels, isa, layer, np.full((rows, 70000), 255, np.uint8))
        check(kernels, isa, layer, rng.integers(100, 256, (rows, 70000)).astype(np.uint8))


def test_convolutions_have_no_float_output(kernels: Kernels, isa: str) -> None:
    conv = Conv((5, 2, 3, 3))
    rng = np.random.default_rng(0)
    layer = float_layer(rng, random_layer(rng, conv.shape, 4, np.uint8, conv))
    assert kernels.make(isa, layer, ctypes.c_void_p()) == BAD_SHAPE


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_long_products(kernels: Kernels, isa: str, rows: int) -> None:
    # Beyond what AMX packs at a time, and several items of every phase.
    rng = np.random.default_rng(rows)
    for inputs in (4096, 4099):
        layer = random_layer(rng, (200, inputs), 4, np.uint8)
        check(kernels, isa, layer, random_codes(rng, (rows, inputs), np.uint8), backwards=True)


CONVOLUTIONS: Mapping[str, tuple[Conv, tuple[int, int]]] = {
    "3x3": (Conv((64, 64, 3, 3), pads=(1, 1, 1, 1)), (14, 14)),
    "3x3 wide": (Conv((65, 16, 3, 3), pads=(1, 1, 1, 1)), (10, 33)),
    "3x3 odd channels": (Conv((67, 33, 3, 3), pads=(1, 1, 1, 1)), (9, 11)),
    "image": (Conv((17, 3, 7, 7), strides=(2, 2), pads=(3, 3, 3, 3)), (23, 21)),
    "1x1": (Conv((96, 40, 1, 1)), (7, 7)),
    "1x1 several items": (Conv((70, 16, 1, 1)), (40, 41)),
    "1x1 padded": (Conv((13, 6, 1, 1), pads=(1, 0, 2, 0)), (5, 6)),
    "3x3 far padding": (Conv((20, 7, 3, 3), dilations=(2, 3), pads=(4, 7, 3, 5)), (7, 3)),
    "3x3 groups": (Conv((24, 8, 3, 3), group=3, pads=(1, 1, 1, 1)), (20, 18)),
    "wide kernel": (Conv((7, 4, 1, 9), pads=(0, 4, 0, 4)), (3, 21)),
    "1x1 one pixel": (Conv((130, 64, 1, 1)), (1, 1)),
    "1x1 strided": (Conv((16, 24, 1, 1), strides=(2, 2)), (9, 10)),
    "dilated": (Conv((20, 17, 3, 3), dilations=(2, 3), pads=(2, 3, 2, 3)), (12, 13)),
    "uneven": (Conv((9, 5, 3, 2), strides=(2, 3), dilations=(2, 1), pads=(2, 0, 1, 3)), (13, 12)),
    "1-D": (Conv((24, 12, 1, 5), strides=(1, 2), pads=(0, 2, 0, 1)), (1, 50)),
    "padding only": (Conv((8, 4, 2, 2), strides=(3, 3), pads=(3, 3, 3, 3)), (1, 1)),
    "groups": (Conv((36, 5, 3, 3), group=3, pads=(1, 1, 1, 1)), (8, 9)),
    "wide groups": (Conv((140, 20, 1, 3), group=2, pads=(0, 1, 0, 1)), (5, 20)),
    "one channel": (Conv((20, 1, 3, 3), pads=(1, 1, 1, 1)), (12, 12)),
    "large kernel": (Conv((16, 32, 11, 9), pads=(5, 4, 5, 4)), (12, 9)),
    "long packed rows": (Conv((70, 300, 3, 3), pads=(1, 1, 1, 1)), (7, 7)),
    "depthwise": (Conv((19, 1, 3, 3), group=19, pads=(1, 1, 1, 1)), (14, 14)),
    "depthwise wide": (Conv((3, 1, 3, 3), group=3, pads=(1, 1, 1, 1)), (5, 300)),
    "depthwise strided": (Conv((8, 1, 3, 3), group=8, strides=(2, 2), pads=(0, 0, 1, 1)), (15, 70)),
    "depthwise 5x5": (Conv((8, 1, 5, 5), group=8, pads=(2, 2, 2, 2)), (7, 17)),
    "depthwise 5x5 strided": (Conv((8, 1, 5, 5), group=8, strides=(2, 2), pads=(2, 2, 2, 2)), (28, 28)),
    "depthwise 7x9": (Conv((4, 1, 7, 9), group=4, strides=(1, 3), pads=(3, 4, 3, 4)), (9, 40)),
    "depthwise dilated": (Conv((6, 1, 3, 3), group=6, dilations=(3, 4), pads=(3, 4, 3, 4)), (12, 40)),
    "depthwise far": (Conv((4, 1, 2, 4), group=4, strides=(1, 5), dilations=(1, 7)), (3, 90)),
    "depthwise small": (Conv((37, 1, 3, 3), group=37, pads=(1, 1, 1, 1)), (7, 7)),
    "depthwise small strided": (Conv((37, 1, 3, 3), group=37, strides=(2, 2), pads=(1, 1, 1, 1)), (14, 14)),
    "depthwise long and narrow": (Conv((3, 1, 3, 3), group=3, pads=(1, 1, 1, 1)), (300, 2)),
    "depthwise one column": (Conv((5, 1, 3, 1), group=5, strides=(2, 1), pads=(1, 0, 1, 0)), (9, 1)),
    "depthwise far padding": (Conv((5, 1, 3, 3), group=5, dilations=(1, 3), pads=(4, 8, 5, 7)), (29, 4)),
    "depthwise small image": (Conv((5, 1, 3, 3), group=5, pads=(1, 1, 1, 1)), (1, 1)),
    "depthwise 3x2": (Conv((6, 1, 3, 2), group=6, strides=(3, 2), pads=(2, 1, 0, 1)), (20, 30)),
    "depthwise multiplied": (Conv((12, 1, 3, 3), group=4, pads=(1, 1, 1, 1)), (8, 8)),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(kernels: Kernels, isa: str, case: str, dtype: Any) -> None:
    rng = np.random.default_rng(len(case))
    conv, spatial = CONVOLUTIONS[case]
    for bits, batch in ((4, 2), (2, 1)):
        layer = random_layer(rng, conv.shape, bits, dtype, conv)
        x = random_codes(rng, (batch, conv.shape[1] * conv.group, *spatial), dtype)
        check(kernels, isa, layer, x, backwards=bits == 2)


@pytest.mark.parametrize("seed", range(4))
def test_random_convolutions(kernels: Kernels, isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        group = int(rng.choice([1, 1, 2, 5]))
        inner, outer = (1, 1) if rng.random() < 0.3 else (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
        kernel, strides, dilations, begin, end = (
            tuple(int(v) for v in rng.integers(low, high, 2)) for low, high in ((1, 5), (1, 4), (1, 4), (0, 4), (0, 4))
        )
        reach = [(k - 1) * d + 1 - b - e for k, d, b, e in zip(kernel, dilations, begin, end, strict=True)]
        spatial = [max(r, 1) + int(rng.integers(0, 20)) for r in reach]
        shape = (group * outer, inner, kernel[0], kernel[1])
        conv = Conv(shape, group, (strides[0], strides[1]), (dilations[0], dilations[1]), (*begin, *end))  # type: ignore[arg-type]
        dtype = np.uint8 if rng.random() < 0.5 else np.int8
        layer = random_layer(rng, shape, int(rng.choice([2, 4])), dtype, conv)
        check(kernels, isa, layer, random_codes(rng, (1, group * inner, *spatial), dtype))


@pytest.mark.parametrize("rows", [1, 8])
def test_extreme_sums(kernels: Kernels, isa: str, rows: int) -> None:
    # Neighbouring products of the largest size would saturate 16 bits; sums beyond int32 wrap around.
    table = np.array([-128, 127] * 8, np.int8)
    for level, bias in ((0, -5), (1, 7), (1, 2**31 - 1), (0, -(2**31))):
        codes = pack_codes(np.full((70, 1000), level), 4)
        weight = LutWeight(codes, table, np.full(70, 1.0, np.float32), 4, (70, 1000))
        xq = numbers(1, 0, np.uint8)
        yq = numbers(3e5, 100, np.uint8)
        layer = Layer(weight, np.full(70, bias, np.int32), xq, yq)
        check(kernels, isa, layer, np.full((rows, 1000), 255, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("conv", [None, Conv((3, 1, 1, 1), group=3)])
def test_rounding_and_saturation(kernels: Kernels, isa: str, conv: Conv | None, dtype: Any) -> None:
    # Ties go to even; products beyond int32 saturate.
    table = np.array([1, -1, 127, 0], np.int8)
    for factor in (0.5, 0.25, 1.0, 3e7, 1e30, 1e-30):
        shape = conv.shape if conv else (3, 1)
        weight = LutWeight(np.array([[0], [1], [2]], np.uint8), table, np.full(3, factor, np.float32), 2, shape)
        for zero in (np.iinfo(dtype).min, 3, np.iinfo(dtype).max):
            affine = numbers(1, zero, dtype)
            layer = Layer(weight, np.array([0, 1, -1], np.int32), affine, affine, conv)
            x = np.arange(256).astype(np.uint8).view(dtype)
            check(kernels, isa, layer, np.tile(x, (1, 3, 1, 1)).reshape(1, 3, 16, 16) if conv else x.reshape(-1, 1))


def test_empty_sizes(kernels: Kernels, isa: str) -> None:
    rng = np.random.default_rng(0)
    check(kernels, isa, random_layer(rng, (5, 9), 4, np.uint8), np.zeros((0, 9), np.uint8))
    conv = Conv((5, 2, 1, 1))
    check(kernels, isa, random_layer(rng, conv.shape, 4, np.uint8, conv), np.zeros((0, 2, 3, 3), np.uint8))


def test_refusals(kernels: Kernels, isa: str) -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(rng, (5, 9), 4, np.uint8)
    scale = np.full(5, 1e30, np.float32)
    huge = dataclasses.replace(
        layer,
        weight=dataclasses.replace(layer.weight, scale=scale),
        xq=dataclasses.replace(layer.xq, scale=np.asarray(1e30, np.float32)),
    )
    assert kernels.make(isa, huge, ctypes.c_void_p()) == BAD_NUMBERS
    conv = Conv((5, 2, 3, 3))
    made = ctypes.c_void_p()
    assert kernels.make(isa, random_layer(rng, conv.shape, 4, np.uint8, conv), made) == OK
    spatial = np.zeros(2, np.int64)
    for size in ((1, 2, 3), (1, 3, -1), (-1, 3, 3), (2**62, 3, 3), (2**40, 2**40, 2**40), (1, 2**62, 4)):
        status = kernels.library.lut_run(made, pointer(np.array(size, np.int64)), None, None, pointer(spatial), 0, 1)
        assert status == BAD_SHAPE, size
    kernels.library.lut_free(made)
    for bad in (dataclasses.replace(conv, strides=(0, 1)), dataclasses.replace(conv, pads=(-1, 0, 0, 0))):
        wrong = dataclasses.replace(random_layer(rng, conv.shape, 4, np.uint8, conv), conv=bad)
        assert kernels.make(isa, wrong, ctypes.c_void_p()) == BAD_SHAPE


@pytest.mark.slow
def test_clean_under_sanitizers(lut_build: Callable[..., pathlib.Path]) -> None:
    """Some tests above in a process of their own, with address and undefined-behaviour checks."""
    if LIBRARY_VARIABLE in os.environ:
        pytest.skip("this is that process")
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], check=False, capture_output=True, text=True)
    asan = pathlib.Path(runtime.stdout.strip())
    if not asan.is_absolute():
        pytest.skip("the compiler has no sanitizer runtime")
    library = lut_build(
        ROOT / "build" / "lut-test-sanitized", "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    )
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "uint8 and 4 or uint8 and convolution"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    environment = os.environ | {
        LIBRARY_VARIABLE: str(library),
        "LD_PRELOAD": str(asan),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
