"""Which layers an SPT adapter (arXiv 2310.20127) puts new prompts into: read from its folder, shown as table, text and JSON."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from gatewise.adapters.selection import SEARCH_FILE, read_selection
from gatewise.errors import GatewiseError

_KEY = re.compile(r"\.(\d+)\.selective_prompt\.(spt_generator|spt_gate_logit)\b")


@dataclass(frozen=True)
class PromptMap:
    """Where an SPT adapter's prompts enter.

    Attributes:
        layers: how many layers the model has; up to the last one with a prompt where that is not known.
        chosen: the layers with a new prompt, in order; all of a hyper-network.
        gates: a of every layer, at the end of the search or, in a hyper-network, as it stands; None without a search.
        losses: the mean loss with each layer among the open ones, where a search chose by that.
        hyper_network: still being searched, so that the layers are not yet chosen.
        parameters: layer -> numbers in its generator and gate.
        other_parameters: numbers outside, such as a classifier's head.
        num_prompt_tokens: prompt tokens in front of the text.
        base_model: where the adapter belongs, as far as known.
    """

    layers: int
    chosen: tuple[int, ...]
    gates: tuple[float, ...] | None
    hyper_network: bool
    parameters: dict[int, int]
    other_parameters: int
    num_prompt_tokens: int
    base_model: str | None = None
    losses: tuple[float, ...] | None = None

    def role(self, layer: int) -> str:
        """What a layer does with prompts: "new", "carried" on from below, or "none" where there are none yet."""
        return "new" if layer in self.chosen else "carried" if layer > self.chosen[0] else "none"


def adapter_type(folder: str | Path) -> str | None:
    """The ``peft_type`` of an adapter's folder; None where it cannot be told."""
    config = _config(Path(folder))
    return str(config.get("peft_type")) if config is not None else None


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def read_prompts(folder: str | Path) -> PromptMap:
    """Reads the folder of an SPT adapter, or a checkpoint of a search; the base model is not needed.

    Raises:
        GatewiseError: not such an adapter, or a file that is missing or damaged.
    """
    folder = Path(folder)
    config = _config(folder)
    kind = None if config is None else config.get("peft_type")
    if config is None or kind != "SELECTIVE_PROMPT":
        raise GatewiseError(f"{folder} holds an adapter of peft_type {kind}, expected SELECTIVE_PROMPT (method spt)")
    weights = folder / "adapter_model.safetensors"
    parameters: dict[int, int] = {}
    logits: dict[int, float] = {}
    other = 0
    try:
        with safe_open(str(weights), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                count, match = math.prod(file.get_slice(key).get_shape()), _KEY.search(key)
                if match is None:
                    other += count
                    continue
                layer = int(match[1])
                parameters[layer] = parameters.get(layer, 0) + count
                if match[2] == "spt_gate_logit":
                    logits[layer] = float(file.get_tensor(key).float().item())
    except (SafetensorError, OSError, RuntimeError) as error:
        raise GatewiseError(f"{weights} cannot be read, it may be missing or cut off: save the adapter again ({error})") from error
    if not parameters:
        raise GatewiseError(f"{weights} holds no prompt generators: save the adapter again")
    gates = losses = None
    if logits:
        gates = tuple(1 / (1 + math.exp(-logits[layer])) for layer in sorted(logits))
    elif (folder / SEARCH_FILE).is_file():
        selection = read_selection(folder / SEARCH_FILE)
        gates, losses = tuple(selection.gates), None if selection.losses is None else tuple(selection.losses)
    chosen = tuple(sorted(parameters))
    return PromptMap(
        layers=max(chosen[-1] + 1, len(gates or ()), _layers_noted(folder)),
        chosen=chosen,
        gates=gates,
        hyper_network=bool(logits),
        parameters={layer: parameters[layer] for layer in chosen},
        other_parameters=other,
        num_prompt_tokens=int(config.get("num_prompt_tokens", 0)),
        base_model=config.get("base_model_name_or_path") or None,
        losses=losses,
    )


def _layers_noted(folder: Path) -> int:
    try:
        return int(json.loads((folder / "gatewise.json").read_text(encoding="utf-8"))["num_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # an adapter from elsewhere


def prompts_table(prompts: PromptMap) -> Table:
    """The layers as a table for the terminal; those with a new prompt stand out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("layer", Text("total", style="bold"), justify="right")
    table.add_column("prompt", Text(f"{len(prompts.chosen)} new", style="bold"))
    columns = [(name, numbers) for name, numbers in (("gate", prompts.gates), ("loss", prompts.losses)) if numbers is not None]
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_column("parameters", Text(f"{sum(prompts.parameters.values()):,}", style="bold"), justify="right")
    for layer in range(prompts.layers):
        new = layer in prompts.chosen
        cells = [f"{numbers[layer]:.3f}" if layer < len(numbers) else "·" for _, numbers in columns]
        count = f"{prompts.parameters[layer]:,}" if new else "·"
        table.add_row(str(layer), prompts.role(layer), *cells, count, style="bold" if new and not prompts.hyper_network else "dim")
    return table


def prompts_lines(prompts: PromptMap) -> list[str]:
    """The map in a few lines of plain text."""
    stored = f"{sum(prompts.parameters.values()):,}"
    if prompts.other_parameters:
        stored += f", and {prompts.other_parameters:,} outside the generators"
    how = "fixed by the recipe" if prompts.gates is None else "chosen by the search"
    if prompts.losses is not None:
        how += ", by the losses with only some layers' gates open"
    if prompts.hyper_network:
        how = "the hyper-network of a search, which has not chosen yet"
    return [
        f"base model: {prompts.base_model or 'not named'}",
        f"adapter: selective prompts (SPT), {prompts.num_prompt_tokens} prompt tokens",
        f"layers with a new prompt: {', '.join(map(str, prompts.chosen))} of {prompts.layers} ({how})",
        f"parameters: {stored}",
    ]


def prompts_json(prompts: PromptMap) -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(prompts).items()}
