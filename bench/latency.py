"""Time of one run: our operators and files beside stock onnxruntime, all in one process, in interleaved rounds.

    python bench/latency.py [--parts layers,quantizers] [--threads 1,2] [--isa avx2,avx512vnni] [--rounds 60]
    python bench/latency.py --parts networks --network FLOAT.onnx QUANTIZED.onnx [--network ...]

Layers (float in, float out, quantization included): float, onnxruntime int8 (u8 activations, s8 weights),
MatMulNBits in blocks of 32 and 128 at accuracy levels 0 and 4, and a look-up table of 4 bits (``--bits``) with the
library and without it. Quantizers: ours beside QuantizeLinear on 1x64x56x56. Networks: any quantized file beside
onnxruntime's own 8-bit version of the float model.

Prints one JSON line per measurement; ``--markdown`` adds tables of the fastest of each kind. On a machine with other
work the least time ("best") is the number to read, and with two threads not even that where another process holds the
second core. onnxruntime's own kernels always use the best instruction set of the machine: ``--isa`` holds back ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from accuracy import comma_separated
from latency_table import PARTS, REFERENCES, markdown
from layer_models import LAYERS, Forms, Layer
from lines import add_output_options, write_lines
from networks import network_contestants
from quantizer_models import Quantizers
from rounds import Contestant, Libraries, Runner, Times, compete

# Shapes and ranks at which FeedbackRequantize runs; the rank of cells of 2 x 2 places is three times as large.
FEEDBACK = [((1, 512, 13, 13), 64), ((1, 144, 56, 56), 24)]
ISAS = ["baseline", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx", "neondot"]


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is compared with each other.

    Attributes:
        part: One of PARTS.
        name: What is run.
        contestants: Ways of running it.
    """

    part: str
    name: str
    contestants: Sequence[Contestant]


def layer_contest(layer: Layer, bits: list[int], isas: list[str]) -> Contest:
    """All forms of a layer."""
    forms = Forms(layer, bits[0])
    found = [Contestant("fp32", forms.floating(), forms.feeds)]
    if layer.is_convolution:
        found.append(Contestant("int8 QLinearConv", forms.qdq(), forms.feeds))
    else:
        found.append(Contestant("int8 QGemm", forms.qdq(), forms.feeds))
        found.append(Contestant("int8 QLinearMatMul", forms.qdq_matmul(), forms.feeds))
        for block in (32, 128):
            for accuracy in (0, 4):
                name = f"MatMulNBits block {block}, accuracy level {accuracy}"
                found.append(Contestant(name, forms.n_bits(block, accuracy), forms.feeds))
    for width in bits:
        forms = Forms(layer, width)
        found += Contestant.ours(f"LUT {width} bit", forms.look_up(), forms.feeds, isas)
    return Contest("layers", layer.name, found)


def quantizer_contest(isas: list[str]) -> Contest:
    """QuantizeLinear and our quantizers."""
    models = Quantizers()
    feeds, codes = {"x": models.x}, {"x": models.codes}
    found = [Contestant("QuantizeLinear", models.linear(), feeds)]
    ours = {
        "AdaptiveQuantize, channel means, hidden 8": (models.adaptive(1, 8), feeds),
        "AdaptiveQuantize, deviation and maximum": (models.adaptive(6, 1), feeds),
        "AdaptiveRequantize, channel means, hidden 8": (models.adaptive(1, 8, from_codes=True), codes),
        "LutRequantize, a table per channel": (models.levels(), codes),
        "BorderQuantize, per channel": (models.border(), feeds),
        "BorderQuantize, per value": (models.border(table=True), feeds),
        "BorderQuantize, window 3x3": (models.border(window=3), feeds),
        "BorderQuantize, rank 8": (models.border(rank=8), feeds),
        "BorderQuantize, window 3x3 and rank 8": (models.border(window=3, rank=8), feeds),
    }
    for name, (model, inputs) in ours.items():
        found += Contestant.ours(name, model, inputs, isas)
    return Contest("quantizers", "1x64x56x56", found)


def feedback_contest(shape: tuple[int, ...], rank: int, isas: list[str]) -> Contest:
    """Levels of channels with feedback and without it, and QuantizeLinear."""
    models = Quantizers(shape)
    codes = {"x": models.codes}
    found = [Contestant("QuantizeLinear", models.linear(), {"x": models.x})]
    found += Contestant.ours("LutRequantize, a table per channel", models.levels(), codes, isas)
    # Cells are for activations that have no more channels in them.
    sides = (1, 2) if 4 * shape[1] <= 1024 else (1,)
    for cell in sides:
        size = rank if cell == 1 else 3 * rank
        name = f"FeedbackRequantize, cell {cell}, rank {size}"
        found += Contestant.ours(name, models.feedback(size, cell), codes, isas)
    return Contest("quantizers", "x".join(map(str, shape)), found)


def contests(options: argparse.Namespace, folder: pathlib.Path) -> Iterator[Contest]:
    """Every comparison that the options ask for."""
    if "layers" in options.parts:
        for layer in LAYERS:
            if not options.layers or any(text in layer.name for text in options.layers):
                yield layer_contest(layer, options.bits, options.isa)
    if "quantizers" in options.parts:
        yield quantizer_contest(options.isa)
        for shape, rank in FEEDBACK:
            yield feedback_contest(shape, rank, options.isa)
    if "networks" in options.parts:
        for floating, quantized in options.network or []:
            ways = network_contestants(floating, quantized, options.isa, options.symbolic, folder)
            yield Contest("networks", quantized.stem, ways)


def measure(contest: Contest, threads: int, rounds: int, libraries: Libraries) -> Iterator[dict[str, Any]]:
    """One line per contestant."""
    runners: dict[str, Runner] = {}
    first: dict[bytes | pathlib.Path, list[Any]] = {}
    lines: dict[str, dict[str, Any]] = {}
    for contestant in contest.contestants:
        plural = "thread" if threads == 1 else "threads"
        line = {"part": contest.part, "model": contest.name, "setting": f"{threads} {plural}"}
        lines[contestant.name] = line | {
            "quantizer": contestant.name,
            "subject": contestant.subject,
            "way": contestant.way,
        }
        try:
            runner = Runner(contestant, threads, libraries)
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no base class below Exception
            lines[contestant.name]["error"] = str(error)
            continue
        runners[contestant.name] = runner
        # The library and the function body must compute the same.
        expected = first.setdefault(contestant.model, runner.outputs)
        unequal = [np.mean(a != b) for a, b in zip(runner.outputs, expected, strict=True)]
        lines[contestant.name]["differing"] = float(max(unequal))
    times = compete(runners, rounds)
    for name, line in lines.items():
        yield line | (_numbers(name, times) if name in times else {})


def _numbers(name: str, times: dict[str, Times]) -> dict[str, Any]:
    own = times[name]
    found: dict[str, Any] = {"best_us": own.best * 1e6, "median_us": own.median * 1e6}
    for label, beginning in REFERENCES.items():
        references = [value for key, value in times.items() if key.startswith(beginning)]
        if references:
            found[f"{label}_best"] = min(r.best for r in references) / own.best
            found[f"{label}_median"] = 1 / own.ratio_to(min(references, key=lambda r: r.median))
    return found


class _Network(argparse.Action):
    """Takes two files and adds them as a pair."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Checks that both are there."""
        files = [pathlib.Path(text) for text in values]
        for file in files:
            if not file.is_file():
                parser.error(f"--network: {file} is not a file")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), tuple(files)])


def main() -> int:
    """Runs the measurements; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=comma_separated(PARTS), help="layers and quantizers; networks if some are given"
    )
    parser.add_argument("--layers", type=lambda text: text.split(","), help="parts of names of layers")
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[4])
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--isa", type=comma_separated(ISAS), default=[""], help="sets to hold the library to")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--network", nargs=2, action=_Network, metavar=("FLOAT", "QUANTIZED"))
    parser.add_argument("--symbolic", type=int, default=128, help="size of open dimensions of a network, but the first")
    add_output_options(parser)
    options = parser.parse_args()
    options.parts = options.parts or (["networks"] if options.network else ["layers", "quantizers"])

    def lines(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
        libraries = Libraries(folder)
        for contest in contests(options, folder):
            for threads in options.threads:
                yield from measure(contest, threads, options.rounds, libraries)

    with tempfile.TemporaryDirectory() as folder:
        return write_lines(lines(pathlib.Path(folder)), options, markdown)


if __name__ == "__main__":
    sys.exit(main())
