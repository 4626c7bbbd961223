"""Steps per second of learning, block by block, and what a step costs beside convolutions.

    python bench/learning.py MODEL.onnx DATA.npz [--wbits 2] [--abits 2] [--steps 50] [--threads 1] [--lut] [--feedback]

Ranges are min-max and weights keep their largest magnitude: how long a step takes does not depend on them. Times hold
everything that a block does beside its steps as well: probes and judging. The last line sees the calling thread alone.
``--lut`` gives activations of at most 4 bits code books, ``--feedback`` gives these an error feedback as well, with
about the default's number of coefficients; what they are does not matter either. ``--cpu`` is what to compare on a busy
machine; it takes at most 50 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity, profile

from postquant.calib.learn.block_cache import BlockCache
from postquant.calib.learn.learner import LearnedBlock, Learner
from postquant.calib.learn.recipe import Effort, recipe_for
from postquant.calib.observers import MinMax
from postquant.calib.ranges import method_ranges
from postquant.calib.source import SubsetSource
from postquant.calib.weight_start import start_weights
from postquant.calib.work import forward_work
from postquant.passes.level_plan import level_sites
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.target import load_target
from postquant.pipeline.activation_books import with_code_books
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.feedback import with_feedback
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.learning import learning_blocks
from postquant.pipeline.load import load_model
from postquant.pipeline.prepare import prepare

_SAMPLES = 64
# Of these tell what errors do; how many coefficients are worth their bytes is about the same for more.
_GRADIENTS = 16
_CONVOLUTION = ("convolution", "conv2d", "addmm", "aten::mm", "aten::bmm")


def main() -> None:
    """Prints a line per block, and the share of convolutions and matrix products in all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data")
    parser.add_argument("--wbits", type=int, default=2)
    parser.add_argument("--abits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lut", action="store_true", help="code books of activations")
    parser.add_argument("--feedback", action="store_true", help="the same with error feedback")
    parser.add_argument("--cpu", action="store_true", help="CPU time of steps alone, without a profile")
    parser.add_argument("--top", type=int, default=0, help="operators of torch to list")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    whole = open_calibration(arguments.data, loaded, QuantConfig())
    source = SubsetSource(whole, range(min(len(whole), _SAMPLES)))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        model = prepare(loaded, list(source.read([0])), opset=17, simplify=True, custom_ops=(), folder=path).model
        plan = place(model, load_target("onnxruntime"), PlacementSettings(wbits=arguments.wbits, abits=arguments.abits))
        plan = start_weights(model, method_ranges(model, plan, source, MinMax()).plan)
        if arguments.lut or arguments.feedback:
            plan = with_code_books(model, plan, level_sites(model, plan)[0], source)
        if arguments.feedback:
            few = SubsetSource(source, range(min(len(source), _GRADIENTS)))
            plan, _ = with_feedback(model, plan, few, seed=0, device=torch.device("cpu"))
        blocks = learning_blocks(model, plan)
        work = forward_work(model, source)
        recipe = dataclasses.replace(recipe_for(Effort.FAST, work), iterations=arguments.steps, judged=(1.0,))
        cache = BlockCache(model, blocks, source, path, memory=2 << 30)
        learner = Learner(
            model,
            blocks,
            cache,
            recipe,
            seed=0,
            device=torch.device("cpu"),
            positions=work.layers,
            threads=arguments.threads,
        )

        def told(plan: QuantPlan, block: LearnedBlock) -> None:
            rate = f"{block.iterations / block.seconds:7.1f} steps/s" if block.iterations else block.reason
            print(f"{block.name:40} {len(block.layers):3} layers  {rate}")

        clock = _Clock()
        if arguments.cpu:
            learner.run(plan, done=[], save=told, progress=clock)
            print(f"{clock.seconds:.3f} s of CPU time for a step of every block")
            return
        begun, spent = time.monotonic(), time.process_time()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            _, found = learner.run(plan, done=[], save=told, progress=clock)
    spent, begun = time.process_time() - spent, time.monotonic() - begun
    print(f"{sum(block.seconds for block in found):.1f} s of {begun:.1f} s in blocks, CPU time {spent:.1f} s in all")
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    heavy = sum(event.self_cpu_time_total for event in events if any(name in event.key for name in _CONVOLUTION))
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[: arguments.top]:
        print(f"{event.self_cpu_time_total / total:6.1%} {event.count:8} calls  {event.key}")
    print(f"convolutions and matrix products: {heavy / total:.0%} of torch's time, batches of {recipe.batch}")


class _Clock:
    """CPU time of a step, of all threads, without what a block does in front of its first one.

    Attributes:
        seconds: The sum over blocks of the mean of their steps but the first one.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = (0, 0.0)

    def __call__(self, block: object, iteration: int, loss: float) -> None:
        """Told how many steps a block has done."""
        now = time.process_time()
        if iteration > 1:
            self.seconds += (now - self._begun[1]) / (iteration - self._begun[0])
            print(f"{1e3 * (now - self._begun[1]) / (iteration - self._begun[0]):8.1f} ms of CPU time a step")
        else:
            self._begun = iteration, now


if __name__ == "__main__":
    main()
