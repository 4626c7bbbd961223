"""Plans with code books on disk."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.code_book import CodeBook, post_table
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec


def f32(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def i8(values: npt.ArrayLike) -> npt.NDArray[np.int8]:
    return np.array(values, np.int8)


def quantizers() -> dict[str, TensorQuantizer]:
    scale, zero, codes = f32([1, 2]), np.zeros(2, np.int32), i8([[96, 0], [0, -96]])
    tables = {CodeBook.LEARNED: np.sort(post_table(4)), CodeBook.POST: None, CodeBook.UNIFORM: None}
    return {
        book.value: TensorQuantizer(QuantSpec(4, True, True, 0, code_book=book), scale, zero, codes, table)
        for book, table in tables.items()
    }


def test_code_books_survive_the_disk(tmp_path: pathlib.Path) -> None:
    before = quantizers()
    QuantPlan("onnxruntime", weights=before).save(tmp_path / "plan")
    after = QuantPlan.load(tmp_path / "plan").weights
    for name, old in before.items():
        new = after[name]
        assert isinstance(new, TensorQuantizer)
        assert new.spec == old.spec
        for one, two in ((new.scale, old.scale), (new.codes, old.codes), (new.table, old.table)):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_plans_from_before_code_books_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "plan"
    QuantPlan("onnxruntime", weights={"w": quantizers()["int"]}).save(path)
    content = path.read_bytes()
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["postquant"])
    del header["weights"]["w"]["code_book"]
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(content), {"postquant": json.dumps(header)}))
    entry = QuantPlan.load(path).weights["w"]
    assert isinstance(entry, TensorQuantizer)
    assert entry.spec.code_book is CodeBook.UNIFORM
