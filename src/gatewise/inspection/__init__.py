"""What an adapter came to: where its budget went, what its modules are worth, which modules or layers prompts use.

Numbers (``budget.py``, ``importance.py``, ``routing.py``, ``prompts.py``), and the same as text, image or page. A name is imported
when it is first used: reading an adapter's folder needs neither PEFT nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.inspection.budget import BudgetMap, ModuleBudget, RoundSummary, Value, rank_map, read_budget
    from gatewise.inspection.grid import OTHER
    from gatewise.inspection.importance import Importance, ModuleImportance, importance_of, score_adapter
    from gatewise.inspection.plotting import (
        check_image_suffix,
        check_suffix,
        plot,
        plot_gates,
        plot_importance,
        plot_prompts,
        plot_routing,
    )
    from gatewise.inspection.prompts import PromptMap, adapter_type, prompts_json, prompts_lines, prompts_table, read_prompts
    from gatewise.inspection.routing import ModuleUse, RoutingMap, route_data, routing_json, routing_lines, routing_of_rows
    from gatewise.inspection.suggestion import lora_settings, suggest, suggested_ranks
    from gatewise.inspection.text import (
        grid_table,
        importance_json,
        importance_lines,
        ranks_table,
        summary_lines,
        to_json,
        top_table,
    )

_HOME = {
    "BudgetMap": "budget",
    "Importance": "importance",
    "ModuleBudget": "budget",
    "ModuleImportance": "importance",
    "ModuleUse": "routing",
    "OTHER": "grid",
    "PromptMap": "prompts",
    "RoundSummary": "budget",
    "RoutingMap": "routing",
    "Value": "budget",
    "adapter_type": "prompts",
    "check_image_suffix": "plotting",
    "check_suffix": "plotting",
    "grid_table": "text",
    "importance_json": "text",
    "importance_lines": "text",
    "importance_of": "importance",
    "lora_settings": "suggestion",
    "plot": "plotting",
    "plot_gates": "plotting",
    "plot_importance": "plotting",
    "plot_prompts": "plotting",
    "plot_routing": "plotting",
    "prompts_json": "prompts",
    "prompts_lines": "prompts",
    "prompts_table": "prompts",
    "rank_map": "budget",
    "ranks_table": "text",
    "read_budget": "budget",
    "read_prompts": "prompts",
    "route_data": "routing",
    "routing_json": "routing",
    "routing_lines": "routing",
    "routing_of_rows": "routing",
    "score_adapter": "importance",
    "suggest": "suggestion",
    "suggested_ranks": "suggestion",
    "summary_lines": "text",
    "to_json": "text",
    "top_table": "text",
}

__all__ = [
    "OTHER",
    "BudgetMap",
    "Importance",
    "ModuleBudget",
    "ModuleImportance",
    "ModuleUse",
    "PromptMap",
    "RoundSummary",
    "RoutingMap",
    "Value",
    "adapter_type",
    "check_image_suffix",
    "check_suffix",
    "grid_table",
    "importance_json",
    "importance_lines",
    "importance_of",
    "lora_settings",
    "plot",
    "plot_gates",
    "plot_importance",
    "plot_prompts",
    "plot_routing",
    "prompts_json",
    "prompts_lines",
    "prompts_table",
    "rank_map",
    "ranks_table",
    "read_budget",
    "read_prompts",
    "route_data",
    "routing_json",
    "routing_lines",
    "routing_of_rows",
    "score_adapter",
    "suggest",
    "suggested_ranks",
    "summary_lines",
    "to_json",
    "top_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gatewise.inspection' has no attribute {name!r}")
    return getattr(import_module(f"gatewise.inspection.{_HOME[name]}"), name)
