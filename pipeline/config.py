"""Every setting of a quantization, in one frozen value: :class:`QuantConfig`.

A setting has the same name as a keyword argument, as a key of ``quant.toml`` and, with dashes, as a command line
option. What is allowed stands once, beside the field (:mod:`postquant.pipeline.settings`); the constructor, the file
reader, the command line and the documentation use that.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from postquant.calib.image_preprocess import Channels, ImagePreprocess, Interpolation, Layout, Resize
from postquant.calib.learn.recipe import Device, Effort
from postquant.passes.target import WeightStorage
from postquant.pipeline.budget import EXAMPLES, Budget
from postquant.pipeline.settings import (
    byte_count,
    check_fields,
    choice,
    flag,
    formatted,
    integer,
    number,
    paths,
    record,
    records,
    text,
)
from postquant.runtime_ops.errors import ConfigError

# Settings that change time and memory, never a result.
_WITHOUT_EFFECT = frozenset({"threads", "memory"})


class Method(enum.Enum):
    """How scales are chosen."""

    EASYQUANT = "easyquant"
    MSE = "mse"
    MINMAX = "minmax"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"


class Objective(enum.Enum):
    """What EasyQuant's search compares a layer's outputs by."""

    COSINE = "cosine"
    MSE = "mse"


class Weights(enum.Enum):
    """Which values weights of 2 and 4 bits may have."""

    AUTO = "auto"
    INT = "int"
    POST = "post"
    LUT = "lut"


class Activations(enum.Enum):
    """Which values activations of 4 and fewer bits may have."""

    AUTO = "auto"
    INT = "int"
    LUT = "lut"


class Border(enum.Enum):
    """Whether activations of 4 and fewer bits have rounding borders."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
    LEARNED_OWN = "learned-own"
    LEARNED_NEIGHBOURS = "learned-neighbours"

    @property
    def learned(self) -> bool:
        """Whether they are learned with everything else."""
        return self in (Border.LEARNED_OWN, Border.LEARNED_NEIGHBOURS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OverrideConfig:
    """One ``[[override]]``: other settings for the nodes that it selects. Later ones win.

    Attributes:
        node: Pattern of node names in the simplified model (``*`` and ``?`` as in a shell), or None for any.
        op_type: Operator type ("Conv"), or None for any.
        wbits: Bits of the weights of these nodes, 2 to 8.
        abits: Bits of the inputs of these nodes, 2 to 8, or 16 where the target has them.
        float: True leaves these nodes in float; False quantizes what an earlier override left in float.
        symmetric: Whether the stored outputs of these nodes have a symmetric range.

    Raises:
        ConfigError: If it selects nothing in particular, changes nothing, or contradicts itself.
    """

    node: str | None = text("pattern of node names", none="any")
    op_type: str | None = text("operator type", none="any")
    wbits: int | None = integer("bits of the weights", low=2, high=8, none="unchanged")
    abits: int | None = integer("bits of the inputs", low=2, high=8, also=16, none="unchanged")
    float: bool | None = flag("leave these nodes in float", none="unchanged")
    symmetric: bool | None = flag("symmetric range of the outputs", none="unchanged")

    def __post_init__(self) -> None:
        check_fields(self, "override")
        if self.node is None and self.op_type is None:
            raise ConfigError("an override selects nothing", where="override", expected="node, op_type or both")
        changes = (self.wbits, self.abits, self.symmetric)
        if self.float is None and changes == (None, None, None):
            raise ConfigError(
                "an override changes nothing",
                where=f"override of {self.node or self.op_type}",
                expected="one of wbits, abits, float, symmetric",
            )
        if self.float and changes != (None, None, None):
            raise ConfigError(
                "an override contradicts itself",
                where=f"override of {self.node or self.op_type}",
                expected="float = true alone, or bits and scheme without it",
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """``[image]``: how a folder of image files becomes input arrays (:class:`ImagePreprocess`, field by field).

    Raises:
        ConfigError: If a value is wrong or the values contradict each other.
    """

    size: tuple[int, ...] | None = integer("height and width of the result", low=1, length=(1, 2), none="input")
    resize: Resize = choice(Resize, "how an image gets that size", default=Resize.CROP)
    shorter_side: int | None = integer("shorter side before the crop, in pixels", low=1, none="size")
    interpolation: Interpolation = choice(Interpolation, "filter of the resizing", default=Interpolation.BILINEAR)
    channels: Channels = choice(Channels, "channel order", default=Channels.RGB)
    layout: Layout = choice(Layout, "axis order", default=Layout.NCHW)
    scale: float = number("factor of the 0..255 values", default=1 / 255)
    mean: tuple[float, ...] = number("subtracted per channel", default=(0.0,), length=(1, 3))
    std: tuple[float, ...] = number("divided by per channel", default=(1.0,), above=0.0, length=(1, 3))

    def __post_init__(self) -> None:
        check_fields(self, "image")
        try:
            self.preprocess()
        except ValueError as error:
            raise ConfigError("the image preprocessing is wrong", where="image", found=str(error)) from None

    def preprocess(self) -> ImagePreprocess:
        """The preprocessing itself."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.size is not None:
            values["size"] = (self.size[0], self.size[-1])
        return ImagePreprocess(**values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """Settings of one quantization. Every field has a default; wrong values cannot be built.

    Enumerations may be given as their strings (``method="mse"``). The meaning of each field, its range and its
    default are in ``docs/configuration.md``.

    Raises:
        ConfigError: If a value has the wrong type or is out of its range; the text names the field.

    >>> QuantConfig(wbits=4, method="mse").method
    <Method.MSE: 'mse'>
    """

    wbits: int = integer("bits of the weights", default=8, low=2, high=8)
    abits: int = integer(
        "bits of the inputs of Conv, ConvTranspose, Gemm and MatMul; 16 where the target has them",
        default=8,
        low=2,
        high=8,
        also=16,
    )
    budget: str | None = formatted("choose the bits of every layer within it", EXAMPLES, Budget.read, none="none")
    weights: Weights = choice(Weights, "values of weights of 2 and 4 bits", default=Weights.AUTO)
    activations: Activations = choice(
        Activations, "values of activations of 4 and fewer bits", default=Activations.AUTO
    )
    method: Method = choice(Method, "how scales are chosen", default=Method.EASYQUANT)
    target: str = text("a built-in target or the path of a target file", default="onnxruntime")
    seed: int = integer("seed of every random choice", default=0, low=0, high=2**32 - 1)
    threads: int = integer(
        "samples that are run at the same time where effects are measured, and parts of a batch that are learned from "
        "at the same time, 0 for one per core and at most 8; more take more memory and never change the result",
        default=1,
        low=0,
        high=1024,
    )
    samples: int | None = integer("use at most this many calibration samples", low=1, none="all")
    first_last_bits: int | None = integer(
        "bits of the first and the last layers where wbits or abits is lower", default=8, low=2, high=8, none="same"
    )
    depthwise_bits: int | None = integer(
        "bits of the weights of depthwise convolutions where wbits is lower", low=2, high=8, none="same"
    )
    sums_bits: int = integer(
        "bits of residual sums, pooling and other element-wise tensors; 16 where the target has them",
        default=8,
        low=2,
        high=8,
        also=16,
    )
    objective: Objective = choice(Objective, "EasyQuant: what layer outputs are compared by", default=Objective.COSINE)
    alpha: float = number("EasyQuant: smallest candidate, as a multiple of the starting scale", default=0.5, above=0.0)
    beta: float = number("EasyQuant: largest candidate, as a multiple of the starting scale", default=2.0, above=0.0)
    candidates: int = integer("EasyQuant: candidates per search", default=100, low=2, high=10000)
    rounds: int | None = integer("EasyQuant: alternations at each tensor", low=1, high=100, none="auto")
    percentile: float = number("percentile method: kept share in percent", default=99.99, above=50.0, high=100.0)
    lp: float = number("MSE method: exponent of the error", default=2.4, low=1.0, high=8.0)
    align_input: bool | None = flag("quantize 8-bit image inputs without loss", none="with easyquant")
    equalize: bool | None = flag("free per-channel equalization at depthwise inputs", none="with easyquant")
    cross_layer: bool | None = flag("cross-layer equalization", none="below 8 bits")
    smooth: bool | None = flag("SmoothQuant-style migration for MatMul", none="with easyquant")
    bias_correction: bool | None = flag("bias correction of the weight error", none="with easyquant")
    feedback: bool | None = flag("channels with code books make up for each other's errors", none="with learn")
    feedback_cells: bool = flag("these errors are made up for across 2 x 2 places as well", default=True)
    border: Border = choice(
        Border, "rounding borders, by an operator of ours, for activations of 4 and fewer bits", default=Border.AUTO
    )
    adaptive_step: bool = flag(
        "learned steps for every sample, by an operator of ours, for activations of 4 and fewer bits", default=False
    )
    learn: bool = flag("learn rounding, scales and biases block by block (needs torch)", default=False)
    effort: Effort = choice(Effort, "time that learning may take", default=Effort.NORMAL)
    max_layers: int = integer("quantized layers that one learned block may hold", default=6, low=1, high=1000)
    fisher: bool | None = flag("weigh a block's errors by the gradients of the network's outputs", none="with learn")
    augment: bool = flag("learn from mirrored and shifted copies of images as well", default=True)
    memory: int = byte_count("activations that learning keeps in memory; more go to disk", default="2GiB")
    device: Device = choice(Device, "where blocks are learned", default=Device.CPU)
    simplify: bool = flag("simplify the model with onnxsim first", default=True)
    weight_storage: WeightStorage | None = choice(
        WeightStorage, "container of weights of 4 and fewer bits", none="target"
    )
    post_exact: bool = flag(
        "matrix products with POST weights compute with exact powers of sqrt(2), in two integer products each",
        default=False,
    )
    max_positions: int = integer(
        "output positions per layer that the search reads where second moments do not serve", default=8192, low=64
    )
    search_work: float = number(
        "EasyQuant: multiply-accumulates that the weight search may cost; it is reduced on larger models",
        default=1.5e13,
        above=0.0,
    )
    verify_samples: int = integer("samples on which the result is verified and measured", default=32, low=1)
    compare_onnxruntime: bool = flag("measure onnxruntime's own quantizer beside the result", default=False)
    bundle: bool | None = flag("write the hand-over bundle beside the model", none="below 256 MB")
    custom_ops: tuple[str, ...] = paths("libraries with custom operators that the model needs")
    encodings: str | None = text("a vendor's encodings whose numbers are kept", none="none")
    image: ImageConfig | None = record(ImageConfig, "preprocessing of a folder of images", none="none")
    override: tuple[OverrideConfig, ...] = records(OverrideConfig, "other settings for some nodes")

    def __post_init__(self) -> None:
        check_fields(self, "configuration")
        if self.alpha > 1.0 or self.beta < 1.0:
            raise ConfigError(
                "the candidates of the scale search leave out the starting scale",
                where="alpha, beta",
                expected="alpha <= 1 <= beta",
                found=f"alpha = {self.alpha}, beta = {self.beta}",
            )
        if self.post_exact and self.weights not in (Weights.AUTO, Weights.POST):
            raise ConfigError(
                "there are no POST weights to be exact about",
                where="post_exact, weights",
                expected='weights = "post" or "auto"',
                found=f'weights = "{self.weights.value}"',
            )
        if self.budget is not None and (self.depthwise_bits is not None or self.first_last_bits not in (None, 8)):
            raise ConfigError(
                "with a budget the bits of these layers are chosen like those of all others",
                where="first_last_bits, depthwise_bits",
                expected="neither of them",
                hint="[[override]] gives single layers a width",
            )
        self._check_encodings()
        self._check_activations()
        self._check_learned()
        if self.weights in (Weights.POST, Weights.LUT) and self.method is not Method.EASYQUANT:
            raise ConfigError(
                "code books of weights are searched by EasyQuant only",
                where="weights, method",
                expected='weights = "auto" or "int", or method = "easyquant"',
                found=f'weights = "{self.weights.value}", method = "{self.method.value}"',
            )

    def _check_encodings(self) -> None:
        """Refuses what would change the tensors that a vendor's numbers are about."""
        changes = [name for name in ("align_input", "equalize", "cross_layer", "smooth") if getattr(self, name)]
        changes += ["adaptive_step"] if self.adaptive_step else []
        changes += ["activations"] if self.activations is Activations.LUT else []
        changes += ["border"] if self.border not in (Border.AUTO, Border.OFF) else []
        if self.encodings is not None and changes:
            raise ConfigError(
                "settings that change tensors do not go with a vendor's numbers for them",
                where=f"encodings, {', '.join(changes)}",
                hint=f"leave out encodings or {', '.join(changes)}",
            )

    def _check_activations(self) -> None:
        """Refuses what an activation with a code book cannot have."""
        others = ["adaptive_step"] if self.adaptive_step else []
        others += ["border"] if self.border not in (Border.AUTO, Border.OFF) else []
        if self.activations is Activations.LUT and others:
            raise ConfigError(
                "an activation has a code book, a rounding border or an adaptive step",
                where=f"activations, {', '.join(others)}",
                expected="one of them",
                hint=f'leave out activations = "lut" or {", ".join(others)}',
            )

    def _check_learned(self) -> None:
        """Refuses what exists only learned where nothing is learned."""
        if self.border.learned and not self.learn:
            raise ConfigError(
                "rounding borders are learned only where blocks are",
                where="border, learn",
                expected="learn = true",
                found=f'border = "{self.border.value}", learn = false',
                hint='border = "on" has borders that nothing is learned for',
            )
        if self.adaptive_step and not self.learn:
            raise ConfigError(
                "adaptive steps are learned only where blocks are",
                where="adaptive_step, learn",
                expected="learn = true",
                found="adaptive_step = true, learn = false",
            )
        if self.feedback and (not self.learn or self.activations is Activations.INT):
            raise ConfigError(
                "errors are fed back only where blocks are learned and activations have code books",
                where="feedback, learn, activations",
                expected='learn = true and activations = "lut" or "auto"',
                found=f'learn = {str(self.learn).lower()}, activations = "{self.activations.value}"',
            )
        if self.fisher and not self.learn:
            raise ConfigError(
                "errors of blocks are weighed only where blocks are learned",
                where="fisher, learn",
                expected="learn = true",
                found="fisher = true, learn = false",
            )

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **options: Any) -> QuantConfig:
        """Reads a configuration file; ``options`` (of the command line) win over the file.

        Args:
            path: A TOML file; relative paths in it are relative to its folder.
            **options: Fields by name; None stands for "not given".

        Raises:
            ConfigError: If the file cannot be read, has an unknown key, or a value of the wrong type or range; the
                text names the file, the line and what is allowed.
        """
        from postquant.pipeline.config_file import read_config  # it builds this class

        return read_config(pathlib.Path(path), options)

    def with_options(self, options: Mapping[str, Any]) -> QuantConfig:
        """The configuration with the given fields replaced; None stands for "not given"."""
        return dataclasses.replace(self, **{name: value for name, value in options.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, in a fixed order, without ``threads`` and ``memory``, which change no result.

        Paths are reduced to file names, so that equal runs in different folders give equal reports.
        """
        result = {
            f.name: _json(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in _WITHOUT_EFFECT
        }
        result["target"] = pathlib.PurePath(self.target).name
        result["encodings"] = None if self.encodings is None else pathlib.PurePath(self.encodings).name
        result["custom_ops"] = [pathlib.PurePath(p).name for p in self.custom_ops]
        return result


def _json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return value
