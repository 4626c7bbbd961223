"""What a run reads, whatever form it comes in: :func:`model_file`, :func:`read_data`.

A model in memory is written to a temporary file first. That costs a moment, gives every model the same checks and the
same digest, leaves the caller's object alone, and lets large weights be read lazily.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.calib.source import CalibrationSource
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import InputReport
from postquant.pipeline.save import save_model
from postquant.runtime_ops.errors import ConfigError, ModelError

ModelInput = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model


@contextlib.contextmanager
def model_file(model: ModelInput) -> Iterator[pathlib.Path]:
    """The model as a file; a temporary one, gone afterwards, for a model in memory.

    Args:
        model: A path, the bytes of a file, or a model in memory; the object is not changed.

    Raises:
        ConfigError: If it is none of these.
        ModelError: If a model in memory cannot be written.
    """
    if isinstance(model, (str, os.PathLike)):
        yield pathlib.Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="postquant.") as folder:
        path = pathlib.Path(folder) / _file_name(model)
        if isinstance(model, bytes):
            path.write_bytes(model)
        elif isinstance(model, onnx.ModelProto):
            _write_message(model, path)
        elif isinstance(model, ir.Model):
            save_model(model, path)
        else:
            raise ConfigError(
                "the model is not usable",
                where="model",
                expected="a path, bytes, onnx.ModelProto or onnx_ir.Model",
                found=type(model).__name__,
            )
        yield path


def _file_name(model: object) -> str:
    """A file name after the graph's name, which the report shows."""
    graph = getattr(model, "graph", None)
    name = getattr(graph, "name", None) or "model"
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:64] + ".onnx"


def _write_message(model: onnx.ModelProto, path: pathlib.Path) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                "the weights of the model are not in it",
                where=tensor.name,
                hint="give the path of the model file, or load the message with its external data",
            )
    try:
        path.write_bytes(model.SerializeToString(deterministic=True))
    except (ValueError, EncodeError) as error:
        raise ModelError(
            "the model is too large for one message", found=str(error), hint="give the path of the model file"
        ) from error


def open_calibration(calibration: object, model: ir.Model, config: QuantConfig) -> CalibrationSource:
    """The samples of a run: checked against the model, and at most ``config.samples`` of them.

    Raises:
        CalibrationError: If they do not fit the model, or hold NaN or infinity.
    """
    images = None if config.image is None else config.image.preprocess()
    source = open_source(calibration, input_specs(model), images=images)
    return source if config.samples is None else source.subset(config.samples, config.seed)


def external_files(model: ir.Model) -> tuple[pathlib.Path, ...]:
    """Files outside the model file in which weights of the model are, sorted."""
    found = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                found.add(pathlib.Path(value.const_value.path))
    return tuple(sorted(found))


def read_data(source: CalibrationSource, progress: NullProgress) -> tuple[str, tuple[InputReport, ...]]:
    """What is recorded about the calibration data.

    Returns:
        Their digest, and what is recorded about each input.
    """
    inputs: dict[str, InputReport] = {}
    progress.stage("read data", len(source))
    for sample in source:
        for spec in source.inputs:
            array = sample[spec.name]
            low, high = float(np.min(array)), float(np.max(array))
            known = inputs.get(spec.name)
            if known is None or known.low is None or known.high is None:
                inputs[spec.name] = InputReport(
                    name=spec.name,
                    dtype=spec.dtype.name,
                    shape=spec.shape or (),
                    low=low,
                    high=high,
                    sample_shape=array.shape,
                )
            else:
                inputs[spec.name] = dataclasses.replace(known, low=min(low, known.low), high=max(high, known.high))
        progress.advance()
    return source.digest, tuple(inputs.values())
