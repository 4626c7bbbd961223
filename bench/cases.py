"""What is measured: real models with their data, and the widths at which each is quantized."""

from __future__ import annotations

import dataclasses
import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get("POSTQUANT_DATA", REPOSITORY.parent / "shared" / "data"))


def require_data() -> None:
    """Ends the program with one sentence if models and data are not there."""
    if not (DATA / "eval.py").is_file():
        raise SystemExit(f"no models and data in {DATA}; set POSTQUANT_DATA to the folder that holds eval.py")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Widths and options of one quantization.

    Attributes:
        name: "w4a8", or "w8a8-mse" for a step of the ablation.
        wbits: Bits of weights.
        abits: Bits of activations.
        options: Further fields of ``QuantConfig``.
        samples: Calibration samples; None for as many as the case has.
    """

    name: str
    wbits: int
    abits: int
    options: tuple[tuple[str, str | bool], ...] = ()
    samples: int | None = None


_Options = tuple[tuple[str, str | bool], ...]
_EFFORTS: tuple[tuple[str, _Options], ...] = (("", ()), ("-fast", (("effort", "fast"),)))
_ACTIVATIONS: tuple[tuple[str, _Options], ...] = (
    ("", ()),
    *((f"-{name}", (("activations", name),)) for name in ("int", "lut")),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        name: For ``--models`` and the tables.
        dataset: Name that ``eval.py`` knows.
        file: Model, relative to the data folder.
        metric: Key of the task metric in the output of ``eval.py``.
        samples: Calibration samples.
        widths: (weight bits, activation bits) to measure.
        learned: The same with learning, which is measured only where it is asked for.
        learned_samples: Calibration samples with learning.
    """

    name: str
    dataset: str
    file: str
    metric: str
    samples: int
    widths: tuple[tuple[int, int], ...] = ((8, 8),)
    learned: tuple[tuple[int, int], ...] = ()
    learned_samples: int | None = None

    @property
    def path(self) -> pathlib.Path:
        """The float model."""
        return DATA / self.file

    @property
    def settings(self) -> tuple[Setting, ...]:
        """One setting per pair of widths."""
        return tuple(Setting(f"w{w}a{a}", w, a) for w, a in self.widths)

    @property
    def named_settings(self) -> tuple[Setting, ...]:
        """Settings that are measured only where they are named: 4 bits with code books of activations, and learning.

        ``w4a4-learn`` takes the default effort, ``-fast`` the least; ``-lut`` gives activations code books wherever
        they gain anything, ``-int`` none.
        """
        four = tuple(
            Setting(f"w4a4{books}", 4, 4, chosen)
            for books, chosen in _ACTIVATIONS
            if chosen or (4, 4) not in self.widths
        )
        return four + tuple(
            Setting(f"w{w}a{a}-learn{suffix}{books}", w, a, (("learn", True), *options, *chosen), self.learned_samples)
            for w, a in self.learned
            for suffix, options in _EFFORTS
            for books, chosen in _ACTIVATIONS
            if a <= 4 or not chosen
        )


_LOW = ((4, 8), (4, 4), (3, 3), (2, 4), (2, 2))
CASES = (
    Case(
        *("mobilenetv2", "imagenet", "imagenet/mobilenetv2_1.0.onnx", "top1", 256),
        widths=((8, 8), (7, 7), (4, 8)),
        learned=((4, 8), (4, 4)),
    ),
    Case(
        *("resnet20", "cifar10", "cifar10/resnet20.onnx", "top1", 512),
        widths=((8, 8), (7, 7), (4, 8), (4, 4)),
        learned=_LOW,
        learned_samples=1024,
    ),
    Case(
        *("resnet56", "cifar10", "cifar10/resnet56.onnx", "top1", 512),
        learned=((4, 4), (2, 2)),
        learned_samples=1024,
    ),
    Case("resnet8", "cifar10_raw", "cifar10/resnet8_mlperftiny.onnx", "top1", 512),
    Case("squeezenet", "imagenet", "imagenet/squeezenet1.1.onnx", "top1", 256, learned=((4, 4),)),
    Case("dncnn", "denoise", "denoise/dncnn_s25.onnx", "psnr_db", 32, learned=((4, 8),)),
    Case("fastestdet", "coco", "coco/fastestdet.onnx", "map50", 64, learned=((4, 8),)),
    Case("rfb320", "face", "coco/face_rfb320.onnx", "f1_vs_ref", 64),
    Case("vww", "vww", "coco/vww_mobilenetv1_0.25_96.onnx", "top1", 64),
    Case("minilm", "sts", "sts/minilm_l6.onnx", "spearman", 256, learned=((4, 8),)),
)

# Each line adds one thing to the line before.
_PLAIN: _Options = (
    ("activations", "int"),
    ("align_input", False),
    ("equalize", False),
    ("cross_layer", False),
    ("smooth", False),
)
ABLATION_STEPS: tuple[tuple[str, _Options], ...] = (
    ("minmax", (("method", "minmax"), ("bias_correction", False), *_PLAIN)),
    ("mse", (("method", "mse"), ("bias_correction", False), *_PLAIN)),
    ("easyquant", (("method", "easyquant"), ("bias_correction", False), *_PLAIN)),
    ("easyquant+bias", (("method", "easyquant"), *_PLAIN)),
    ("default", ()),
)
ABLATION_MODELS = ("mobilenetv2", "resnet20", "minilm")


def ablation_settings(case: Case) -> tuple[Setting, ...]:
    """The steps of the ablation at every width of ``case``."""
    return tuple(Setting(f"w{w}a{a}-{step}", w, a, options) for w, a in case.widths for step, options in ABLATION_STEPS)
