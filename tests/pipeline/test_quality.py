"""Quality of stored tensors: what a large model gives chunk by chunk is what it gives at once."""

from __future__ import annotations

from typing import Any

import pytest

from postquant.passes.lut_expansion import with_qdq
from postquant.pipeline import quality
from postquant.pipeline.quality import stored_tensor_quality
from postquant.pipeline.stored import find_stored


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 30])
def test_chunks_start_where_the_last_one_ended(cases: Any, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    case = cases.build()
    stored = find_stored(case.model, with_qdq(case.emitted), case.plan)
    whole = stored_tensor_quality(case.model, case.emitted, stored, case.samples)
    monkeypatch.setattr(quality, "_PREPACKED_BYTES", 0)
    monkeypatch.setattr("postquant.pipeline.chunks.CHUNK_BYTES", chunk_bytes)
    starts = []
    make_session = quality.make_session  # type: ignore[attr-defined]

    def recorded(model: Any, **options: Any) -> Any:
        starts.append(options.get("inputs"))
        return make_session(model, **options)

    monkeypatch.setattr(quality, "make_session", recorded)
    parts = stored_tensor_quality(case.model, case.emitted, stored, case.samples)
    assert [item.name for item in parts] == [item.name for item in whole]
    for part, one in zip(parts, whole, strict=True):
        assert part.sqnr_db == pytest.approx(one.sqnr_db, abs=1e-2)
        assert part.cosine == pytest.approx(one.cosine, abs=1e-5)
    assert any(start is not None for start in starts) == (chunk_bytes < 1 << 30)
