"""What an adapter came to: where its budget went, what its modules are worth, which modules or layers its prompts use.

Numbers: ``budget.py``, ``importance.py``, ``routing.py``, ``prompts.py``, and ``suggestion.py``, ranks for the next adapter. Shown:
``grid.py`` lays numbers out by layer and kind, ``text.py`` and ``plotting.py`` show that.

Reading an adapter's folder needs neither PEFT nor Transformers, so what needs them is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise.inspection.budget import BudgetMap, ModuleBudget, Value, read_budget
from gatewise.inspection.plotting import (
    check_plot,
    plot,
    plot_importance,
    plot_prompts,
    plot_routing,
)
from gatewise.inspection.prompts import PromptMap, read_prompts
from gatewise.inspection.text import (
    budget_json,
    budget_lines,
    grid_table,
    importance_json,
    importance_lines,
    prompts_lines,
    prompts_table,
    routing_json,
    routing_lines,
)

if TYPE_CHECKING:
    from gatewise.inspection.importance import Importance, ModuleImportance, importance_of, score_adapter
    from gatewise.inspection.routing import ModuleUse, RoutingMap, route_data, routing_of_rows
    from gatewise.inspection.suggestion import suggest, suggested_ranks

_LATER = {
    **dict.fromkeys(("Importance", "ModuleImportance", "importance_of", "score_adapter"), "importance"),
    **dict.fromkeys(("ModuleUse", "RoutingMap", "route_data", "routing_of_rows"), "routing"),
    **dict.fromkeys(("suggest", "suggested_ranks"), "suggestion"),
}

__all__ = [
    "BudgetMap",
    "Importance",
    "ModuleBudget",
    "ModuleImportance",
    "ModuleUse",
    "PromptMap",
    "RoutingMap",
    "Value",
    "budget_json",
    "budget_lines",
    "check_plot",
    "grid_table",
    "importance_json",
    "importance_lines",
    "importance_of",
    "plot",
    "plot_importance",
    "plot_prompts",
    "plot_routing",
    "prompts_lines",
    "prompts_table",
    "read_budget",
    "read_prompts",
    "route_data",
    "routing_json",
    "routing_lines",
    "routing_of_rows",
    "score_adapter",
    "suggest",
    "suggested_ranks",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'gatewise.inspection' has no attribute {name!r}")
    return getattr(import_module(f"gatewise.inspection.{_LATER[name]}"), name)
