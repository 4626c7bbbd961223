"""Everything that is learned in one block, and how the block computes with it: :class:`BlockQuantizers`.

The executor asks for every input that a node reads; the answers here are those of the emitted graph: a stored tensor
comes behind its quantizer, a requantized input behind two, weights and biases as their codes stand for. The block that
first reads a stored tensor learns its step; later readers, in this block or others, find it decided. Steps of 8 bits
and more stay as they are: their error is far below what is learned here. While it learns, the block leaves them out
altogether, because they would cost as much time as the ones that matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from postquant.calib.layers import Layer
from postquant.calib.learn.adaptive import AdaptiveActivation
from postquant.calib.learn.block_borders import stored_for_readers
from postquant.calib.learn.borders import BorderedActivation, BorderLearning
from postquant.calib.learn.levels import LevelsActivation
from postquant.calib.learn.quantizers import (
    ActivationQuantizer,
    DropMasks,
    LearnedBias,
    fake_quantize,
)
from postquant.calib.learn.read_keys import copies_read, integer_nodes, keys_read, stored_key
from postquant.calib.learn.reader import Reader
from postquant.calib.learn.recipe import Recipe
from postquant.calib.learn.weights import WeightQuantizer, weight_quantizer
from postquant.passes import semantics
from postquant.passes.border_plan import wide
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer

Tensor = torch.Tensor
# Activation steps of fewer bits are learned.
FIXED_BITS = 8
Step = ActivationQuantizer | BorderedActivation | AdaptiveActivation | LevelsActivation


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A weighted node with a quantized weight.

    Attributes:
        node: The node.
        weight: Name of the weight.
        bias: Name of the bias that is learned, or None.
        input_key: ``int_biases``' key of the input's quantizer where the bias is emitted as int32, or None.
    """

    node: ir.Node
    weight: str
    bias: str | None
    input_key: str | None


class BlockQuantizers:
    """The learned quantizers of one block.

    Args:
        model: The simplified float model.
        plan: The plan; every entry has its numbers.
        nodes: The block's nodes.
        decided: Keys of quantizers that nodes in front of the block read through as well.
        recipe: How it is learned.
        device: Where it is learned.

    Attributes:
        weights: Weight name -> what is learned of it.
        biases: Bias name -> what is learned of it.
        steps: Key ("tensor" or "node:input") -> activation quantizer that is learned; of readers that make up for each
            other's errors, the first one's -> that of all copies.
        requants: Keys of all quantizers that belong to one input of one node.
        copies: Key of a reader that makes up for others' errors -> the keys of all of them.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        nodes: Sequence[ir.Node],
        decided: frozenset[str],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._device = device
        self.requants = plan.requants
        self.copies = copies_read(model, plan)
        self._integer = integer_nodes(model, plan)
        self._layers = [layer for node in nodes if (layer := _layer(node, plan)) is not None]
        self._fixed: dict[str, Tensor] = {}
        self.weights: dict[str, WeightQuantizer] = {}
        self.biases: dict[str, LearnedBias] = {}
        self.steps: dict[str, Step] = {}
        self._layer_of_bias: dict[str, _Layer] = {}
        for layer in self._layers:
            quantizer = plan.weights[layer.weight]
            assert isinstance(quantizer, TensorQuantizer)
            self.weights[layer.weight] = weight_quantizer(
                recipe.rounding, _array(model, layer.weight), quantizer, device
            )
            if layer.bias is not None:
                values = plan.biases.get(layer.bias)
                self.biases[layer.bias] = LearnedBias(_array(model, layer.bias) if values is None else values, device)
                self._layer_of_bias[layer.bias] = layer
        for key in keys_read(model, nodes, plan):
            entry = plan.requants.get(key) or plan.activations.get(key)
            assert isinstance(entry, TensorQuantizer)
            together = self.copies.get(key, (key,))
            if together[0] not in self.steps and decided.isdisjoint(together) and entry.spec.bits < FIXED_BITS:
                self.steps[together[0]] = self._step(key, entry.whole, nodes, recipe)
        self._stored_for = stored_for_readers(nodes, plan)
        self._prepare_fixed(model, nodes)

    def _step(self, key: str, entry: TensorQuantizer, nodes: Sequence[ir.Node], recipe: Recipe) -> Step:
        if entry.adaptive is not None:
            return AdaptiveActivation(entry, self._device, learned=bool(recipe.adaptive))
        if entry.table is not None:
            return LevelsActivation(entry, self._device)
        if entry.border is None:
            return ActivationQuantizer(entry, self._device)
        layer = next(found for node in nodes if f"{node.name}:0" == key and (found := Layer.of(node)) is not None)

        def weight() -> npt.NDArray[np.float32]:
            return np.asarray(self.weights[layer.weight].simulate(hard=True).detach().cpu().numpy(), np.float32)

        learning = BorderLearning(recipe.borders, layer, weight, recipe.temperature)
        return BorderedActivation(entry, learning, self._device)

    def advance(self, share: float) -> None:
        """Told the share of the iterations that are done, in [0, 1)."""
        for step in self.steps.values():
            step.advance(share)

    def remember(self) -> None:
        """The present state may be asked for again; leaves are the caller's."""
        for step in self._bordered():
            step.remember()

    def recall(self) -> None:
        """Goes back to the state that was remembered last, if any."""
        for step in self._bordered():
            step.recall()

    def _bordered(self) -> list[BorderedActivation]:
        return [step for step in self.steps.values() if isinstance(step, BorderedActivation)]

    @property
    def settled(self) -> bool:
        """Whether runs leave everything as it is; if not, the next run alone decides what its samples decide."""
        return all(step.settled for step in self.steps.values())

    def _prepare_fixed(self, model: ir.Model, nodes: Sequence[ir.Node]) -> None:
        """Constants of the unlearned plan, for comparison."""
        for layer in self._layers:
            quantizer = self._plan.weights[layer.weight]
            assert isinstance(quantizer, TensorQuantizer)
            simulated = quantizer.simulate(_array(model, layer.weight))
            self._fixed[layer.weight] = torch.as_tensor(simulated, device=self._device)
        for node in nodes:
            for value in node.inputs:
                name = None if value is None else value.name
                if name and value is not None and semantics.is_constant(value) and name not in self._fixed:
                    entry, corrected = self._plan.weights.get(name), self._plan.biases.get(name)
                    if isinstance(entry, TensorQuantizer):
                        self._fixed[name] = torch.as_tensor(entry.simulate(_array(model, name)), device=self._device)
                    elif corrected is not None:
                        self._fixed[name] = torch.as_tensor(np.array(corrected), device=self._device)

    @property
    def narrow(self) -> bool:
        """Whether a weight or a step that is learned has fewer than 8 bits."""
        entries = [self._plan.weights[name] for name in self.weights]
        return bool(self.steps) or any(
            isinstance(entry, TensorQuantizer) and entry.spec.bits < FIXED_BITS for entry in entries
        )

    @property
    def bits(self) -> int:
        """Of the narrowest step that is learned; 8 where none is."""
        entries = [self._plan.requants.get(key) or self._plan.activations[key] for key in self.steps]
        return min((e.spec.bits for e in entries if isinstance(e, TensorQuantizer)), default=FIXED_BITS)

    def constants(self, *, hard: bool = False) -> dict[str, Tensor]:
        """Learned weights and biases by name, as the block computes with them; ``hard`` rounds weights."""
        return {name: self._learned_constant(name, hard=hard) for name in (*self.weights, *self.biases)}

    def reader(
        self,
        *,
        masks: DropMasks | None = None,
        hard: bool = False,
        all_steps: bool = False,
        constants: Mapping[str, Tensor] | None = None,
    ) -> Reader:
        """Answers the executor with what is learned.

        Args:
            masks: Leaves activations out at random; None quantizes all.
            hard: Whether weights, borders and adaptive steps are as they are written.
            all_steps: Whether fixed steps of 8 bits and more are applied as well.
            constants: Learned weights and biases (:meth:`constants`), where several runs share them.
        """
        return Reader(self, masks=masks, hard=hard, all_steps=all_steps, learned=True, constants=constants)

    def unlearned(self) -> Reader:
        """Answers the executor with the plan as it was."""
        return Reader(self, masks=None, hard=True, all_steps=True, learned=False)

    def to_plan(self, plan: QuantPlan) -> QuantPlan:
        """The plan with everything that was learned."""
        weights = {name: weight.learned() for name, weight in self.weights.items()}
        steps = dict(self._learned_steps())
        stored = {name: wide([steps[key] for key in keys]) for name, keys in self._stored_for.items()}
        return dataclasses.replace(
            plan,
            weights={**plan.weights, **weights},
            biases={**plan.biases, **{name: bias.learned() for name, bias in self.biases.items()}},
            activations={**plan.activations, **{k: q for k, q in steps.items() if k in plan.activations}, **stored},
            requants={**plan.requants, **{k: q for k, q in steps.items() if k in plan.requants}},
        )

    def _first(self, key: str) -> str:
        """The key under which a reader's step is."""
        return self.copies.get(key, (key,))[0]

    def _learned_steps(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """Every reader's quantizer."""
        for first, step in self.steps.items():
            keys, learned = self.copies.get(first, (first,)), step.learned()
            for copy, key in enumerate(keys):
                yield key, dataclasses.replace(learned, copies=len(keys), copy=copy)

    # -- what the reader asks for --------------------------------------------------------------------------------

    def constant(self, name: str, *, hard: bool, learned: bool) -> Tensor | None:
        """A weight or bias as the block computes with it; None where the model's own value stands."""
        if learned and (name in self.weights or name in self.biases):
            return self._learned_constant(name, hard=hard)
        fixed = self._fixed.get(name)
        if name not in self.biases:
            return fixed
        values = self.biases[name].start if fixed is None else fixed
        step = self._bias_step(name, learned=False)
        return values if step is None else (values / step).round() * step

    def _learned_constant(self, name: str, *, hard: bool) -> Tensor:
        if name in self.weights:
            return self.weights[name].simulate(hard=hard)
        return self.biases[name].simulate(self._bias_step(name, learned=True))

    def _bias_step(self, name: str, *, learned: bool) -> Tensor | None:
        layer = self._layer_of_bias[name]
        if layer.input_key is None:
            return None
        weight = self._plan.weights[layer.weight]
        assert isinstance(weight, TensorQuantizer)
        scale = torch.as_tensor(weight.scale, device=self._device)
        source = self._scale_of(layer.input_key, learned=learned)
        if learned:
            scale = self.weights[layer.weight].scale.value().detach()
        if source is None:
            return None
        gain = 1.0
        if layer.node.op_type == "Gemm":
            # The bias is read before beta is applied.
            beta = float(semantics.attribute(layer.node, "beta", 1.0))
            gain = float(semantics.attribute(layer.node, "alpha", 1.0)) / (beta if beta else 1.0)
        return scale * source * gain

    def _scale_of(self, key: str, *, learned: bool) -> Tensor | None:
        step = self.steps.get(self._first(key)) or self.steps.get(self._plan.shared.get(key, key))
        if learned and step is not None:
            return step.scale.value().detach()
        quantizer = self._plan.input_quantizer(key)
        return None if quantizer is None else torch.as_tensor(quantizer.scale, device=self._device)

    def stored(self, node: ir.Node, value: ir.Value) -> str | None:
        """Key of the quantizer behind which a node reads a value, or None where it reads the float."""
        return stored_key(node, value, self._plan, self._integer)

    def quantize(
        self,
        key: str,
        x: Tensor,
        *,
        masks: DropMasks | None,
        hard: bool,
        all_steps: bool,
        learned: bool,
        penalties: list[Tensor] | None = None,
    ) -> Tensor:
        """``x`` behind one quantizer of the plan; what its step adds to the loss goes to ``penalties``.

        The key is the first one's of readers that make up for each other's errors, and ``x`` all copies.
        """
        step = self.steps.get(key)
        entry = self._plan.requants.get(key) or self._plan.activations.get(key)
        if step is not None and learned and (not hard or isinstance(step, ActivationQuantizer)):
            if isinstance(step, AdaptiveActivation):
                return step.simulate(x, masks, penalties)
            return step.simulate(x, masks)
        if step is not None and learned:
            entry = step.learned()
        elif learned and key in self._stored_for:
            firsts = dict.fromkeys(self._first(reader) for reader in self._stored_for[key])
            entry = wide([self.steps[first].learned() for first in firsts])
        assert isinstance(entry, TensorQuantizer)
        entry = entry.whole
        if any(part is not None for part in (entry.border, entry.adaptive, entry.table)):
            return torch.as_tensor(entry.simulate(x.detach().cpu().numpy()), device=x.device)
        if entry.spec.bits >= FIXED_BITS and not all_steps:
            return x
        point = int(entry.zero_point)
        scale = torch.as_tensor(entry.scale, device=x.device)
        mask = None if masks is None else masks.like(x)
        return fake_quantize(x, scale, entry.spec.qmin - point, entry.spec.qmax - point, mask)


def _layer(node: ir.Node, plan: QuantPlan) -> _Layer | None:
    if semantics.weight_index(node) != 1:
        return None
    weight = node.inputs[1]
    assert weight is not None
    if not isinstance(plan.weights.get(weight.name or ""), TensorQuantizer):
        return None
    bias = semantics.bias_of(node)
    key = None
    if bias is not None:
        known = plan.int_biases.get(bias.name or "")
        key = None if known is None else known[0]
    return _Layer(node, weight.name or "", None if bias is None else bias.name, key)


def _array(model: ir.Model, name: str) -> npt.NDArray[np.float32]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32, copy=False)
