"""Looks at many tensors of a model without holding all of them: names in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.session import make_session

CHUNK_BYTES = 48 << 20


def element_counts(
    model: ir.Model, names: Sequence[str], feed: Mapping[str, npt.NDArray[Any]], *, threads: int = 1
) -> dict[str, int]:
    """Number of elements of inner values on one sample; no value itself is fetched.

    Args:
        model: The model; it is not changed.
        names: Values of the main graph.
        feed: The sample.
        threads: Threads within one operator.
    """
    copy = model.clone()
    wanted = set(names)
    values = [v for v in copy.graph.inputs if v.name in wanted]
    values += [v for node in copy.graph for v in node.outputs if v.name in wanted]
    sizes = {}
    for index, value in enumerate(values):
        size = ir.node("Size", [value], name=f"postquant_size_{index}")
        size.outputs[0].name = f"postquant_size_{index}"
        copy.graph.append(size)
        sizes[f"postquant_size_{index}"] = value.name or ""
    if not sizes:
        return {}
    session = make_session(copy, outputs=list(sizes), threads=threads, prepack=False)
    return {sizes[name]: int(count) for name, count in session.run(feed).items()}


def chunked(names: Sequence[str], counts: Mapping[str, int], item_bytes: int) -> Iterator[list[str]]:
    """Splits names, in order, into chunks of at most :data:`CHUNK_BYTES` (one tensor may exceed it).

    >>> list(chunked(["a", "b", "c"], {"a": 30 << 20, "b": 20 << 20, "c": 1}, 1))
    [['a'], ['b', 'c']]
    """
    chunk: list[str] = []
    held = 0
    for name in names:
        size = counts.get(name, 0) * item_bytes
        if chunk and held + size > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk
