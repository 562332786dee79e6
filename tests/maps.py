"""Llama-shaped maps of budget and importance, and what shows them as plain text."""

import io
from typing import Any

from rich.console import Console

from gatewise.inspection import BudgetMap, Importance, ModuleBudget, ModuleImportance
from gatewise.sites import site

LLAMA_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def budget_stack(layers: int, rank: int | None = None, parameters: int = 100) -> BudgetMap:
    """A Llama-shaped map with ranks 0 .. 16 unless one is given."""
    modules = []
    for layer in range(layers):
        for index, name in enumerate(LLAMA_MODULES):
            place = site(f"model.layers.{layer}.{name}")
            r = (3 * layer + 5 * index) % 17 if rank is None else rank
            modules.append(ModuleBudget(place.path, layer, place.kind, r, 16, r * parameters, 16 * parameters, 2.0, r / 37))
    return BudgetMap(tuple(modules), "tiny")


def module(path: str, *scores: float) -> ModuleImportance:
    place = site(path)
    return ModuleImportance(path, place.layer, place.kind, scores, 2.0, 64, 100)


def importance(*modules: ModuleImportance, **changes: Any) -> Importance:
    facts = {"score": "path_integral", "rows": 8, "loss_base": 2.0, "loss_adapted": 1.25, "base_model": "tiny", "data": "d.jsonl"}
    return Importance(modules, **facts | changes)


def importance_stack(layers: int, size: float = 1e-3) -> Importance:
    """A Llama with scores from -5 to 11 times ``size``, two ranks a module."""
    found = []
    for layer in range(layers):
        for index, name in enumerate(LLAMA_MODULES):
            total = ((3 * layer + 5 * index) % 17 - 5) * size
            found.append(module(f"model.layers.{layer}.{name}", total * 2, -total))
    return importance(*found)


def rendered(shown: Any, width: int = 80, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]
