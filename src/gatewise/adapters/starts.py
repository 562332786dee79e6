"""Starts of LoRA for which PEFT looks at the base model or at training rows first: PiSSA, OLoRA, CorDA, LoRA-GA and EVA.

All but EVA take a part of the base weights W into the ranks and train on the rest, W' = W - s B0 A0, where s is the scale. What
they train is an adapter of W'. Of W it is one of twice the rank, for W' + s B A = W + s [B, -B0] [A; A0]: so it is written.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.adapters.lora import rank_settings
from gatewise.errors import GatewiseError, reason_of
from gatewise.losses import scored
from gatewise.parts import Run

CHANGE_BASE = ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")
SETTINGS: dict[str, dict[str, Any]] = {
    # Of all tokens, not of the answers' alone. Which module gets how many ranks stays as the recipe has it.
    "eva": {"eva_config": EvaConfig(rho=1.0, use_label_mask=False)},
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}
"""What PEFT's configuration needs beside the name of the start."""
ROWS = 256  # of the training data that a start looks at, as many as CorDA's authors took
PASSES = 20  # over them until EVA's directions must have settled


def look_first(run: Run, base: nn.Module, config: LoraConfig) -> None:
    """What CorDA and LoRA-GA want to know of the base model before the adapter is put on it.

    Raises:
        GatewiseError: a module is too small to begin with so many ranks, or its weight is not for a start to change.
    """
    start = config.init_lora_weights
    if start in (*CHANGE_BASE, "eva") and run.recipe.quantization is None:
        base.to(run.device)
    if start not in CHANGE_BASE:
        return
    # PEFT looks for the modules by their names, which "all-linear" is not.
    names = ("target_modules", "exclude_modules", "modules_to_save", "task_type")
    probe: Any = get_peft_model(base, LoraConfig(r=1, **{name: getattr(config, name) for name in names}))
    paths = config.target_modules = list(probe.base_model.targeted_module_names)
    probe.unload()
    named = Counter(map(id, dict(base.named_parameters(remove_duplicate=False)).values()))
    for path in paths:
        module: Any = base.get_submodule(path)
        if named[id(module.weight)] > 1:  # of a tied head: the embedding would change too, and has no ranks that make up for it
            raise GatewiseError(
                f"{start} takes a part of the weight of {path}, which other modules of {run.recipe.model} share: leave it out of "
                "peft.target_modules, or take another start"
            )
        if start == "olora" and isinstance(module, Conv1D):  # PEFT does not turn its weight round
            raise GatewiseError(f"olora does not know Conv1D modules, such as {path} of {run.recipe.model}: take pissa")
        room = min(module.weight.shape) // (2 if start == "lora_ga" else 1)
        if config.r > room:
            raise GatewiseError(f"peft.r is {config.r}, but {start} finds at most {room} ranks to begin with in {path}: take that")

    def gradients() -> None:
        for batch in _batches(run, run.recipe.training.batch_size):
            sums, counts = scored(base, batch).losses()
            (sums.sum() / counts.sum()).backward()

    def inputs() -> None:
        for row in _batches(run, 1):  # PEFT knows of no padding
            base(**row)

    if start == "lora_ga":
        preprocess_loraga(base, config, gradients)
    elif start == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # which needs attrs, as PEFT itself does not

        with _every_token("corda"):
            preprocess_corda(base, config, inputs)


def look_after(run: Run, model: PeftModel) -> None:
    """EVA's start of A: the directions in which the inputs of a module differ most."""
    config: Any = model.peft_config["default"]
    if config.init_lora_weights != "eva":
        return
    batches = [batch for batch in _batches(run, run.recipe.training.batch_size) if int(batch["attention_mask"].sum()) >= config.r]
    if not batches:
        raise GatewiseError(f"no batch of data.train has peft.r ({config.r}) tokens, of which eva finds directions: give more rows")
    for path, layer in _layers(model).items():
        if config.r > layer.in_features:
            raise GatewiseError(
                f"the adapter starts with {config.r} ranks a module, but eva finds at most {layer.in_features} in {path}: "
                "take a smaller peft.r"
            )
    with _every_token("eva"):
        initialize_lora_eva_weights(
            model,
            _Passes(batches),
            prepare_layer_inputs_fn=_states,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )


def _states(inputs: tuple[Tensor, ...], places: Tensor, module: str) -> Tensor:
    """What EVA reads of a module's inputs: the tokens at the places that are no padding, or one vector a row, as a pooler sees."""
    return inputs[0].contiguous() if inputs[0].ndim == 2 else inputs[0][places.T.unbind()]


@contextmanager
def _every_token(start: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError) as error:
        raise GatewiseError(
            f"{start} cannot start this adapter ({reason_of(error)}): it reads modules that see every token, so leave others, such "
            "as an encoder's pooler, out with peft.exclude_modules, or take another start"
        ) from error


class _Passes:
    """Batches for EVA, which goes over them until nothing changes."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.count = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.count += 1
        if self.count > PASSES:
            raise GatewiseError(f"eva's directions have not settled after {PASSES} passes over data.train: take a smaller peft.r")
        return iter(self.batches)


def _batches(run: Run, size: int) -> list[dict[str, Tensor]]:
    """Training rows, the same in every process."""
    rows = Random(run.recipe.seed).sample(run.train, min(ROWS, len(run.train)))
    batches = (run.collate(rows[at : at + size]) for at in range(0, len(rows), size))
    return [{name: value.to(run.device) for name, value in batch.items()} for batch in batches]


def ranks_of(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> a copy of A and B of each LoRA layer."""
    copies = (
        (path, [one["default"].weight.detach().clone() for one in (layer.lora_A, layer.lora_B)])
        for path, layer in _layers(model).items()
    )
    return {path: (a, b) for path, (a, b) in copies}


@torch.no_grad()
def back_on_base(model: PeftModel, start: Mapping[str, tuple[Tensor, Tensor]], base: nn.Module) -> None:
    """Makes the adapter one of the base model as it was, and gives the model its weights back.

    Args:
        start: A and B as they began, by path.
        base: the base model, loaded once more.
    """
    layers = _layers(model)
    for path, layer in layers.items():
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        a, b = (one.to(up.weight) for one in start[path])
        down.weight = nn.Parameter(torch.cat([down.weight, a]))
        up.weight = nn.Parameter(torch.cat([up.weight, -b], dim=1))
        layer.r["default"] = down.out_features = up.in_features = len(down.weight)
        weight: Any = layer.get_base_layer().weight
        weight.copy_(base.get_submodule(path).weight)
    config: Any = model.peft_config["default"]
    settings = rank_settings(
        {path: one.r["default"] for path, one in layers.items()}, {p: one.scaling["default"] for p, one in layers.items()}
    )
    for key, value in {
        **settings,
        "init_lora_weights": True,
        "use_rslora": False,
        "corda_config": None,
        "lora_ga_config": None,
    }.items():
        setattr(config, key, value)


def _layers(model: PeftModel) -> dict[str, Any]:
    return {path.removeprefix(PEFT_PREFIX): module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
