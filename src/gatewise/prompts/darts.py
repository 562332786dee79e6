"""SPT-DARTS: which layers deserve a prompt, and the training of those. SPT, arXiv 2310.20127.

Bi-level and first order (``gatewise.bilevel``): generators and task head w move on one half of the training data, gate logits α on
the other. Its two additions over DARTS, each a switch, are reconstructed:

    re-parameterised gates   â_i = a_i · detach(Σ_j a_j) / Σ_j a_j
    consistency              L(w) = CE(f_1) + λ · ½ (KL(f_1 ‖ f_2) + KL(f_2 ‖ f_1))

where f_1 and f_2 are two passes of a batch with different random subsets of the gates dropped, so that the searched network behaves
like the discrete one that it will become. Gates move on passes with such drops too: where all are open, the network has more
prompts than it was trained with, a gate that opens further mostly does harm, and those of the layers that matter least would win
(docs/spt.md). Which layers are kept is then read off the gates, as SPT does, or off the losses of subsets of them
(``gatewise.prompts.subsets``).

Shapes: b batch, t tokens, n layers, s steps, c classes or vocabulary.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from gatewise.bilevel import BilevelMixin, split_in_half
from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.losses import IGNORED, LossKind, loss_kind
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.model import SelectivePromptModel
from gatewise.prompts.subsets import ROWS_READ, balanced_subsets, mean_with

logger = logging.getLogger(__name__)

SEARCH_FOLDER = "search"
"""Where in its output folder a search has its checkpoints, apart from those of the training that follows."""
GATES_FILE = "gates.safetensors"
GATE_LOGITS = r"\.spt_gate_logit\."
"""The α among a model's parameters, for ``upper_parameters``."""
Choice = Literal["gates", "loss"]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        gates: a (s + 1, n) before the first step and after each lower step.
        layers: the chosen layers, in order.
        losses: (n,) what they were chosen by, where that was not the gates: the mean loss with each of them.
        config: the discrete model's configuration, for ``retrain`` or ``get_peft_model``.
        log: what the Trainer logged, steps before a resume included.
    """

    gates: Tensor
    layers: list[int]
    config: SelectivePromptConfig
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)
    losses: Tensor | None = None


class SearchMixin(BilevelMixin):
    """Adds SPT-DARTS to the ``Trainer`` that follows it. Its model is a ``PeftModel`` with an active hyper-network.

    A resumed run equals one never stopped, bit by bit on the CPU, the trajectory of the gates included.

    Args:
        reparameterise: re-parameterised gates in upper steps.
        consistency: λ; 0 turns the second pass and all drops off.
        drop: the probability that a gate is dropped in a pass of a lower or upper step; one always stays.
        Others: those of ``BilevelMixin`` (``upper_parameters`` are the gates) and the Trainer.

    Raises:
        GatewiseError: no hyper-network, a value out of range, or a causal model and a Trainer that takes the labels away.
    """

    def __init__(self, *args: Any, reparameterise: bool = True, consistency: float = 1.0, drop: float = 0.5, **kwargs: Any) -> None:
        if not _is_number(consistency) or not 0 <= consistency < float("inf"):
            raise GatewiseError(f"consistency is {consistency!r}: expected a weight of at least 0; 0 turns it off")
        if not _is_number(drop) or not 0 < drop < 1:
            raise GatewiseError(f"drop is {drop!r}: expected a probability between 0 and 1")
        if not isinstance(reparameterise, bool):
            raise GatewiseError(f"reparameterise is {reparameterise!r}: expected True or False")
        self.reparameterise, self.consistency, self.drop = reparameterise, consistency, drop
        self.trajectory: list[Tensor] = []
        self._dropped: Tensor | None = None
        super().__init__(*args, upper_parameters=GATE_LOGITS, **kwargs)
        hyper_network(self.model)
        _refuse_taken_labels(self)
        self.add_callback(_Trajectory(self))

    @property
    def gates(self) -> Tensor:
        """a (s + 1, n) so far."""
        return torch.stack(self.trajectory)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The Trainer's, with gates dropped."""
        with self._dropping(self._drawn()):
            return super().training_step(model, inputs, num_items_in_batch)

    def upper_step(self) -> None:
        """As ever, with gates dropped: those move on what the network was trained for."""
        with self._dropping(self._drawn()):
            super().upper_step()

    def _drawn(self) -> Tensor | None:
        """The gates that a step leaves out."""
        return self._draw() if self.consistency else None

    @contextmanager
    def _dropping(self, dropped: Tensor | None) -> Iterator[None]:
        self._dropped = dropped
        try:
            yield
        finally:
            self._dropped = None

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the gates as they are in this step."""
        tuner = hyper_network(self.model)
        dropping = nullcontext() if self._dropped is None else tuner.gates_dropped(self._dropped)
        with tuner.gates_reparameterised(self.reparameterise), dropping:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def extra_lower_loss(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:
        """λ times the distance between the outputs and those of a second pass with other gates dropped.

        Raises:
            GatewiseError: there are no logits or labels, as in question answering.
        """
        if not self.consistency:
            return None
        if not isinstance(outputs, Mapping) or outputs.get("logits") is None or inputs.get("labels") is None:
            raise GatewiseError(
                "consistency compares the logits of two passes at the labels, and this model has outputs without logits or the "
                "batch no labels: turn it off with consistency=0"
            )
        tuner = hyper_network(self.model)
        with tuner.gates_dropped(self._draw()):
            other = self.compared_logits(model, inputs)
        return self.consistency * distance(outputs["logits"], other, inputs["labels"], loss_kind(tuner.model))

    def compared_logits(self, model: nn.Module, inputs: Any) -> Tensor:
        """The logits of another pass, as ``compute_loss`` puts them into its outputs: for Trainers with their own loss."""
        logits: Tensor = model(**inputs)["logits"]
        return logits

    def subset_losses(self, subsets: Tensor) -> Tensor:
        """The losses (m,) with only the gates open that subsets (m, n) name, without dropout.

        On rows of the upper data set, the same for all, each once: as many as ``ROWS_READ`` allows. A loss is the mean of its
        batches' mean losses, weighted by their rows.
        """
        size, count = self._upper_rows, min(len(self.upper_dataset), max(1, ROWS_READ // len(subsets)))
        rows = torch.randperm(len(self.upper_dataset), generator=torch.Generator().manual_seed(self._upper_seed))[:count].tolist()
        own = rows[self.args.process_index :: self.args.world_size]
        numbers = [own[start : start + size] for start in range(0, len(own), size)]
        batches = [self._prepare_inputs(batch) for batch in self._upper_dataloader(numbers)]
        # Not the wrapped one, whose copies in other processes may have a batch less.
        model: Any = self.model
        before = model.training
        model.eval()
        sums = torch.zeros(len(subsets) + 1, device=self.accelerator.device)
        sums[-1] = len(own)
        try:
            for number, kept in enumerate(subsets):
                for rows_of, batch in zip(numbers, batches, strict=True):
                    # The precision of training, which a search that is only read never prepared its model for.
                    with torch.no_grad(), self.accelerator.autocast(), self.compute_loss_context_manager(), self._dropping(~kept):
                        # A copy, because the Trainer may take something out.
                        sums[number] += len(rows_of) * self.compute_upper_loss(model, {**batch}).mean().float()
        finally:
            model.train(before)
        reduced: Any = self.accelerator.reduce(sums, reduction="sum")
        losses: Tensor = (reduced[:-1] / reduced[-1]).cpu()
        if not bool(losses.isfinite().all()):
            raise GatewiseError("a subset's loss is not finite after the search: lower the learning rate, or choose by gates")
        return losses

    def _draw(self) -> Tensor:
        # From the CPU's generator, whose state checkpoints hold.
        return draw_dropped(len(hyper_network(self.model).gates()), self.drop)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            with whole_file(Path(output_dir) / GATES_FILE) as part:
                save_file({"gates": self.gates}, part)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_trajectory(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_trajectory(self, checkpoint: str) -> None:
        path = Path(checkpoint) / GATES_FILE
        try:
            self.trajectory = list(load_file(path)["gates"].unbind())
        except (OSError, SafetensorError, KeyError) as error:
            raise GatewiseError(f"{path} cannot be read ({error}): resume from a checkpoint that a search wrote") from error

    def search_from(self, checkpoint: str | bool | None) -> None:
        """Trains, from a checkpoint if there is one. A search that had ended is only read: the Trainer would take a step more."""
        path = _checkpoint_in(self.args, checkpoint)
        file = Path(path or "") / TRAINER_STATE_NAME
        state = TrainerState.load_from_json(str(file)) if path is not None and file.is_file() else None
        if path is None or state is None or not self._has_ended(state):
            self.train(resume_from_checkpoint=checkpoint)
            return
        self.state = state
        self._load_from_checkpoint(path)
        self._load_trajectory(path)
        self._load_rng_state(path)

    def _has_ended(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0) >= self.args.num_train_epochs


class SearchTrainer(SearchMixin, Trainer):
    """``transformers.Trainer`` with SPT-DARTS: see ``SearchMixin``."""


class _Trajectory(TrainerCallback):
    """Notes the gates; it comes after the upper steps, which are the first callback."""

    def __init__(self, trainer: SearchMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.trajectory = [hyper_network(self.trainer.model).gates()]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.trajectory.append(hyper_network(self.trainer.model).gates())


def search(
    model: PeftModel,
    train_dataset: Any,
    args: TrainingArguments,
    *,
    keep: int,
    choose: Choice = "gates",
    trainer_class: Any = SearchTrainer,
    resume_from_checkpoint: str | bool | None = None,
    **settings: Any,
) -> SearchResult:
    """Trains a hyper-network by SPT-DARTS and keeps the layers that came out best.

    Args:
        model: with an active ``SelectivePromptConfig(prompt_layers=None)``; it is left as the search trained it.
        train_dataset: rows for the Trainer's collator. A random half (by ``args.seed``) trains the weights, the other the gates.
        args: the folder ``search`` in their ``output_dir`` takes the checkpoints, so that ``retrain`` may have the same arguments.
        keep: K, how many layers to keep.
        choose: "gates", those with the largest gates, or "loss", those with the lowest mean loss among subsets of K layers
            (``gatewise.prompts.subsets``), which needs ``consistency``, and ``drop`` best near 1 − K / n.
        trainer_class: a ``SearchMixin`` on any Trainer.
        resume_from_checkpoint: as in ``Trainer.train``; a search that had ended gives its result at once.
        settings: for the trainer: ``reparameterise``, ``consistency``, ``drop``, ``data_collator`` and so on. Unless told otherwise
            upper steps are Adam's with 1e-2 and betas (0.5, 0.999) (reconstructed: DARTS's but for a learning rate that moves gates
            within a few hundred steps).

    Raises:
        GatewiseError: no hyper-network, K out of range, an unknown choice or one by loss without consistency, or
            ``load_best_model_at_end``; and what ``SearchMixin`` and ``BilevelMixin`` refuse.
    """
    tuner = hyper_network(model)
    chosen_layers(tuner.gates(), keep)
    if choose not in get_args(Choice):
        raise GatewiseError(f"choose is {choose!r}: expected one of {', '.join(map(repr, get_args(Choice)))}")
    if args.load_best_model_at_end:
        raise GatewiseError(
            "load_best_model_at_end is True, which would leave the model with other gates than the search ended with: leave it "
            "out, and use it for the training that follows"
        )
    weights, upper = split_in_half(train_dataset, args.seed)
    settings = {"upper_learning_rate": 1e-2, "upper_optim": "adam", "upper_betas": (0.5, 0.999), **settings}
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or "") / SEARCH_FOLDER)
    trainer = trainer_class(model=model, args=own, train_dataset=weights, upper_dataset=upper, **settings)
    if choose == "loss" and not trainer.consistency:
        raise GatewiseError(
            "choose is 'loss' and consistency is 0, so that no subset of gates was ever trained: turn consistency on"
        )
    _tell_of_a_frozen_head(model)
    trainer.search_from(resume_from_checkpoint)
    losses = None
    if choose == "loss" and keep < len(tuner.gates()):
        subsets = balanced_subsets(len(tuner.gates()), keep, args.seed)
        losses = mean_with(subsets, trainer.subset_losses(subsets))
    layers = chosen_layers(trainer.gates[-1] if losses is None else -losses, keep)
    config: Any = tuner.peft_config[tuner.active_adapters[0]]
    return SearchResult(trainer.gates, layers, discrete_config(config, layers), trainer.state.log_history, losses)


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
        config: such as ``SearchResult.config``.
        settings: for the Trainer.

    Raises:
        GatewiseError: the configuration is that of a hyper-network; a model whose adapter was taken off; a checkpoint of a search;
            or a causal model and a Trainer that takes the labels away.
    """
    if config.prompt_layers is None:
        raise GatewiseError(
            "the configuration has prompt_layers=None, which is the hyper-network: give it the layers that were chosen"
        )
    last = _checkpoint_in(args, resume_from_checkpoint)
    if last is not None and (Path(last) / GATES_FILE).exists():
        raise GatewiseError(f"{last} is a checkpoint of a search, not of the training of its layers: resume from another one")
    adapted = get_peft_model(_without_adapters(model), dataclasses.replace(config))
    assert isinstance(adapted, PeftModel)
    trainer = trainer_class(model=adapted, args=args, train_dataset=train_dataset, **settings)
    _refuse_taken_labels(trainer)
    _tell_of_a_frozen_head(adapted)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return adapted


def draw_dropped(layers: int, drop: float, generator: torch.Generator | None = None) -> Tensor:
    """Which gates a pass leaves out (n,): each with the probability ``drop``, but one always stays."""
    drawn = torch.rand(layers, generator=generator)
    dropped = drawn < drop
    # With none open, a causal model's loss would have no gradient.
    dropped[drawn.argmax()] = False
    return dropped


def chosen_layers(gates: Tensor, keep: int) -> list[int]:
    """The ``keep`` layers with the largest a (n,), or other scores, in order; of equal ones the lower.

    Raises:
        GatewiseError: ``keep`` is not a number of layers.
    """
    if type(keep) is not int or not 1 <= keep <= len(gates):
        raise GatewiseError(f"keep is {keep!r}: expected a whole number from 1 to {len(gates)}, the model's layers")
    return sorted(gates.sort(descending=True, stable=True).indices[:keep].tolist())


def discrete_config(config: SelectivePromptConfig, layers: list[int]) -> SelectivePromptConfig:
    """The configuration of the discrete model with prompts at ``layers``, from that of its hyper-network."""
    saved = None if config.modules_to_save is None else list(dict.fromkeys(config.modules_to_save))
    return dataclasses.replace(config, prompt_layers=list(layers), modules_to_save=saved, inference_mode=False)


def distance(one: Tensor, other: Tensor, labels: Tensor, kind: LossKind) -> Tensor:
    """How far two outputs lie apart, the mean over rows or labelled positions: ½ (KL(p ‖ q) + KL(q ‖ p)), a scalar.

    For a regression or several labels a row it is the mean squared difference of the outputs.

    Args:
        one, other: logits (b, c) or (b, t, c), or (k, c) where only the labelled positions were computed.
        labels: (b,), (b, c) or (b, t) with -100 where ignored.
        kind: as ``gatewise.losses.loss_kind`` gives it.
    """
    if kind == "rows":
        if one.shape[-1] == 1 or labels.ndim > 1:
            return F.mse_loss(one.float(), other.float())
    elif one.ndim == 3:
        if kind == "causal":
            one, other, labels = one[:, :-1], other[:, :-1], labels[:, 1:]
        kept = (labels != IGNORED).to(one.device)
        one, other = one[kept], other[kept]
    p, q = one.float().log_softmax(dim=-1), other.float().log_softmax(dim=-1)
    # Of no positions, which the mean would make no number, the distance is zero.
    return ((p.exp() - q.exp()) * (p - q)).sum() / max(1, p.shape[:-1].numel()) / 2


def hyper_network(model: Any) -> SelectivePromptModel:
    """The tuner of a ``PeftModel`` whose active adapter is a hyper-network.

    Raises:
        GatewiseError: it is not one.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, SelectivePromptModel) or not tuner.active_adapters or not tuner.gate_parameters():
        raise GatewiseError(
            "a search needs a PeftModel with a hyper-network: get_peft_model(model, SelectivePromptConfig(prompt_layers=None))"
        )
    return tuner


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


def _checkpoint_in(args: TrainingArguments, given: str | bool | None) -> str | None:
    """The checkpoint that the Trainer will go on from, None if there is none."""
    folder = str(args.output_dir)
    if given is True:
        return get_last_checkpoint(folder) if Path(folder).is_dir() else None
    return given or None


def _tell_of_a_frozen_head(model: PeftModel) -> None:
    """A classifier's head is trained where PEFT is told so, and a fresh one that is not can be no good."""
    kind = type(model.get_base_model()).__name__
    trained = any(p.requires_grad and ".spt_" not in name for name, p in model.named_parameters())
    if not trained and kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        logger.warning(
            "the head of this %s is not trained: give the configuration task_type='SEQ_CLS' or 'TOKEN_CLS', or modules_to_save",
            kind,
        )


def _refuse_taken_labels(trainer: Trainer) -> None:
    """The labels of a causal model tell its generators where the prompt ends; without them they would read the answers."""
    taken = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    if taken and loss_kind(cast(nn.Module, trainer.model)) == "causal":
        raise GatewiseError(
            "label_smoothing_factor and compute_loss_func keep the labels from the model, which tell prompt generators where the "
            "prompt ends: leave both out"
        )
