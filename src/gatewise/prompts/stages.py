"""The two stages of SPT: ``search`` chooses the layers, ``retrain`` trains their prompts from scratch. SPT, arXiv 2310.20127.

Shapes: n layers, s steps.
"""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import Trainer, TrainingArguments

from gatewise.bilevel import split_in_half
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.darts import (
    GATES_FILE,
    SearchTrainer,
    check_configuration,
    checkpoint_in,
    hyper_network,
    refuse_taken_labels,
)
from gatewise.prompts.model import SelectivePromptModel

logger = logging.getLogger(__name__)
SEARCH_FOLDER = "search"
"""Where in its output folder a search has its checkpoints, apart from those of the training that follows."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        gates: a (s + 1, n) before the first step and after each lower step.
        layers: the chosen layers, in order.
        config: the discrete model's configuration, for ``retrain`` or ``get_peft_model``.
        log: what the Trainer logged, steps before a resume included.
    """

    gates: Tensor
    layers: list[int]
    config: SelectivePromptConfig
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)


def search(
    model: PeftModel,
    train_dataset: Any,
    args: TrainingArguments,
    *,
    keep: int,
    trainer_class: Any = SearchTrainer,
    resume_from_checkpoint: str | bool | None = None,
    **settings: Any,
) -> SearchResult:
    """Trains a hyper-network by SPT-DARTS and keeps the layers that came out best.

    Args:
        model: with an active ``SelectivePromptConfig(prompt_layers=None)``; it is left as the search trained it.
        train_dataset: rows for the Trainer's collator. A random half (by ``args.seed``) trains the weights, the other the gates.
        args: the folder ``search`` in their ``output_dir`` takes the checkpoints, so that ``retrain`` may have the same arguments.
        keep: K, how many layers to keep: those with the largest gates.
        trainer_class: a ``SearchMixin`` on a Trainer whose ``compute_loss`` returns the outputs of the pass that made the loss.
        resume_from_checkpoint: as in ``Trainer.train``; a search that had ended gives its result at once.
        settings: for the trainer: ``reparameterise``, ``consistency``, ``drop``, ``data_collator`` and so on.

    Raises:
        GatewiseError: no hyper-network, K out of range, or ``load_best_model_at_end``; and what ``SearchMixin`` and
            ``BilevelMixin`` refuse.
    """
    tuner = hyper_network(model)
    chosen_layers(tuner.gates(), keep)
    if args.load_best_model_at_end:
        raise GatewiseError(
            "load_best_model_at_end is True, which would leave the model with other gates than the search ended with: leave it "
            "out, and use it for the training that follows"
        )
    weights, upper = split_in_half(train_dataset, args.seed)
    trainer = trainer_class(model=model, args=_of_search(args), train_dataset=weights, upper_dataset=upper, **settings)
    _tell_of_a_frozen_head(model)
    trainer.search_from(resume_from_checkpoint)
    layers = chosen_layers(trainer.gates[-1], keep)
    config: Any = tuner.peft_config[tuner.active_adapters[0]]
    return SearchResult(trainer.gates, layers, discrete_config(config, layers), trainer.state.log_history)


def retrain(
    model: Any,
    config: SelectivePromptConfig,
    train_dataset: Any,
    args: TrainingArguments,
    *,
    trainer_class: Any = Trainer,
    resume_from_checkpoint: str | bool | None = None,
    **settings: Any,
) -> PeftModel:
    """Trains a discrete model from scratch on all of the data.

    Args:
        model: the base model; or the ``PeftModel`` of a search or of another training, whose adapters and trained heads are taken
            off first: it is used up then, and its calls are refused.
        config: such as ``SearchResult.config``, or one that was read from an adapter's folder.
        resume_from_checkpoint: as in ``Trainer.train``; but True, where there is only a search's checkpoint, begins. So a script of
            both stages that was interrupted goes on with True for both.
        settings: for the Trainer.

    Raises:
        GatewiseError: the configuration is that of a hyper-network; a model whose adapter was taken off; a checkpoint of a search
            or of another configuration; or a causal model and a Trainer that takes the labels away.
    """
    if config.prompt_layers is None:
        raise GatewiseError(
            "the configuration has prompt_layers=None, which is the hyper-network: give it the layers that were chosen"
        )
    last = checkpoint_in(args, resume_from_checkpoint)
    if last is not None:
        _check_checkpoint(Path(last), config)
    elif resume_from_checkpoint is True and checkpoint_in(_of_search(args), True) is not None:
        resume_from_checkpoint = None
    adapted = get_peft_model(_without_adapters(model), dataclasses.replace(config, inference_mode=False))
    assert isinstance(adapted, PeftModel)
    trainer = trainer_class(model=adapted, args=args, train_dataset=train_dataset, **settings)
    refuse_taken_labels(trainer)
    _tell_of_a_frozen_head(adapted)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return adapted


def chosen_layers(gates: Tensor, keep: int) -> list[int]:
    """The ``keep`` layers with the largest a (n,), in order; of equal ones the lower.

    Raises:
        GatewiseError: ``keep`` is not a number of layers.
    """
    if not is_whole(keep) or not 1 <= keep <= len(gates):
        raise GatewiseError(f"keep is {keep!r}: expected a whole number from 1 to {len(gates)}, the model's layers")
    return sorted(gates.sort(descending=True, stable=True).indices[:keep].tolist())


def discrete_config(config: SelectivePromptConfig, layers: list[int]) -> SelectivePromptConfig:
    """The configuration of the discrete model with prompts at ``layers``, from that of its hyper-network."""
    saved = None if config.modules_to_save is None else list(dict.fromkeys(config.modules_to_save))
    return dataclasses.replace(config, prompt_layers=list(layers), modules_to_save=saved, inference_mode=False)


def _of_search(args: TrainingArguments) -> TrainingArguments:
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or "") / SEARCH_FOLDER)
    return own


def _check_checkpoint(folder: Path, config: SelectivePromptConfig) -> None:
    if (folder / GATES_FILE).exists():
        raise GatewiseError(f"{folder} is a checkpoint of a search, not of the training of its layers: resume from another one")
    check_configuration(folder, config, "training")


def _without_adapters(model: Any) -> Any:
    """The base model with the heads it had before they were trained."""
    if not isinstance(model, PeftModel):
        return model
    if isinstance(model.base_model, SelectivePromptModel):
        model.base_model.check_loaded()
    inner = model.get_base_model()
    heads = {name: module.original_module for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    base: Any = model.base_model.unload()  # type: ignore[operator]
    for name, head in heads.items():
        base.set_submodule(name, head)
    return base


def _tell_of_a_frozen_head(model: PeftModel) -> None:
    """A classifier's head is trained where PEFT is told so, and a fresh one that is not can be no good."""
    kind = type(model.get_base_model()).__name__
    trained = any(p.requires_grad and ".spt_" not in name for name, p in model.named_parameters())
    if not trained and kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        logger.warning(
            "the head of this %s is not trained: give the configuration task_type='SEQ_CLS' or 'TOKEN_CLS', or modules_to_save",
            kind,
        )
