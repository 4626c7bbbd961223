"""What every sample brings to a block: :class:`BlockCache`.

    exact       inputs in the float network
    quantized   inputs behind the quantized prefix, all blocks in front of this one learned
    target      output in the float network

The networks run in onnxruntime, sample by sample, each time from where the last block began
(:class:`postquant.calib.prefix.Prefix`): the cost grows with the depth of the network, not with its square. Results
stay in memory up to a limit and go to a file beyond it.

The block that first reads a stored tensor learns its step: it gets the tensor in front of its quantizer. From the next
block on that quantizer is decided, so the decided part of the plan only grows; the tensor still comes from in front of
it where the network has it there, else (the quantizer stands for a Relu) from behind it, where quantizing again changes
nothing.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import onnx_ir as ir

from postquant.calib.learn.sample_arrays import SampleArrays, Spool
from postquant.calib.prefix import Prefix
from postquant.calib.source import CalibrationSource
from postquant.passes.blocks import Block
from postquant.passes.plan import QuantPlan
from postquant.passes.subgraph import node_sources, values_by_name

# Some values between blocks are large (64 channels of 180 x 180: 8 MB); reading them is still cheaper than the layers.
_CUT_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class BlockSamples:
    """All samples of a block; a context manager that frees them.

    Attributes:
        exact: Input name -> values in the float network.
        quantized: Input name -> values behind the quantized prefix: in front of the input's own quantizer, always so
            for the first block that reads it.
        target: The block's output in the float network.
        groups: Samples whose arrays have equal shapes and can form a batch, by their first members.
        spilled: Bytes that did not fit into memory.
    """

    exact: Mapping[str, SampleArrays]
    quantized: Mapping[str, SampleArrays]
    target: SampleArrays
    groups: tuple[tuple[int, ...], ...]
    spool: Spool

    @property
    def spilled(self) -> int:
        """Bytes that did not fit into memory."""
        return self.spool.spilled

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.target)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was spilled."""
        self.spool.close()


class BlockCache:
    """Computes the samples of one block after the other.

    Args:
        model: The simplified float model; not changed.
        blocks: All blocks, in the order in which they will be loaded.
        source: Calibration data.
        folder: Existing folder for temporary files.
        memory: How many bytes of samples may stay in memory.
    """

    def __init__(
        self,
        model: ir.Model,
        blocks: Sequence[Block],
        source: CalibrationSource,
        folder: str | os.PathLike[str],
        *,
        memory: int,
    ) -> None:
        self._blocks = list(blocks)
        self._folder = pathlib.Path(folder)
        self._memory = memory
        self._prefix = Prefix(model, source, self._folder, float_samples=None, cut_bytes=_CUT_BYTES)
        self._values = values_by_name(model.graph)
        self._graph_inputs = {value.name for value in model.graph.inputs if value.name}

    def load(self, block: Block, plan: QuantPlan) -> BlockSamples:
        """Runs both networks up to a block, for all samples.

        Args:
            block: One of the cache's blocks, behind all that were loaded before; blocks may be left out.
            plan: Decisions; everything in front of the block is final.

        Returns:
            The samples; to be closed (``with``).

        Raises:
            OutputError: If there is no room for temporary files.
        """
        place = self._blocks.index(block)
        preceding, following = self._blocks[:place], self._blocks[place + 1 :]
        read = dict.fromkeys(name for earlier in preceding for name in earlier.inputs)
        spool = Spool(self._folder, self._memory)
        try:
            exact = {name: SampleArrays(spool) for name in block.inputs}
            # What the user feeds is the same in both networks.
            computed = [name for name in block.inputs if name not in self._graph_inputs]
            quantized = {name: SampleArrays(spool) if name in computed else exact[name] for name in block.inputs}
            target = SampleArrays(spool)
            stream = self._prefix.stream(
                self._prefix_plan(plan, block.inputs, read),
                block.inputs,
                decided=read,
                float_tensors=(block.output,),
                kept={name for later in following for name in later.inputs},
            )
            for float_values, quantized_values in stream:
                assert float_values is not None
                for name in block.inputs:
                    exact[name].append(float_values[name])
                for name in computed:
                    quantized[name].append(quantized_values[name])
                target.append(float_values[block.output])
        except BaseException:
            spool.close()
            raise
        return BlockSamples(exact, quantized, target, equal_shapes((*exact.values(), target)), spool)

    def _prefix_plan(self, plan: QuantPlan, inputs: Sequence[str], read: Collection[str]) -> QuantPlan:
        """The decisions in front of a block, without the quantizers of inputs that nothing before reads.

        They depend on the place of the block only, not on which blocks were loaded: so a resumed run sees the same.
        """
        own, earlier = self._nodes_before(inputs), self._nodes_before(read)
        before = own | earlier
        made = {value.name for node in before for value in (*node.outputs, *node_sources(node)) if value.name}
        open_ = set(inputs) - set(read) - {value.name for node in before for value in node_sources(node)}
        open_ -= {value.name for node in earlier for value in node.outputs}
        decided = ({*plan.activations, *plan.shared} & (made | set(read))) - open_
        roots = {plan.shared.get(name, name) for name in decided}
        nodes = {node.name for node in before}
        weights = {v.name for node in before for v in node.inputs if v is not None and v.is_initializer()}
        return dataclasses.replace(
            plan,
            activations={name: entry for name, entry in plan.activations.items() if name in roots},
            shared={name: root for name, root in plan.shared.items() if name in decided},
            requants={key: entry for key, entry in plan.requants.items() if key.rpartition(":")[0] in nodes},
            weights={name: entry for name, entry in plan.weights.items() if name in weights},
            int_biases={bias: keys for bias, keys in plan.int_biases.items() if keys[1] in weights},
        )

    def _nodes_before(self, names: Iterable[str]) -> set[ir.Node]:
        """Everything that values depend on."""
        found: set[ir.Node] = set()
        stack = [self._values[name] for name in names]
        while stack:
            node = stack.pop().producer()
            if node is not None and node not in found:
                found.add(node)
                stack.extend(node_sources(node))
        return found


def equal_shapes(arrays: Iterable[SampleArrays]) -> tuple[tuple[int, ...], ...]:
    """Samples that can form a batch: all their arrays have equal shapes; groups by their first members."""
    listed = list(arrays)
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index in range(len(listed[0])):
        groups.setdefault(tuple(array.shape(index) for array in listed), []).append(index)
    return tuple(tuple(members) for members in groups.values())
