"""Where an adapter's budget went: true ranks, parameters and norms by layer and kind, as table, plot, page or JSON.

Reads any LoRA adapter folder without its base model. What the modules are worth (``gatewise.importance``) is shown the same way.
"""

from gatewise.report.budget_map import BudgetMap, ModuleBudget, RoundSummary, Value
from gatewise.report.grid import OTHER
from gatewise.report.importance_map import Importance, ModuleImportance
from gatewise.report.importance_text import importance_json, importance_lines, top_table
from gatewise.report.plotting import check_image_suffix, check_suffix, plot, plot_importance, plot_routing
from gatewise.report.prompt_map import PromptMap, adapter_type, prompts_json, prompts_lines, prompts_table, read_prompts
from gatewise.report.prompt_plot import plot_gates, plot_prompts
from gatewise.report.reading import rank_map, read_budget
from gatewise.report.routing_map import ModuleUse, RoutingMap, routing_json, routing_lines
from gatewise.report.table import grid_table, ranks_table, summary_lines, to_json

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
    "routing_json",
    "routing_lines",
    "summary_lines",
    "to_json",
    "top_table",
]
