"""Quality of stored tensors: what a large model gives chunk by chunk is what it gives at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.passes.lut_expansion import with_qdq
from postquant.passes.session import make_session
from postquant.pipeline import quality
from postquant.pipeline.quality import FloatChunks, stored_tensor_quality
from postquant.pipeline.stored import find_stored

NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[2,3] x) => (float[2,3] y) {
    early = Exp (x)
    a = Neg (early)
    best = ArgMax <axis = 1> (a)
    f = Cast <to = 1> (best)
    b = Mul (a, f)
    yes = Constant <value = bool {1}> ()
    y = If (yes) <
        then_branch = t () => (float[2,3] t1) { t1 = Add (b, early) },
        else_branch = e () => (float[2,3] e1) { e1 = Sub (b, early) }
    >
}"""


@pytest.mark.parametrize(("chunk_bytes", "kept_bytes"), [(1, 1 << 20), (3000, 1 << 20), (3000, 0), (1 << 30, 1 << 20)])
def test_chunks_start_where_the_last_one_ended(
    cases: Any, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, kept_bytes: int
) -> None:
    case = cases.build()
    stored = find_stored(case.model, with_qdq(case.emitted), case.plan)
    whole = stored_tensor_quality(case.model, case.emitted, stored, case.samples)
    monkeypatch.setattr(quality, "_PREPACKED_BYTES", 0)
    monkeypatch.setattr(quality, "_KEPT_BYTES", kept_bytes)
    monkeypatch.setattr("postquant.pipeline.chunks.CHUNK_BYTES", chunk_bytes)
    starts = []

    def recorded(model: Any, **options: Any) -> Any:
        starts.append(options.get("inputs"))
        return make_session(model, **options)

    monkeypatch.setattr(quality, "make_session", recorded)
    parts = stored_tensor_quality(case.model, case.emitted, stored, case.samples)
    assert [item.name for item in parts] == [item.name for item in whole]
    for part, one in zip(parts, whole, strict=True):
        assert part.sqnr_db == pytest.approx(one.sqnr_db, abs=1e-2)
        assert part.cosine == pytest.approx(one.cosine, abs=1e-5)
    inner = [start for start in starts if start is not None and set(start) != {"image"}]
    assert bool(inner) == (chunk_bytes < 1 << 30 and kept_bytes > 0)


def test_captures_of_a_subgraph_and_integers_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of the If reads "early", which no node behind the first chunk has among its inputs."""
    model = ir.from_proto(onnx.parser.parse_model(NETWORK))
    samples = [{"x": np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)} for seed in range(3)]
    monkeypatch.setattr(quality, "_PREPACKED_BYTES", -1)
    order = ["early", "a", "best", "b", "y"]
    floats = FloatChunks(model, samples, 1)
    whole = make_session(model, outputs=order)
    for number, name in enumerate(order):
        for sample, found in zip(samples, floats.run([name], order[number + 1 :]), strict=True):
            np.testing.assert_array_equal(found[name], whole.run(sample)[name])
