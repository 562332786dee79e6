"""A Transformer layer whose linear modules are experts, and one such module. MiLoRA, arXiv 2410.18035.

    y = W x + gate · alpha / r · B A dropout(x)        for a row of the batch that keeps this expert; W x alone for the others

``RoutedBlock`` is the layer: its routers decide from the hidden states that enter it, then it runs as ever. A layer of an
encoder-decoder model's decoder has no prompt inside: its routers read the encoder's last hidden states, which it is given for its
cross-attention (ours: the paper has decoders alone).

``RoutedLinear`` is a module: while its layer runs, ``RoutingState.runs`` says what it adds. Where no gradients are asked for that
is known for the whole request (``KeptModule``): a module that no row keeps is its base module, and for one that is kept the A and B
of all adapters that keep it are gathered once, with gates and scaling, so that no step loops over adapters.

Shapes: b batch, t tokens, d hidden size, n rows of one adapter, m experts, r rank, d_in and d_out sizes of a linear module.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import Packing
from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin
from gatewise.internals.layer_stack import Layer, forward_arguments
from gatewise.internals.torch_modules import has_forward_hooks, is_plain
from gatewise.routed.config import RoutedLoraConfig
from gatewise.routed.request import Decision, LayerDecision, Pass, PreparedRequest, Request, RequestTracker, RoutingState, Shares
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
    decision is made inside ``forward``, so that the second run decides anew from what it is given, with a graph of its own. Both
    kinds of checkpointing then give a plain run's gradients.
    """

    routing: "LayerRouting"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, routed_pass=self.routing.enter(self, args, kwargs), **kwargs)

    def forward(self, *args: Any, routed_pass: Pass | None = None, **kwargs: Any) -> Any:
        routing = self.routing
        running = routed_pass or routing.enter(self, args, kwargs)
        if running.is_settled:
            return super().forward(*args, **kwargs)
        shares = routing.decide(routing.read_from(args, kwargs), running).shares
        if running.is_inference:
            for name, module in routing.modules.items():
                kept = shares.get(name)
                running.prepared.runs[module] = KeptModule(module, kept, running.prepared) if kept else module.base_layer
            return super().forward(*args, **kwargs)
        now = routing.now
        before = now.runs
        now.runs = {
            module: partial(module.with_gradients, shares=shares.get(name, ()), running=running)
            for name, module in routing.modules.items()
        }
        try:
            return super().forward(*args, **kwargs)
        finally:
            now.runs = before


class LayerRouting:
    """The routers and modules of one layer, which it makes a routed one.

    Attributes:
        path: the layer's in the base model.
        now: of the model, the same for all layers.
        modules: path within the layer -> module, of every module that is an expert of any adapter, in order.
    """

    def __init__(self, layer: Layer, tracker: RequestTracker) -> None:
        self.path, self.now = layer.path, tracker.now
        self.modules: dict[str, RoutedLinear] = {}
        self._routers: dict[str, tuple[Router, tuple[str, ...], RoutedLoraConfig]] = {}
        self._read = "encoder_hidden_states" if layer.reads_encoder else "hidden_states"
        names = forward_arguments(layer.module)
        self._place = names.index(self._read) if layer.reads_encoder else 0
        self._mask_place = names.index("attention_mask") if "attention_mask" in names else len(names)
        self._block = cast(Any, layer.module)
        self._block.routing = self
        add_mixin(self._block, RoutedBlock)

    def uninstall(self) -> None:
        """The layer is what it was."""
        del self._block.routing
        remove_mixin(self._block)

    def read_from(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The states by which the layer is routed, among its arguments."""
        states = _argument(self._read, self._place, args, kwargs)
        if not isinstance(states, Tensor):
            raise GatewiseError(
                f"layer {self.path} was run without the encoder's hidden states, by which it is routed: call the whole model"
            )
        return states

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
                experts = tuple(orders[adapter][self.path])
                self._routers[adapter] = (cast(Router, router), experts, configs[adapter])

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        """The pass that the layer runs in; called outside of what gradient checkpointing runs twice."""
        running = self.now.current
        if running is None:
            raise GatewiseError(
                f"layer {self.path} was run outside the forward of its model, so there is no prompt to route it by: call the model "
                "(old model code whose gradient checkpointing calls layers again by itself is not supported)"
            )
        if running.is_settled:
            return running
        if self.path in running.seen:
            raise GatewiseError(f"layer {self.path} runs more than once in a forward: models that share layers cannot be routed")
        running.seen.add(self.path)
        is_checkpointed = getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()
        if is_checkpointed and not running.continues:
            request = running.request
            if any(self._routers[adapter][2].balance_weight for adapter in request.groups if adapter in self._routers):
                # The decision inside is cut off from this graph (re-entrant checkpointing), so the balance loss has this one. Not
                # where there is no such loss: nothing would then run backwards through it, and it would keep H until the next
                # request.
                request.decided[self.path] = self._route(self.read_from(args, kwargs), request, again_in_backward=True)
        packing, mask = running.request.packing, _argument("attention_mask", self._mask_place, args, kwargs)
        if packing is not None and not any(mask is one for one in running.masks):
            if not packing.is_kept_by(mask):
                raise GatewiseError(
                    "a row holds several packed samples, but the model's attention does not keep them apart, which it does by "
                    "position_ids in sdpa and eager attention without a cache, or in flash attention of one row: give "
                    "use_cache=False, or train without packing and padding_free batches"
                )
            running.masks.append(mask)
        return running

    # Traced with what follows it, modules would not find what they are to run: torch.compile keeps that back until the layer ends.
    @torch.compiler.disable
    def decide(self, states: Tensor, running: Pass) -> LayerDecision:
        """The layer's decision for the pass: the one of its request, or a new one from H (b, t, d)."""
        request = running.request
        if running.continues and self.path in request.decided:
            return request.decided[self.path]
        made = self._route(states, request)
        request.decided.setdefault(self.path, made)
        return made

    def _route(self, states: Tensor, request: Request, again_in_backward: bool = False) -> LayerDecision:
        decisions, packing = [], request.packing
        for adapter, places in request.groups.items():
            if adapter not in self._routers:
                continue
            router, experts, config = self._routers[adapter]
            rows = None if places is None else torch.tensor(places, device=states.device)
            own, prompt = (states, request.prompt) if rows is None else (states[rows], request.prompt[places])
            centring = None  # in inference, what the router takes off now
            if request.training:
                key = (self.path, adapter)
                if key not in request.centrings:  # each prompt is observed once
                    if router.observes:
                        router.observe(own if packing is None else packing.apart(own), prompt)
                    request.centrings[key] = router.centring()
                centring = request.centrings[key]
            if again_in_backward:  # or its float32 copy of H would be kept, which checkpointing is there to avoid
                probabilities = checkpoint(
                    _read, router, own, prompt, centring, packing, use_reentrant=False, preserve_rng_state=False
                )
            else:
                probabilities = _read(router, own, prompt, centring, packing)
            gates = gates_of(probabilities, config.top_k, config.normalize_gates)
            decisions.append(Decision(adapter, rows, experts, probabilities, gates))
        return LayerDecision.of(decisions, self.modules, request.training, packing)


def _read(router: Router, states: Tensor, prompt: Tensor, centring: Any, packing: Packing | None) -> Tensor:
    """The probabilities of each row's experts or, in packed rows, each text's."""
    probabilities: Tensor = router(states if packing is None else packing.apart(states), prompt, centring)
    return probabilities


def _argument(name: str, place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


class RoutedLinear(nn.Module, LoraLayer):
    """PEFT's A and B around any linear base module: ``nn.Linear``, GPT-2's ``Conv1D``, quantised layers. Only base(x) is called.

    ``now`` is one object for the whole model; it tells what the module runs. ``path`` is the module's in the base model.
    ``prompt_router`` holds the routers of the adapters
    whose first expert in the layer this is: there PEFT saves, loads, moves, freezes and deletes them with A and B.
    """

    adapter_layer_names: tuple[str, ...] = (*LoraLayer.adapter_layer_names, "prompt_router")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.prompt_router = nn.ModuleDict()
        self.now, self.path = RoutingState(), ""
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
        if kwargs:
            kwargs.pop("adapter_names", None)
        now = self.now
        run = now.runs.get(self)
        if run is not None:
            return run(x, *args, **kwargs)
        if not (now.base_only or self.disable_adapters) and not set(self.active_adapters).isdisjoint(self.lora_A):
            raise GatewiseError("a routed module was run by itself, without gates: run the whole model, which reads the prompt")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def with_gradients(self, x: Tensor, *args: Any, shares: Shares, running: Pass, **kwargs: Any) -> Tensor:
        """base(x) and every share, as in training."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result if self.disable_adapters else self.add_shares(x, result, shares, running)

    def add_shares(self, x: Tensor, result: Tensor, shares: Shares, running: Pass) -> Tensor:
        """``result`` (b, ..., d_out) with the delta of every share added to its rows, one after the other, with its graph.

        Where the model flattens batch and tokens (OPT), x is (b · t, d_in), and the rows are those of their tokens.
        """
        dtype = result.dtype
        for share in shares:
            rows, gate = share.rows, share.gate
            if share.adapter in running.adapted:
                gate = gate.view(len(gate), -1) * running.adapted[share.adapter].to(gate.device)
            if len(x) != running.batch:
                self.check_flattened(x, running)
                gate = gate.flatten() if gate.ndim > 1 else gate.repeat_interleave(running.tokens)
                if rows is not None:
                    rows = (rows[:, None] * running.tokens + torch.arange(running.tokens, device=rows.device)).flatten()
            delta = self.delta(x if rows is None else x[rows], share.adapter, gate)
            result = result.to(torch.result_type(result, delta))  # rounded once, at the end
            result = result + delta if rows is None else result.index_add(0, rows, delta.to(result.dtype))
        return result.to(dtype)

    def delta(self, x: Tensor, adapter: str, gate: Tensor) -> Tensor:
        """gate · alpha / r · B A dropout(x): the one place where a request's routing meets the weights.

        The gate multiplies the r numbers between the factors, not the output. In half precision that product is taken in float32,
        so that the gate's gradient is summed in float32 too.

        Args:
            x: (n, ..., d_in).
            gate: (n,), or (n, t) for x (n, t, d_in).
        """
        first, second = cast(nn.Linear, self.lora_A[adapter]), self.lora_B[adapter]
        ranks = first(self.lora_dropout[adapter](self._cast_input_dtype(x, first.weight.dtype)))
        scale = (self.scaling[adapter] * gate).to(ranks.device).view(*gate.shape, *[1] * (ranks.ndim - gate.ndim))
        return second((ranks * scale).to(ranks.dtype))

    def check_flattened(self, x: Tensor, running: Pass) -> None:
        """Nothing, if x (b · t, d_in) holds every token of every row, as where the model flattens the two (OPT).

        Raises:
            GatewiseError: it does not.
        """
        if x.ndim != 2 or len(x) != running.batch * running.tokens:
            raise GatewiseError(
                f"{self.path} was given {tuple(x.shape)} for {running.batch} rows of {running.tokens} tokens: modules that see a "
                "choice of tokens, such as the experts of a mixture, cannot be routed; leave them out with exclude_modules"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: which modules are added depends on the prompt."""
        raise GatewiseError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

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

    The weights are gathered when it first runs. Where A and B are more than two matrices (dropout that is on, hooks), and in a pass
    in which adapters wait for the end of the prompt, the shares are added as in training.
    """

    def __init__(self, layer: RoutedLinear, shares: Shares, prepared: PreparedRequest) -> None:
        # Not what is prepared itself, which holds this: without a cycle the weights go when the cache goes.
        self._layer, self._shares, self._products, self._groups = layer, shares, prepared.products, prepared.request.groups
        self._gathered: Gathered | None = None
        self._dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """base(x) and what was decided: (b, ..., d_out) from (b, ..., d_in), or both with b · t in front."""
        layer, running = self._layer, cast(Pass, self._layer.now.current)
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters:
            return result
        rows, ours, is_flat = x, result, len(x) != running.batch
        if is_flat:
            layer.check_flattened(x, running)
            rows, ours = x.unflatten(0, (running.batch, -1)), result.unflatten(0, (running.batch, -1))
        if result.dtype != self._dtype:  # at first, and when autocast comes or goes
            self._gather(rows, ours)
        if self._gathered is None or running.adapted:
            return layer.add_shares(x, result, self._shares, running)
        total = self._gathered.add(rows, ours)
        return total.flatten(0, 1) if is_flat else total

    def _gather(self, x: Tensor, result: Tensor) -> None:
        layer, self._dtype, self._gathered = self._layer, result.dtype, None
        parts = []
        for share in self._shares:
            first, second = cast(nn.Linear, layer.lora_A[share.adapter]), cast(nn.Linear, layer.lora_B[share.adapter])
            if not is_plain(layer.lora_dropout[share.adapter], first, second, x):
                return
            rows = self._groups[share.adapter]
            # Rows that do not keep the module have a gate of zero: the layout is then the same in every module.
            rows = None if rows is not None and len(rows) == len(x) else rows
            parts.append(Part(first.weight, second.weight, layer.scaling[share.adapter], rows, share.gate))
        # A hook may have kept what the base module made.
        is_seen = has_forward_hooks(cast(nn.Module, layer.base_layer))
        self._gathered = self._products.gather(parts, result, in_place=not is_seen)
