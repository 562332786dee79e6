"""A Transformer layer whose linear modules are experts, and one such module. MiLoRA, arXiv 2410.18035.

    y = W x + gate · alpha / r · B A dropout(x)        for a row of the batch that keeps this expert; W x alone for the others

``RoutedBlock`` is the layer: its routers decide from the hidden states that enter it, then it runs as ever. ``RoutedLinear`` is a
module: the open pass says what it runs. Where no gradients are asked for that is known for the whole request: a module that no row
keeps is its base module, and for one that is kept (``KeptModule``) the A and B of all adapters that keep it are gathered once, with
gates and scaling, so that no step loops over adapters.

Shapes: b batch, t tokens, d hidden size, n rows of one adapter, m experts, r rank, d_in and d_out sizes of a linear module.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import CallState
from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin
from gatewise.internals.torch_modules import called_directly, has_forward_hooks, is_plain
from gatewise.routed.config import RoutedLoraConfig
from gatewise.routed.request import Decision, Pass, Request, Share
from gatewise.routed.router import Router, gates_of
from gatewise.serving.products import Gathered, Part

NO_MERGE = (
    "a routed adapter cannot be merged, because every prompt chooses other modules: use it unmerged, or where one fixed model is "
    "needed train a plain LoraConfig adapter"
)
UNLOAD_FIRST = "call unload() on the routed PeftModel first, and give what it returns to get_peft_model"


class RoutedBlock(ObjectMixin, nn.Module):
    """The ``__call__`` and ``forward`` that a Transformer layer is given in front of its own.

    A layer is not given hooks, for gradient checkpointing runs ``forward`` a second time in the backward pass, without hooks and
    when no pass is open any more. The pass is an argument of ``forward``, which checkpointing keeps with the others, and the
    decision is made inside ``forward``, so that the second run decides anew from what it is given, with a graph of its own.
    """

    routing: "LayerRouting"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, routed_pass=self.routing.enter(), **kwargs)

    def forward(self, *args: Any, routed_pass: Pass | None = None, **kwargs: Any) -> Any:
        routing = self.routing
        running = routed_pass or routing.enter()
        if running.is_settled:
            return super().forward(*args, **kwargs)
        routing.decide(args[0] if args else kwargs["hidden_states"], running)
        before, routing.now.current = routing.now.current, running
        try:
            return super().forward(*args, **kwargs)
        finally:
            routing.now.current = before


class LayerRouting:
    """The routers and modules of one layer, which it makes a routed one.

    Attributes:
        path: the layer's in the base model.
        now: what is being done with the model, the same object for all layers.
        modules: path within the layer -> module, of every module that is an expert of any adapter, in order.
    """

    def __init__(self, path: str, block: Any, now: CallState) -> None:
        self.path, self.now, self._block = path, now, block
        self.modules: dict[str, RoutedLinear] = {}
        self._routers: dict[str, tuple[Router, tuple[str, ...], RoutedLoraConfig]] = {}
        block.routing = self
        add_mixin(block, RoutedBlock)

    def uninstall(self) -> None:
        """The layer is what it was."""
        del self._block.routing
        remove_mixin(self._block)

    def refresh(self, configs: Mapping[str, Any], orders: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Finds modules and routers again after adapters were added or deleted.

        Args:
            configs: by adapter.
            orders: by adapter, and there by layer, the experts' paths within it, in the order of its router's probabilities.
        """
        self.modules = {name: module for name, module in self._block.named_modules() if isinstance(module, RoutedLinear)}
        self._routers = {}
        for name, layer in self.modules.items():
            layer.now, layer.path = self.now, f"{self.path}.{name}"
            for adapter, router in layer.prompt_router.items():
                self._routers[adapter] = cast(Router, router), tuple(orders[adapter][self.path]), configs[adapter]

    def enter(self) -> Pass:
        """The pass that the layer runs in; called outside of what gradient checkpointing runs twice."""
        running: Pass | None = self.now.current
        if running is None:
            raise GatewiseError(
                f"layer {self.path} was run outside the forward of its model, so there is no prompt to route it by: call the model "
                "(old model code whose gradient checkpointing calls layers again by itself is not supported)"
            )
        if not running.is_settled:
            if self.path in running.seen:
                raise GatewiseError(
                    f"layer {self.path} runs more than once in a forward: models that share layers cannot be routed"
                )
            running.seen.add(self.path)
        return running

    # Traced with what follows it, modules would not find what they are to run: torch.compile keeps that back until the layer ends.
    @torch.compiler.disable
    def decide(self, states: Tensor, running: Pass) -> None:
        """Tells the pass what each module runs, by its request's decision or a new one from H (b, t, d)."""
        request = running.request
        made = request.decided.get(self.path) if running.continues else None
        if made is None:
            made = self._route(states, request)
            request.decided.setdefault(self.path, made)
        shares: dict[str, list[Share]] = {name: [] for name in self.modules}
        for adapter, one in made.items():
            # In training all run, as data-parallel training demands; else those that a row keeps.
            kept = [True] * len(one.experts) if request.training else (one.gates > 0).any(dim=0).tolist()
            rows = request.groups[adapter]
            gates = one.gates if rows is None else one.gates[rows]
            for column, name in enumerate(one.experts):
                if kept[column]:
                    shares[name].append(Share(adapter, rows, gates[:, column]))
        for name, module in self.modules.items():
            if not running.is_inference:
                running.runs[module] = partial(module.with_gradients, shares=shares[name])
            elif shares[name]:
                running.runs[module] = KeptModule(module, shares[name], request.products)
            else:
                running.runs[module] = called_directly(cast(nn.Module, module.base_layer))

    def _route(self, states: Tensor, request: Request) -> dict[str, Decision]:
        decisions = {}
        for adapter, rows in request.groups.items():
            if adapter not in self._routers:
                continue
            router, experts, config = self._routers[adapter]
            own, prompt = (states, request.prompt) if rows is None else (states[rows], request.prompt[rows])
            centring = None  # in inference, what the router takes off now
            if request.training:
                key = (self.path, adapter)
                if key not in request.centrings:  # each prompt is observed once
                    if router.observes:
                        router.observe(own, prompt)
                    request.centrings[key] = router.centring()
                centring = request.centrings[key]
            probabilities = router(own, prompt, centring)
            made = probabilities, gates_of(probabilities, config.top_k, config.normalize_gates)
            if rows is not None:
                empty, places = probabilities.new_zeros(len(states), len(experts)), torch.tensor(rows, device=states.device)
                made = empty.index_copy(0, places, made[0]), empty.index_copy(0, places, made[1])
            decisions[adapter] = Decision(experts, *made)
        return decisions


class RoutedLinear(nn.Module, LoraLayer):
    """PEFT's A and B around any linear base module: ``nn.Linear``, GPT-2's ``Conv1D``, quantised layers. Only base(x) is called.

    ``now`` is one object for the whole model; its pass tells what the module runs. ``path`` is the module's in the base model.
    ``prompt_router`` has the routers of the adapters whose first expert in the layer this is: there PEFT saves, loads, moves,
    freezes and deletes them with A and B.
    """

    adapter_layer_names: tuple[str, ...] = (*LoraLayer.adapter_layer_names, "prompt_router")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.prompt_router = nn.ModuleDict()
        self.now, self.path = CallState(), ""
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT, for routed adapters only.

        Raises:
            GatewiseError: plain LoRA is being put on a base model that still carries routed adapters.
        """
        if not isinstance(config, RoutedLoraConfig):
            raise GatewiseError(
                f"the base model still carries routed adapters, whose modules a {type(config).__name__} would be put into: "
                f"{UNLOAD_FIRST}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the pass has the module run: its base module, and what is added to some rows.

        Raises:
            GatewiseError: the module was run outside its model, or does not see every token of every row.
        """
        running: Pass | None = self.now.current
        run = None if running is None else running.runs.get(self)
        if run is None:
            if not self.disable_adapters and (running is None or running.request.groups):
                raise GatewiseError("a routed module was run by itself, without gates: run the whole model, which reads the prompt")
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        if running is not None and len(x) != running.batch:
            raise GatewiseError(
                f"{self.path} was given {tuple(x.shape)} for {running.batch} rows: modules that do not see the tokens row by row "
                "(mixtures, tables of positions, OPT's fc1 and fc2) cannot be routed; leave them out with exclude_modules"
            )
        return run(x, *args, **kwargs)

    def with_gradients(self, x: Tensor, *args: Any, shares: Sequence[Share], **kwargs: Any) -> Tensor:
        """base(x) and every share, as in training."""
        return self.add_shares(x, self.base_layer(x, *args, **kwargs), shares)

    def add_shares(self, x: Tensor, result: Tensor, shares: Sequence[Share]) -> Tensor:
        """``result`` (b, ..., d_out) with the delta of every share added to its rows, one after the other, with its graph."""
        dtype = result.dtype
        for adapter, rows, gate in shares:
            delta = self.delta(x if rows is None else x[rows], adapter, gate)
            result = result.to(torch.result_type(result, delta))  # rounded once, at the end
            if rows is not None:
                result = result.index_add(0, torch.tensor(rows, device=result.device), delta.to(result.dtype))
            else:
                result = result + delta
        return result.to(dtype)

    def delta(self, x: Tensor, adapter: str, gate: Tensor) -> Tensor:
        """gate · alpha / r · B A dropout(x) for x (n, ..., d_in) and gates (n,): where a request's routing meets the weights.

        The gate multiplies the r numbers between the factors, not the output. In half precision that product is taken in float32,
        so that the gate's gradient is summed in float32 too.
        """
        first, second = cast(nn.Linear, self.lora_A[adapter]), self.lora_B[adapter]
        ranks = first(self.lora_dropout[adapter](self._cast_input_dtype(x, first.weight.dtype)))
        scale = (self.scaling[adapter] * gate).to(ranks.device).view(-1, *[1] * (ranks.ndim - 1))
        return second((ranks * scale).to(ranks.dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: which modules are added depends on the prompt."""
        raise GatewiseError(NO_MERGE)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT, which also casts to the base's precision; the router keeps its own."""
        router = self.prompt_router.pop(adapter_name) if adapter_name in self.prompt_router else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if router is not None:
            target = device or cast(nn.Linear, self.lora_A[adapter_name]).weight.device
            held_back = any(parameter.is_meta for parameter in router.parameters())
            self.prompt_router[adapter_name] = router if held_back else router.to(target)

    def __repr__(self) -> str:
        return "routed." + super().__repr__()


class KeptModule:
    """What a module runs that some row of a request keeps, in inference: the base module and two gathered products.

    The weights are gathered when it first runs. Where A and B are more than two matrices (dropout that is on, hooks), the shares
    are added as in training.
    """

    def __init__(self, layer: RoutedLinear, shares: Sequence[Share], products: Any) -> None:
        self._layer, self._shares, self._products = layer, shares, products
        self._base = called_directly(cast(nn.Module, layer.base_layer))
        self._gathered: Gathered | None = None
        self._dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """base(x) and what was decided: (b, ..., d_out) from (b, ..., d_in)."""
        layer = self._layer
        result = self._base(x, *args, **kwargs)
        if result.dtype != self._dtype:  # at first, and when autocast comes or goes
            self._gather(x, result)
        return layer.add_shares(x, result, self._shares) if self._gathered is None else self._gathered.add(x, result)

    def _gather(self, x: Tensor, result: Tensor) -> None:
        layer, self._dtype, self._gathered = self._layer, result.dtype, None
        parts = []
        for adapter, rows, gate in self._shares:
            first, second = cast(nn.Linear, layer.lora_A[adapter]), cast(nn.Linear, layer.lora_B[adapter])
            if not is_plain(layer.lora_dropout[adapter], first, second, x):
                return
            # Rows that do not keep the module have a gate of zero: the layout is then the same in every module.
            parts.append(Part(first.weight, second.weight, layer.scaling[adapter], rows, gate))
        # A hook may have kept what the base module made.
        is_seen = has_forward_hooks(cast(nn.Module, layer.base_layer))
        self._gathered = self._products.gather(parts, result, in_place=not is_seen)
