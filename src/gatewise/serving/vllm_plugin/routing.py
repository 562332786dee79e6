"""The gates of a vLLM worker's requests: decided while their prompts are read, kept until they end, put between A and B.

A request has a row of a table, with a gate for every expert that any routed adapter could have. Row 0 is ones and is that of all
requests with plain LoRA, row 1 is zeros and that of requests without an adapter. Every token of a step finds its row, and every
module with LoRA finds its experts' columns.

Nothing here imports vLLM.

Shapes: n tokens of a step, d hidden size, m experts of a layer, s slices of a module.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.errors import GatewiseError, some
from gatewise.serving.vllm_plugin.adapter import RoutedAdapter, RoutedLayer

PLAIN, BASE = 0, 1
_RESERVED = 2
_ROWS = 16  # at first; the table grows


@dataclass(frozen=True)
class Part:
    """A request's tokens in a step.

    Attributes:
        request: its id.
        adapter: vLLM's number of its adapter; 0 for none.
        tokens: that the step computes of it.
        computed: that were computed before.
        prompt: how many tokens its prompt has.
    """

    request: str
    adapter: int
    tokens: int
    computed: int
    prompt: int


@dataclass(frozen=True)
class Placed:
    """A routed adapter in a worker.

    Attributes:
        layers: by path in vLLM's model, with the columns of their experts.
    """

    adapter: RoutedAdapter
    layers: Mapping[str, tuple[RoutedLayer, Tensor]]


@dataclass(frozen=True)
class _Prompt:
    """The tokens of a step that a prompt's gates are decided by, the row that these come to, and by what they are decided."""

    start: int
    end: int
    row: int
    placed: Placed


class Routing:
    """Of one worker. ``begin`` says what a step computes; then the model runs, and its modules ask for their gates.

    Args:
        model: vLLM's, whose layers are watched once an adapter has routers for them.
        modules: path of each module with LoRA -> the paths of the experts that its slices are; None for a slice that no adapter
            can name.
        tokens: that a step has at most.
        device: of the table.
        agree: makes a tensor the same in all processes that share the model's layers. Each has all hidden states and all routers,
            but where two experts are all but equally probable a last bit could have them choose differently.

    Attributes:
        requests: the row of each request that has gates.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, Sequence[str | None]],
        tokens: int,
        device: torch.device,
        agree: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._model, self._agree = model, agree
        names = [name for slices in modules.values() for name in slices if name is not None]
        self._columns = {name: column for column, name in enumerate(dict.fromkeys(names))}
        # The last column is for slices that are no experts: one for plain adapters alone.
        nobody = len(self._columns)
        self._of_module = {
            path: torch.tensor([self._columns.get(name or "", nobody) for name in slices], device=device)
            for path, slices in modules.items()
        }
        self._table = torch.ones(_RESERVED + _ROWS, nobody + 1, device=device)
        self._table[BASE] = 0
        self.requests: dict[str, int] = {}
        self._free = list(range(_RESERVED, len(self._table)))
        self._row_of_token = torch.zeros(tokens, dtype=torch.long, device=device)
        self._prompts: list[_Prompt] = []
        self._kept: Tensor | None = None
        self._spans: list[tuple[int, int]] | None = None  # of the last step, if all its gates were decided before
        self._watched: set[str] = set()
        self.is_at_work = False

    def place(self, adapter: RoutedAdapter, name_of: Callable[[str], str]) -> Placed:
        """Finds an adapter's experts among the modules.

        Args:
            name_of: what the engine calls a module, by its path in the base model.

        Raises:
            GatewiseError: the engine adapts no such module, or its layers are not given hidden states.
        """
        layers, missing = {}, []
        for layer in adapter.layers:
            names = [name_of(f"{layer.path}.{name}") for name in layer.experts]
            missing += [name for name in names if name not in self._columns]
            path = _layer_path(names[0], layer.path.rpartition(".")[2])
            columns = torch.tensor([self._columns.get(name, 0) for name in names], device=self._table.device)
            layer.router.to(self._table.device)
            layers[path] = (layer, columns)
        if missing:
            raise GatewiseError(
                f"vLLM adapts no modules {some(missing)}, which are experts of this adapter: start it with --lora-target-modules "
                "as serving.json or gatewise.serving.engines.serving_settings gives them"
            )
        for path in layers.keys() - self._watched:
            module = self._model.get_submodule(path)
            bound = signature(type(module).forward)
            if "hidden_states" not in bound.parameters:
                raise GatewiseError(
                    f"vLLM's layer {path} ({type(module).__name__}) is not given hidden_states, by which its modules are chosen: "
                    "serve this adapter with PEFT"
                )
            module.register_forward_pre_hook(partial(self._read, path, bound), with_kwargs=True)
            self._watched.add(path)
        return Placed(adapter, layers)

    # ---- requests ----

    def release(self, requests: Iterable[str]) -> None:
        """These have ended; their names may come again."""
        for request in requests:
            row = self.requests.pop(request, None)
            if row is not None:
                self._free.append(row)

    def idle(self) -> None:
        """The next step has no routed rows."""
        self.is_at_work, self._prompts, self._kept, self._spans = False, [], None, None

    def begin(self, parts: Sequence[Part], placed: Callable[[int], Placed | None]) -> bool:
        """Tells what the next step computes, in the order of its tokens; and whether all tokens have the gates of the last step's.

        A request that has no gates yet reads its prompt now, all of it. One that has some keeps them, also where it computes its
        prompt and what it had written once more, after it was preempted.

        Args:
            placed: a routed adapter by its number; None for a plain one.

        Raises:
            GatewiseError: a prompt is read in pieces.
        """
        before, kept = self._spans, self._kept
        self.idle()
        spans: list[tuple[int, int]] = []  # (row, tokens)
        start = 0
        for part in parts:
            routed = placed(part.adapter) if part.adapter else None
            if routed is not None:
                self.is_at_work = True
                if part.request not in self.requests:
                    self._start(part, start, routed)
                spans.append((self.requests[part.request], part.tokens))
            else:
                spans.append((PLAIN if part.adapter else BASE, part.tokens))
            start += part.tokens
        # While prompts are read gates change, and only so does a row become another request's.
        self._spans = None if self._prompts else spans
        if before is not None and self._spans == before:
            self._kept = kept
            return True
        if not self.is_at_work:
            return False
        rows, counts = torch.tensor(spans).T
        self._row_of_token[:start] = torch.repeat_interleave(rows, counts).to(self._row_of_token.device)
        self._row_of_token[start:] = BASE
        if not self._prompts and self._table.device.type == "cpu":  # elsewhere a look at the table would hold up the device
            self._kept = (self._table[rows.unique()] != 0).any(dim=0)
        return False

    def _start(self, part: Part, start: int, placed: Placed) -> None:
        if part.computed or part.tokens < part.prompt:
            raise GatewiseError(
                f"the prompt of {part.request} was to be read in pieces ({part.computed} tokens before and {part.tokens} now, of "
                f"{part.prompt}), but a routed adapter chooses its modules by the whole prompt: report this"
            )
        if not self._free:
            more = torch.ones_like(self._table)
            self._free = list(range(len(self._table), 2 * len(self._table)))
            self._table = torch.cat([self._table, more])
        row = self.requests[part.request] = self._free.pop()
        self._table[row] = 0
        self._prompts.append(_Prompt(start, start + part.prompt, row, placed))

    # ---- while the model runs ----

    @torch.no_grad()
    def _read(self, path: str, bound: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decides in a layer for the prompts of the step, from the hidden states that enter it."""
        if not self._prompts:
            return
        from gatewise.routed.router import gates_of

        given = bound.bind(layer, *args, **kwargs).arguments
        hidden, residual = given["hidden_states"], given.get("residual")
        for prompt in self._prompts:
            if path not in prompt.placed.layers:
                continue
            routed, columns = prompt.placed.layers[path]
            states = hidden[prompt.start : prompt.end]
            if residual is not None:
                states = states + residual[prompt.start : prompt.end]
            probabilities = routed.router(states[None], torch.ones(1, len(states), dtype=torch.bool, device=states.device))
            adapter = prompt.placed.adapter
            gates = gates_of(probabilities, adapter.top_k, adapter.normalize_gates)[0]
            self._table[prompt.row, columns] = self._agree(gates.to(self._table.dtype))

    def gates(self, path: str, tokens: int) -> Tensor | None:
        """Gates (s, n, 1) of a module's slices; None where no request keeps any of them."""
        columns = self._of_module[path]
        if self._kept is not None and not bool(self._kept[columns].any()):
            return None
        return self._table[self._row_of_token[:tokens]][:, columns].T.unsqueeze(-1)


def _layer_path(module: str, number: str) -> str:
    """The path of the layer with this number that a module lies in."""
    names = module.split(".")
    return ".".join(names[: names.index(number) + 1]) if number in names else module
