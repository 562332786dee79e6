"""Where an adapter's budget went: true ranks, parameters and norms by layer and kind, as table, plot, page or JSON.

Reads any LoRA adapter folder without its base model.
"""

from gatewise.report.budget_map import OTHER, BudgetMap, ModuleBudget, RoundSummary, Value
from gatewise.report.plotting import plot
from gatewise.report.reading import rank_map, read_budget
from gatewise.report.table import ranks_table, summary_lines, to_json

__all__ = [
    "OTHER",
    "BudgetMap",
    "ModuleBudget",
    "RoundSummary",
    "Value",
    "plot",
    "rank_map",
    "ranks_table",
    "read_budget",
    "summary_lines",
    "to_json",
]
