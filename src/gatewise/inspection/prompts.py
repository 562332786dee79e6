"""Which layers an SPT adapter (arXiv 2310.20127) puts new prompts into, read from its folder."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from gatewise.adapters.files import SEARCH_FILE, read_config, read_note, read_selection, read_tensors, weights_of
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError

_NAME = re.compile(r"\.(\d+)\.selective_prompt\.(spt_generator|spt_gate_logit)\b")


@dataclass(frozen=True)
class PromptMap:
    """Where an SPT adapter's prompts enter.

    Attributes:
        layers: how many layers the model has; up to the last one with a prompt where that is not known.
        chosen: the layers with a new prompt, in order; all of a hyper-network.
        gates: the gate of every layer at the end of the search or, in a hyper-network, as it stands; None without a search.
        hyper_network: whether this is a checkpoint of a search, which has not chosen its layers yet.
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

    def role(self, layer: int) -> str:
        """What a layer does with prompts: "new", "carried" on from below, or "none" where there are none yet."""
        return "new" if layer in self.chosen else "carried" if layer > self.chosen[0] else "none"


def read_prompts(folder: str | Path) -> PromptMap:
    """Reads the folder of an SPT adapter, or a checkpoint of a search; the base model is not needed.

    Raises:
        GatewiseError: not such an adapter, or a file that is missing or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("peft_type") != "SELECTIVE_PROMPT":
        raise GatewiseError(
            f"{folder} holds an adapter of peft_type {config.get('peft_type')}, expected SELECTIVE_PROMPT (method spt)"
        )
    weights = weights_of(folder)
    tensors, _ = read_tensors(weights)
    parameters: dict[int, int] = {}
    logits: dict[int, float] = {}
    other = 0
    for name, tensor in tensors.items():
        match = _NAME.search(name)
        if match is None:
            other += tensor.numel()
            continue
        layer = int(match[1])
        parameters[layer] = parameters.get(layer, 0) + tensor.numel()
        if match[2] == "spt_gate_logit":
            if tensor.numel() != 1:
                raise GatewiseError(
                    f"{weights}: {name} has shape {tuple(tensor.shape)}, expected one number: save the adapter again"
                )
            logits[layer] = float(tensor.float().item())
    if not parameters:
        raise GatewiseError(f"{weights} holds no prompt generators: save the adapter again")
    gates = None
    if logits:
        gates = tuple(torch.tensor([logits[layer] for layer in sorted(logits)], dtype=torch.float64).sigmoid().tolist())
    elif (folder / SEARCH_FILE).is_file():
        gates = tuple(read_selection(folder / SEARCH_FILE).gates)
    chosen = tuple(sorted(parameters))
    told = (read_note(folder).get("num_layers"), (config.get("made_for") or {}).get("layers"))
    return PromptMap(
        layers=max(chosen[-1] + 1, len(gates or ()), *(count for count in told if is_whole(count))),
        chosen=chosen,
        gates=gates,
        hyper_network=bool(logits),
        parameters={layer: parameters[layer] for layer in chosen},
        other_parameters=other,
        num_prompt_tokens=int(config.get("num_prompt_tokens") or 0),
        base_model=config.get("base_model_name_or_path") or None,
    )
