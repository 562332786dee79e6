"""One Transformer layer whose LoRA modules are experts: it decides from the hidden states that enter it, then runs as ever.

A layer is not given hooks; its class is exchanged for a subclass of it, as PyTorch's FSDP2 does. For gradient checkpointing runs
``forward`` a second time in the backward pass, without hooks and when no pass is open any more. The subclass hands its pass to
``forward`` as an argument, which checkpointing keeps with the others, and decides inside ``forward``, so that the second run
decides anew from what it is given, with a graph of its own. Both kinds of checkpointing then give a plain run's gradients.

Shapes: b batch, t tokens, d hidden size, n rows of one adapter, m experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewise.errors import GatewiseError
from gatewise.internals.class_swap import Front, put_front, take_front
from gatewise.routed.config import RoutedLoraConfig
from gatewise.routed.layer import RoutedLinear, Share, Shares
from gatewise.routed.request import Decision, Pass, Request, RequestTracker
from gatewise.routed.router import Router, gates_of


@dataclass(frozen=True)
class BlockDecision:
    """What was decided in one layer for a request.

    Attributes:
        decisions: by adapter.
        parts: by path within the layer, what that adds in each module that was an expert of any adapter then, in order.
    """

    decisions: tuple[Decision, ...]
    parts: Mapping[str, tuple[Share, ...]]


class BlockRouting:
    """The routers and modules of one layer.

    Attributes:
        index, path: the layer's place in the stack, and its path in the base model.
        modules: path within the layer -> module, of every module that is an expert of any adapter, in order.
    """

    def __init__(self, index: int, path: str, tracker: RequestTracker) -> None:
        self.index, self.path, self._tracker = index, path, tracker
        self.modules: dict[str, RoutedLinear] = {}
        self._routers: dict[str, tuple[Router, tuple[str, ...], RoutedLoraConfig]] = {}

    def refresh(self, block: nn.Module, configs: Mapping[str, Any]) -> None:
        """Finds modules and routers again after adapters were added or deleted."""
        self.modules = {name: module for name, module in block.named_modules() if isinstance(module, RoutedLinear)}
        self._routers = {}
        for layer in self.modules.values():
            layer.running = self._tracker.running
            for adapter, router in layer.lora_router.items():
                experts = tuple(name for name, module in self.modules.items() if adapter in module.lora_A)
                self._routers[adapter] = (cast(Router, router), experts, configs[adapter])

    @property
    def is_settled(self) -> bool:
        """Whether all that the layer's modules run is known in the pass that is open, so that the layer has nothing to do."""
        running = self._tracker.current
        return running is not None and running.is_settled

    def enter(self, block: nn.Module, hidden: Tensor) -> Pass:
        """The pass that the layer runs in; called outside of what gradient checkpointing runs twice."""
        running = self._tracker.current
        if running is None:
            raise GatewiseError(
                f"layer {self.path} was run outside the forward of its model, so there is no prompt to route it by: call the model "
                "(old model code whose gradient checkpointing calls layers again by itself is not supported)"
            )
        if self.index in running.seen:
            raise GatewiseError(f"layer {self.path} runs more than once in a forward: models that share layers cannot be routed")
        running.seen.add(self.index)
        if not running.continues and _is_checkpointed(block) and self._is_balanced(running.request):
            # The decision inside is cut off from this graph (re-entrant checkpointing), so the balance loss has this one. Not where
            # there is no such loss: nothing would then run backwards through it, and it would keep H until the next request.
            running.request.decided[self.index] = self._decide(hidden, running.request, again_in_backward=True)
        return running

    def decide(self, hidden: Tensor, running: Pass) -> BlockDecision:
        """The layer's decision for the pass: the one of its request, or a new one from H (b, t, d)."""
        request = running.request
        if running.continues:
            return request.decided[self.index]
        made = self._decide(hidden, request)
        if self.index not in request.decided:
            request.decided[self.index] = made if request.training or running.is_inference else _without_graph(made)
        return made

    @contextmanager
    def open(self, decision: BlockDecision, batch: int, tokens: int) -> Iterator[None]:
        """While open, the layer's modules add what was decided, with gradients."""
        try:
            for name, module in self.modules.items():
                module.shares = Shares(decision.parts.get(name, ()), batch, tokens)
            yield
        finally:
            for module in self.modules.values():
                module.shares = None

    def _is_balanced(self, request: Request) -> bool:
        return any(self._routers[adapter][2].balance_weight for adapter in request.groups if adapter in self._routers)

    def _decide(self, hidden: Tensor, request: Request, again_in_backward: bool = False) -> BlockDecision:
        decisions = []
        for adapter, places in request.groups.items():
            if adapter not in self._routers:
                continue
            router, experts, config = self._routers[adapter]
            rows = None if places is None else torch.tensor(places, device=hidden.device)
            own, prompt = (hidden, request.prompt) if rows is None else (hidden[rows], request.prompt[places])
            centring = self._centring(router, adapter, request, own, prompt)
            if again_in_backward:  # or its float32 copy of H would be kept, which checkpointing is there to avoid
                probabilities = checkpoint(router, own, prompt, centring, use_reentrant=False, preserve_rng_state=False)
            else:
                probabilities = router(own, prompt, centring)
            gates = gates_of(probabilities, config.top_k, config.normalize_gates)
            decisions.append(Decision(adapter, rows, experts, probabilities, gates))
        return BlockDecision(tuple(decisions), self._parts(decisions, request.training))

    def _centring(self, router: Router, adapter: str, request: Request, hidden: Tensor, prompt: Tensor) -> Any:
        """What the router takes off in training, its prompts observed first, each once; else None, for what it takes off now."""
        if not request.training:
            return None
        key = (self.index, adapter)
        if key not in request.centrings:
            if router.observes:
                router.observe(hidden, prompt)
            request.centrings[key] = router.centring()
        return request.centrings[key]

    def _parts(self, decisions: Sequence[Decision], training: bool) -> dict[str, tuple[Share, ...]]:
        """The shares of every module. In training all experts stay in the graph, as data-parallel training demands."""
        parts: dict[str, tuple[Share, ...]] = dict.fromkeys(self.modules, ())
        for one in decisions:
            kept = [True] * len(one.experts) if training else (one.gates > 0).any(dim=0).tolist()
            for column, (name, is_kept) in enumerate(zip(one.experts, kept, strict=True)):
                if is_kept:
                    parts[name] += (Share(one.adapter, one.rows, one.gates[:, column]),)
        return parts


class RoutedBlock(Front, nn.Module):
    """What a layer's class is given in front of its own ``__call__`` and ``forward``."""

    routing: BlockRouting

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.is_settled:
            return super().__call__(*args, **kwargs)
        running = self.routing.enter(self, _hidden_of(args, kwargs))
        return super().__call__(*args, routed_pass=running, **kwargs)

    def forward(self, *args: Any, routed_pass: Pass | None = None, **kwargs: Any) -> Any:
        if routed_pass is None and self.routing.is_settled:
            return super().forward(*args, **kwargs)
        hidden = _hidden_of(args, kwargs)
        running = routed_pass or self.routing.enter(self, hidden)
        decision = self.routing.decide(hidden, running)
        if running.is_inference:
            running.prepared.add(self.routing.modules, decision.parts)
            return super().forward(*args, **kwargs)
        with self.routing.open(decision, *hidden.shape[:2]):
            return super().forward(*args, **kwargs)


def install(block: Any, routing: BlockRouting) -> None:
    """Makes a layer a routed one."""
    block.routing = routing
    put_front(block, RoutedBlock)


def uninstall(block: Any) -> None:
    """Undoes ``install``."""
    del block.routing
    take_front(block)


def _hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _is_checkpointed(block: nn.Module) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training and torch.is_grad_enabled()


def _without_graph(made: BlockDecision) -> BlockDecision:
    decisions = tuple(replace(one, probabilities=one.probabilities.detach(), gates=one.gates.detach()) for one in made.decisions)
    parts = {name: tuple(replace(share, gate=share.gate.detach()) for share in shares) for name, shares in made.parts.items()}
    return BlockDecision(decisions, parts)
