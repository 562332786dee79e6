"""Sites: the modules that a budget can be spent on, each with its layer's index and its kind (q, k, v, o, gate, up, down ...)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

KIND_ORDER: tuple[str, ...] = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "pooler")
"""The order in which kinds are shown; a kind that is not listed comes after these, by name."""


# The last two names of a path say what a module does; "output.dense" alone would not tell BERT's attention output from
# its feed-forward output, so the longer ending is looked up first.
_KIND_BY_ENDING: dict[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "c_attn": "qkv",
    "attn.c_proj": "o",
    "mlp.c_proj": "down",
    "c_fc": "up",
    "query": "q",
    "key": "k",
    "value": "v",
    "attention.output.dense": "o",
    "self_attention.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
    "q_lin": "q",
    "k_lin": "k",
    "v_lin": "v",
    "out_lin": "o",
    "lin1": "up",
    "lin2": "down",
    "fc1": "up",
    "wi": "up",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
    "fc2": "down",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "pooler.dense": "pooler",
}

_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|encoder|decoder)\.(\d+)\.")


@dataclass(frozen=True)
class Site:
    """One module that carries, or could carry, ranks.

    Attributes:
        path: the module's path in the base model, such as ``model.layers.3.self_attn.q_proj``; that of an expert in a stacked
            parameter is the parameter's with its number, such as ``model.layers.3.mlp.experts.down_proj[2]``.
        layer: the index of its Transformer layer, or None outside the stack of layers.
        kind: what the module does: one of ``KIND_ORDER`` or, for names not known, the path's last name.
    """

    path: str
    layer: int | None
    kind: str


def site(path: str) -> Site:
    """Reads layer and kind from a module path of the base model."""
    found = _LAYER_INDEX.search(path)
    names = path.partition("[")[0].split(".")
    endings = (".".join(names[-length:]) for length in (3, 2, 1))
    kind = next((_KIND_BY_ENDING[ending] for ending in endings if ending in _KIND_BY_ENDING), names[-1])
    return Site(path, int(found.group(1)) if found else None, kind)


def layer_path(path: str) -> str:
    """The path of the Transformer layer that a module is in, such as ``model.encoder.layers.3``; "" outside of the layers."""
    found = _LAYER_INDEX.search(path)
    return path[: found.end() - 1] if found else ""


def sites_in_order(paths: Iterable[str]) -> list[Site]:
    """Sites in the order in which tables list them: by layer (those outside the stack last), then kind, then path."""
    return sorted(map(site, paths), key=lambda place: (place.layer is None, place.layer or 0, kind_key(place.kind), place.path))


def kind_key(kind: str) -> tuple[int, str]:
    """Sort key: kinds in the order of ``KIND_ORDER``, then others by name."""
    return (KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER), kind)
