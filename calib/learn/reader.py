"""What the nodes of a block read in place of their inputs: :class:`Reader`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from postquant.calib.learn.quantizers import DropMasks
from postquant.passes import semantics
from postquant.runtime_ops.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from postquant.calib.learn.block_quantizers import BlockQuantizers

Tensor = torch.Tensor


class Reader:
    """The executor's ``read``: one object for one run through the block; see :meth:`BlockQuantizers.reader`."""

    def __init__(
        self,
        owner: BlockQuantizers,
        *,
        masks: DropMasks | None,
        hard: bool,
        all_steps: bool,
        learned: bool,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._owner = owner
        self._masks = masks
        self._hard = hard
        self._all_steps = all_steps
        self._learned = learned
        self._constants = {} if constants is None else constants
        self._stored: dict[tuple[str, str], Tensor] = {}
        self._copies: dict[str, tuple[Tensor, ...]] = {}
        self._penalties: list[Tensor] = []

    def another(self) -> Reader:
        """One with the same settings, for another run through the block, in this thread or another."""
        return Reader(
            self._owner,
            masks=self._masks,
            hard=self._hard,
            all_steps=self._all_steps,
            learned=self._learned,
            constants=self._constants,
        )

    def penalty(self) -> Tensor | float:
        """What the steps add to the loss of the run, mean over its samples."""
        return sum(self._penalties, 0.0)

    def __call__(self, node: ir.Node, index: int, name: str, tensor: Tensor) -> Tensor:
        """What the node computes with in place of ``tensor``."""
        value = node.inputs[index]
        assert value is not None
        if semantics.is_constant(value):
            if name in self._constants:
                return self._constants[name]
            constant = self._owner.constant(name, hard=self._hard, learned=self._learned)
            return tensor if constant is None else constant
        key = self._owner.stored(node, value)
        if key is not None:
            # All readers of a value see the same codes.
            if (name, key) not in self._stored:
                self._stored[name, key] = self._quantize(key, tensor)
            tensor = self._stored[name, key]
        own = f"{node.name}:{index}"
        if own not in self._owner.requants:
            return tensor
        together = self._owner.copies.get(own)
        return self._quantize(own, tensor) if together is None else self._copy(together, own, tensor)

    def _copy(self, together: tuple[str, ...], own: str, x: Tensor) -> Tensor:
        """What one of several readers sees that make up for each other's errors."""
        first = together[0]
        if first not in self._copies:
            entry = self._owner.requants[first]
            assert isinstance(entry, TensorQuantizer)
            assert entry.table_axis is not None
            axis = entry.table_axis
            quantized = self._quantize(first, torch.cat([x] * len(together), dim=axis))
            self._copies[first] = quantized.chunk(len(together), dim=axis)
        return self._copies[first][together.index(own)]

    def _quantize(self, key: str, x: Tensor) -> Tensor:
        return self._owner.quantize(
            key,
            x,
            masks=self._masks,
            hard=self._hard,
            all_steps=self._all_steps,
            learned=self._learned,
            penalties=self._penalties,
        )
