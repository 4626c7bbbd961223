"""SQNR and cosine of every stored tensor of a quantized model against the float model."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.prefix import frontier
from postquant.passes.session import Session, make_session
from postquant.passes.subgraph import values_by_name
from postquant.pipeline.chunks import chunked, element_counts
from postquant.pipeline.measure import SimilarityMeter
from postquant.pipeline.stored import Stored

# Above this many bytes of weights, onnxruntime keeps no rearranged copy of them: slower, but flat in memory.
_PREPACKED_BYTES = 48 << 20
# What the values at which a chunk ends may hold for all samples together; where they are larger, the next one starts
# further back.
_KEPT_BYTES = 64 << 20

Feed = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorQuality:
    """One stored tensor in the whole quantized model against the float model.

    Attributes:
        name: Value in the float model.
        node: Node that computes it; "" for a graph input.
        bits: Bits of its codes.
        scale: Scale.
        zero_point: Zero point.
        sqnr_db: SQNR in dB, accumulated error of everything before it included.
        cosine: Cosine similarity.
    """

    name: str
    node: str
    bits: int
    scale: float
    zero_point: int
    sqnr_db: float
    cosine: float


def stored_tensor_quality(
    float_model: ir.Model, model: ir.Model, stored: Sequence[Stored], samples: Sequence[Feed], *, threads: int = 1
) -> tuple[TensorQuality, ...]:
    """Measures every stored tensor (second, narrower quantizations excepted).

    Args:
        float_model: The float model.
        model: The quantized model.
        stored: Its stored tensors.
        samples: Samples to measure on.
        threads: Threads within one operator.
    """
    values = values_by_name(float_model.graph)
    tensors = {
        tensor.value.name or "": tensor for tensor in stored if not tensor.again and (tensor.value.name or "") in values
    }
    if not samples or not tensors:
        return ()
    counts = element_counts(float_model, list(tensors), samples[0], threads=threads)
    meters = {name: SimilarityMeter() for name in tensors}
    floats = FloatChunks(float_model, samples, threads)
    chunks = list(chunked(list(tensors), counts, 5))
    for number, chunk in enumerate(chunks):
        codes = {name: tensors[name].codes for name in chunk}
        with tempfile.TemporaryFile(prefix="postquant-") as spool:
            # Sessions end at this chunk: what lies behind it is not computed. And there is one at a time: of a large
            # model, the weights of the float and of the quantized network would be in memory together.
            later = [name for other in chunks[number + 1 :] for name in other]
            for wanted in floats.run(chunk, later):
                for name in chunk:
                    np.save(spool, wanted[name], allow_pickle=False)
            spool.seek(0)
            session = make_session(model, outputs=list(codes.values()), threads=threads)
            for feed in samples:
                got = session.run(feed)
                for name in chunk:
                    expected = np.load(spool, allow_pickle=False)
                    array = got[codes[name]]
                    if array.shape == expected.shape:
                        meters[name].add(expected, tensors[name].reading.numbers.real(array))
            del session
    result = []
    for name, tensor in tensors.items():
        similarity = meters[name].result()
        result.append(
            TensorQuality(
                name=name,
                node="" if tensor.node is None else tensor.node.name or "",
                bits=tensor.quantizer.spec.bits,
                scale=float(tensor.quantizer.scale),
                zero_point=int(tensor.quantizer.zero_point),
                sqnr_db=similarity.sqnr_db,
                cosine=similarity.cosine,
            )
        )
    return tuple(result)


class FloatChunks:
    """Runs a float model chunk by chunk of its values; of a large one, each chunk starts where the last one ended.

    Args:
        model: The float model.
        samples: Feeds.
        threads: Threads within one operator.

    Attributes:
        large: Whether its weights are too large to be there all at once.
    """

    def __init__(self, model: ir.Model, samples: Iterable[Feed], threads: int) -> None:
        self._model = model
        self._threads = threads
        self.large = weight_bytes(model) > _PREPACKED_BYTES
        self._samples = list(samples)
        self._kept: list[dict[str, npt.NDArray[Any]]] = [{} for _ in self._samples]

    def run(self, names: Sequence[str], later: Sequence[str]) -> Iterator[Feed]:
        """The values of each sample.

        Args:
            names: Values of the model.
            later: Values that will be asked for after these.
        """
        # What no kept value leads to, a capture of a subgraph for example, comes from the graph's inputs again.
        start = {name: ir.DataType.from_numpy(array.dtype) for name, array in self._kept[0].items()}
        fed = [value.name or "" for value in self._model.graph.inputs if value.name in self._samples[0]]
        cut = [n for n in frontier(self._model, names, (*start, *fed), later) if n not in fed] if self.large else []
        session = make_session(
            self._model,
            inputs=[*start, *fed],
            outputs=list(dict.fromkeys((*names, *cut))),
            dtypes=start,
            threads=self._threads,
            prepack=not self.large,
        )
        kept: list[dict[str, npt.NDArray[Any]]] = []
        for sample, before in zip(self._samples, self._kept, strict=True):
            found = session.run({**sample, **before})
            if not kept and sum(found[name].nbytes for name in cut) * len(self._samples) > _KEPT_BYTES:
                cut = []
            kept.append({name: found[name] for name in cut})
            yield found
        if cut:
            self._kept = kept


def float_session(model: ir.Model, outputs: Sequence[str] | None = None, *, threads: int = 1) -> Session:
    """A session over a float model that does not double the memory of large weights."""
    return make_session(model, outputs=outputs, threads=threads, prepack=weight_bytes(model) <= _PREPACKED_BYTES)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, each tensor counted once."""
    tensors = {id(v.const_value): v.const_value for v in model.graph.initializers.values()}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


def file_bytes(path: pathlib.Path, model: ir.Model) -> int:
    """Bytes of a model file and of its external data files."""
    locations = {
        os.path.join(tensor.base_dir, tensor.location)
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return path.stat().st_size + sum(os.stat(location).st_size for location in locations)
