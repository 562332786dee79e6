"""Reruns only the upper layers of a Transformer, from the kept output of the layer below.

A change in layer l leaves every activation below l as it was. ``Stack`` records each layer's output once and then lets the whole
model's forward run with the layers below l passing through what was kept. Embeddings, masks, the final norm, the head and the
loss run as the model wrote them, so nothing here knows an architecture.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Record = list[Tensor]
"""The output hidden states (b, t, d) of every layer, in order."""


class Stack:
    """The stack of layers of a model, and at which of them each LoRA module first acts.

    ``stage[path]`` is the first layer that has to run again when ranks of that module change: the module's layer, 0 for a
    module below the stack, ``len(layers)`` for one above it (only the head runs). Where no stack of layers that run once each
    in order and return a tensor is found (ALBERT shares one layer) all stages are 0: everything runs, slower and right.

    Args:
        sites: the LoRA layers by path.
        run: one forward of the model, used to see the order in which modules act.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, nn.Module], run: Callable[[], object]) -> None:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        wanted = {id(layer) for layer in sites.values()}

        def sites_inside(modules: nn.ModuleList) -> int:
            return sum(id(module) in wanted for module in modules.modules())

        best = max(lists, key=sites_inside, default=None)
        self.layers: list[nn.Module] = list(best) if best is not None and sites_inside(best) else []
        events = self._trace(sites, run)
        if [index for index in events if isinstance(index, int)] != list(range(len(self.layers))):
            self.layers = []
        self.stage = dict.fromkeys(sites, 0)
        done = 0
        for event in events if self.layers else []:
            if isinstance(event, int):
                done = event + 1
            else:
                self.stage[event] = done

    def _trace(self, sites: Mapping[str, nn.Module], run: Callable[[], object]) -> list[int | str]:
        """Layer indices as they finish and module paths as they first act, in the order of one forward."""
        events: list[int | str] = []
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):

                def finished(_m: nn.Module, _a: object, output: object, index: int = index) -> None:
                    # An output that is not a tensor breaks the order on purpose: such layers cannot be passed through.
                    events.append(index if isinstance(output, Tensor) else -1)

                stack.callback(layer.register_forward_hook(finished).remove)
            for path, site in sites.items():

                def seen(*_: object, path: str = path) -> None:
                    if path not in events:
                        events.append(path)

                stack.callback(site.register_forward_hook(seen).remove)
            run()
        return events

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Keeps the output of every layer of the forward that runs while open."""
        record: Record = []
        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.register_forward_hook(lambda _m, _a, output: record.append(output))
                stack.callback(handle.remove)
            yield record

    @contextmanager
    def resumed(self, record: Record, stage: int, copies: int = 1) -> Iterator[None]:
        """While open, a forward starts at layer ``stage`` with the recorded input, repeated ``copies`` times along the batch.

        The batch given to the model must be repeated in the same way: copy-major, that is ``tensor.repeat(copies, ...)``.
        """
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers[:stage]):
                last = index == stage - 1
                kept = record[index].repeat(copies, *[1] * (record[index].ndim - 1)) if last else None
                stack.enter_context(_passing(layer, kept))
            yield


@contextmanager
def _passing(layer: nn.Module, output: Tensor | None) -> Iterator[None]:
    """The layer returns ``output``, or its own input when None (its result will not be used)."""
    own = layer.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if output is not None:
            return output
        return args[0] if args else kwargs["hidden_states"]

    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
