"""What a run tells of its adapter by itself: numbers for ``metrics.json``, a table for the terminal, pictures for its folder."""

from functools import partial
from pathlib import Path
from typing import Any

from gatewise.adapters.files import peft_type, stored_numbers
from gatewise.inspection.budget import read_budget
from gatewise.inspection.plotting import BUDGET_TITLE, heatmap, plot_prompts, plot_routing
from gatewise.inspection.prompts import read_prompts
from gatewise.inspection.text import grid_table, prompts_table, routing_json
from gatewise.parts import Report, Run


def report_of(adapter: Path) -> Report:
    """What a saved adapter is: of LoRA where the ranks are, of SPT which layers take a prompt and what the search says of all."""
    kind = peft_type(adapter)
    if kind == "SELECTIVE_PROMPT":
        prompts = read_prompts(adapter)
        numbers: dict[str, Any] = {"prompt_layers": list(prompts.chosen)}
        if prompts.gates is not None:
            numbers["gates"] = list(prompts.gates)
        table, draw = partial(prompts_table, prompts), partial(plot_prompts, prompts)
        return Report(stored_numbers(adapter), numbers, table, {"layers.png": draw})
    if kind not in ("LORA", "ROUTED_LORA", "ADALORA"):
        return Report(stored_numbers(adapter))
    budget = read_budget(adapter)
    grid, stored = budget.grid(), budget.parameters + budget.other_parameters
    draw = partial(heatmap, grid, BUDGET_TITLE, budget.notes(grid.title))
    return Report(stored, {"ranks": budget.ranks}, partial(grid_table, grid), {"ranks.png": draw})


def study_of(run: Run, model: Any) -> Report:
    """What only the model itself can tell: of a routed adapter, which modules the prompts of dev choose."""
    if model.peft_config[model.active_adapter].peft_type != "ROUTED_LORA":
        return Report()
    from gatewise.inspection.routing import routing_of_rows

    rows, base = run.recipe.training.eval_batch_size, run.recipe.model
    routing = routing_of_rows(model, run.tokenizer, run.dev, rows, base_model=base, data=run.watched, collate=run.collate)
    return Report(numbers={"routing": routing_json(routing)}, pictures={"routing.png": partial(plot_routing, routing)})
