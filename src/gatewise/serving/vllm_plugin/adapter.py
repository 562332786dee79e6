"""Reads a routed adapter from its folder, for an engine with its own module classes: the experts of each layer, and its router.

Needs neither vLLM nor Transformers; PEFT comes in with the routers, when the first adapter is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gatewise.adapters.files import CONFIG_FILE, PEFT_PREFIX, read_config, read_lora
from gatewise.errors import GatewiseError, reason_of
from gatewise.serving.engines import ROUTED, ROUTER

if TYPE_CHECKING:
    from gatewise.routed.router import Router


@dataclass(frozen=True)
class RoutedLayer:
    """A layer of the base model.

    Attributes:
        path: the layer's, as Transformers calls it.
        experts: paths of its experts within the layer, in the order of the router's probabilities.
        router: on the CPU, in evaluation mode.
    """

    path: str
    experts: tuple[str, ...]
    router: "Router"


@dataclass(frozen=True)
class RoutedAdapter:
    """What is read of a routed adapter beside its A and B."""

    top_k: int
    normalize_gates: bool
    layers: tuple[RoutedLayer, ...]


def is_routed(folder: str | Path) -> bool:
    """Whether there is a routed adapter in a folder; False where none can be read."""
    try:
        return bool(read_config(folder).get("peft_type") == ROUTED)
    except GatewiseError:
        return False


def read_routed(folder: str | Path, hidden_size: int) -> RoutedAdapter:
    """Reads configuration and routers.

    Args:
        hidden_size: d of the model that the adapter is to be put on.

    Raises:
        GatewiseError: the adapter was saved without the order of its experts, was trained with ``adapt="after_prompt"``, is
            damaged, or is for a model of another size.
    """
    from gatewise.routed.router import Router

    folder = Path(folder)
    config = read_config(folder)
    order = config.get("experts")
    if order is None:
        raise GatewiseError(
            f"{folder} was saved by a gatewise that did not write down the order of each layer's experts, without which its "
            "routers cannot be read: load it once with PeftModel.from_pretrained and save it again with save_pretrained"
        )
    if config.get("adapt", "always") != "always":
        raise GatewiseError(f"{folder} was trained with adapt={config['adapt']!r}, which gatewise has no more: train it again")
    layers = []
    try:
        settings = [config[name] for name in ("pooler", "activation", "normalize_states", "center_states")]
        top_k, states = int(config["top_k"]), _router_states(folder)
        for path, names in order.items():
            state = states.pop(f"{path}.{names[0]}")
            router = Router(hidden_size, len(names), *settings).eval().requires_grad_(False)
            router.load_state_dict(state)
            if not all(bool(tensor.isfinite().all()) for tensor in router.state_dict().values()):
                raise ValueError(f"the router of {path} has numbers that are not finite")
            if not 1 <= top_k <= len(names):
                raise ValueError(f"top_k is {top_k} for {len(names)} experts of {path}")
            # What cannot be run is found here, and not while it holds up the requests of others.
            router(torch.zeros(1, 2, hidden_size), torch.ones(1, 2, dtype=torch.bool))
            layers.append(RoutedLayer(path, tuple(names), router))
        if states:
            raise ValueError(f"there are routers at {', '.join(states)}, but experts in {CONFIG_FILE} has no such layer")
    except (KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise GatewiseError(
            f"{folder} does not fit a model of hidden size {hidden_size}, or is damaged ({reason_of(error)}): give an adapter of "
            "this base model, as save_pretrained wrote it"
        ) from error
    return RoutedAdapter(top_k, bool(config.get("normalize_gates", True)), tuple(layers))


def _router_states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The path of each module that keeps a router -> the router's state."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_lora(folder).others.items():
        module, _, name = key.removeprefix(PEFT_PREFIX).partition(f".{ROUTER}.")
        states.setdefault(module, {})[name] = tensor
    return states
