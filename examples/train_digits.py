"""Trains the network of the embedded demo and writes ``digits.onnx`` and ``digits.npz``.

    python examples/train_digits.py --out pipeline/demo

Nothing depends on this script: its products are part of the package. It needs torch, onnxscript and scikit-learn, and
was run with torch 2.13.0 (CPU); the same versions write the same bytes. Training takes about half a minute on one core.

Data: the 1797 handwritten digits of scikit-learn, which are the test set of the "Optical Recognition of
Handwritten Digits" data set (UCI), real scans of 8 x 8 pixels in 17 grey levels. A seeded permutation cuts them into

    641 for training, 256 for calibration, 900 for test (stored with their positions in scikit-learn's order).

Network: a stem, inverted residuals (1x1 expansion, depthwise 3x3, 1x1 projection, ReLU6) and residual blocks (ReLU),
all with BatchNorm, on 8x8 -> 4x4 -> 2x2 positions, then the mean over positions and a linear layer. It is narrow on
purpose (6 to 12 channels between blocks): 8 bits cost it nothing, 4 bits do. The weights are what the training gave.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import numpy as np
import numpy.typing as npt
import onnx
import sklearn.datasets
import torch
from torch import nn
from torch.nn import functional

SEED = 20
CALIBRATION, TEST = 256, 900
GREY_LEVELS = 16.0


def convolution(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias, then BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter each channel, project; a sum where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int = 4, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *convolution(inputs, hidden, 1),
            nn.ReLU6(),
            *convolution(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.ReLU6(),
            *convolution(hidden, outputs, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y: torch.Tensor = self.body(x)
        return x + y if self.adds else y


class Residual(nn.Module):
    """ResNet's basic block; a 1x1 convolution on the shortcut where shapes differ."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride=stride), nn.ReLU(), *convolution(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride=stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return functional.relu(self.body(x) + self.shortcut(x))


class DigitNet(nn.Module):
    """About 9 thousand parameters; float32 (N, 1, 8, 8) in 0..1 to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *convolution(1, 6, 3),
            nn.ReLU6(),
            InvertedResidual(6, 6),
            InvertedResidual(6, 6),
            Residual(6, 6),
            InvertedResidual(6, 8, stride=2),
            InvertedResidual(8, 8),
            InvertedResidual(8, 8),
            Residual(8, 8),
            InvertedResidual(8, 12, stride=2),
            InvertedResidual(12, 12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of images."""
        y: torch.Tensor = self.classifier(self.features(x))
        return y


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image turned by up to 15 degrees, scaled by up to 15 % and shifted by up to one pixel, bilinearly."""
    count = len(x)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(15)), 1 + uniform(0.15)
    shift_x, shift_y = uniform(2 / 8), uniform(2 / 8)  # affine_grid's unit is half the image
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = functional.affine_grid(rows, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


def train(x: torch.Tensor, y: torch.Tensor, *, epochs: int) -> DigitNet:
    """Adam with a one-cycle schedule on augmented images."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = DigitNet()
    optimizer = torch.optim.Adam(network.parameters())
    batch = 64
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = functional.cross_entropy(network(augment(x[chosen], generator)), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network.eval()


def accuracy(network: DigitNet, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images whose largest logit is the label's."""
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


def export(network: DigitNet, path: pathlib.Path) -> None:
    """Writes opset 17 with a dynamic batch and BatchNorm kept apart, as exporters leave it in training mode."""
    torch.onnx.export(
        network,
        (torch.zeros(2, 1, 8, 8),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )
    onnx.checker.check_model(str(path), full_check=True)


def split() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """Images (1797, 1, 8, 8) in 0..16, labels, and the positions for calibration, test and training."""
    digits = sklearn.datasets.load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    parts = np.split(order, [CALIBRATION, CALIBRATION + TEST])
    return digits.images.astype(np.uint8)[:, None], digits.target.astype(np.int64), parts


def main() -> None:
    """Trains, prints the accuracies and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels, (calibration, test, training) = split()
    x, y = torch.from_numpy(images).float() / GREY_LEVELS, torch.from_numpy(labels)
    network = train(x[training], y[training], epochs=options.epochs)
    for name, part in (("training", training), ("calibration", calibration), ("test", test)):
        print(f"{name}: {accuracy(network, x[part], y[part]):.4f} of {len(part)}")
    export(network, options.out / "digits.onnx")
    np.savez_compressed(
        options.out / "digits.npz",
        calibration_x=images[calibration],
        calibration_y=labels[calibration].astype(np.uint8),
        calibration_index=calibration.astype(np.int16),
        test_x=images[test],
        test_y=labels[test].astype(np.uint8),
        test_index=test.astype(np.int16),
    )


if __name__ == "__main__":
    main()
