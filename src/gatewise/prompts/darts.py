"""SPT-DARTS: the training of a hyper-network whose gates say which layers deserve a prompt, then of these. SPT, arXiv 2310.20127.

``search`` is bi-level and first order (``gatewise.bilevel``): generators and task head w move on one half of the training data,
gate logits α on the other. Its two additions over DARTS, each a switch, are reconstructed:

    re-parameterised gates   â_i = a_i · detach(Σ_j a_j) / Σ_j a_j
    consistency              L(w) = CE(f_1) + λ · ½ (KL(f_1 ‖ f_2) + KL(f_2 ‖ f_1))

where f_1 and f_2 are two passes of a batch with different random subsets of the gates dropped, so that the searched network behaves
like the discrete one that it will become. Gates move on passes with such drops too: where all are open, the network has more
prompts than it was trained with, a gate that opens further mostly does harm, and those of the layers that matter least would win
(docs/reports/spt.md). ``retrain`` trains the prompts of the chosen layers from scratch.

Shapes: b batch, t tokens, n layers, s steps, c classes or vocabulary.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from gatewise.adapters.files import read_config
from gatewise.bilevel import BilevelMixin, split_in_half
from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.losses import IGNORED, LossKind, loss_kind
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.model import SelectivePromptModel

GATES_FILE = "gates.safetensors"
SEARCH_FOLDER = "search"
"""Where in its output folder a search has its checkpoints, apart from those of the training that follows."""

GATE_LOGITS = r"\.spt_gate_logit\."
"""The α among a model's parameters, for ``upper_parameters``."""


class SearchMixin(BilevelMixin):
    """Adds SPT-DARTS to the ``Trainer`` that follows it. Its model is a ``PeftModel`` with an active hyper-network.

    A resumed run equals one never stopped, bit by bit on the CPU, the trajectory of the gates included.

    Args:
        reparameterise: re-parameterised gates in upper steps.
        consistency: λ; 0 turns the second pass and all drops off.
        drop: the probability that a gate is dropped in a pass of a lower or upper step; one always stays.
        upper_learning_rate: of the gates, which Adam moves with betas (0.5, 0.999) (reconstructed: DARTS's, but for a rate that
            moves gates within a few hundred steps).
        Others: those of ``BilevelMixin`` (``upper_parameters`` are the gates) and the Trainer.

    Raises:
        GatewiseError: no hyper-network, or a value out of range.
    """

    def __init__(
        self,
        *args: Any,
        upper_learning_rate: float = 1e-2,
        reparameterise: bool = True,
        consistency: float = 1.0,
        drop: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if not is_number(consistency) or not 0 <= consistency < float("inf"):
            raise GatewiseError(f"consistency is {consistency!r}: expected a weight of at least 0; 0 turns it off")
        if not is_number(drop) or not 0 < drop < 1:
            raise GatewiseError(f"drop is {drop!r}: expected a probability between 0 and 1")
        self.reparameterise, self.consistency, self.drop = reparameterise, consistency, drop
        self.trajectory: list[Tensor] = []
        self._dropped: Tensor | None = None
        self._in_lower_step = False
        super().__init__(*args, upper_parameters=GATE_LOGITS, upper_learning_rate=upper_learning_rate, **kwargs)
        hyper_network(self.model)
        self.add_callback(_Trajectory(self))

    @property
    def gates(self) -> Tensor:
        """a (s + 1, n) so far."""
        return torch.stack(self.trajectory)

    def create_upper_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
        """Adam with DARTS's betas."""
        return torch.optim.Adam(parameters.values(), lr=self.upper_learning_rate, betas=(0.5, 0.999))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The Trainer's, with gates dropped."""
        self._in_lower_step = True
        try:
            with self._gates_left_out():
                return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_lower_step = False

    def upper_step(self) -> None:
        """As ever, with gates dropped: those move on what the network was trained for."""
        with self._gates_left_out():
            super().upper_step()

    @contextmanager
    def _gates_left_out(self) -> Iterator[None]:
        """While open, passes leave out the gates that are drawn for this step; none without consistency."""
        self._dropped = self._draw() if self.consistency else None
        try:
            yield
        finally:
            self._dropped = None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The Trainer's, with the gates as they are in this step; in a lower step with the consistency loss on top."""
        tuner, compares = hyper_network(self.model), self._in_lower_step and self.consistency > 0
        dropping = nullcontext() if self._dropped is None else tuner.gates_dropped(self._dropped)
        with tuner.gates_reparameterised(self.reparameterise), dropping:
            if not compares:
                return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            loss, outputs = super().compute_loss(model, {**inputs}, return_outputs=True, num_items_in_batch=num_items_in_batch)
            logits = self._logits(outputs, inputs)
            with tuner.gates_dropped(self._draw()):
                _, others = super().compute_loss(model, {**inputs}, return_outputs=True, num_items_in_batch=num_items_in_batch)
        extra = distance(logits, self._logits(others, inputs), inputs["labels"], loss_kind(tuner.model)) * self.consistency
        # A loss that is divided by the labels of all batches of the step already will not be divided by their number.
        counts_labels = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None
        if counts_labels if self.loss_is_scaled_for_ga is None else self.loss_is_scaled_for_ga:
            extra = extra / self.current_gradient_accumulation_steps
        return (loss + extra, outputs) if return_outputs else loss + extra

    def _logits(self, outputs: Any, inputs: Any) -> Tensor:
        """The logits that made a loss.

        Raises:
            GatewiseError: there are no logits or labels, as in question answering, or logits without a gradient.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is None or not logits.requires_grad or inputs.get("labels") is None:
            raise GatewiseError(
                "consistency compares the logits that made the loss, and there are none (question answering) or they are of "
                "another pass (TRL's SFTTrainer): search with gatewise.prompts.SearchTrainer, or turn it off with consistency=0"
            )
        return logits

    def _draw(self) -> Tensor:
        """Which gates a pass leaves out (n,), drawn by the CPU's generator, whose state checkpoints hold."""
        drawn = torch.rand(len(hyper_network(self.model).gates()))
        dropped = drawn < self.drop
        # With none open, a causal model's loss would have no gradient.
        dropped[drawn.argmax()] = False
        return dropped

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

    def search_from(self, checkpoint: str | None) -> None:
        """Trains, from a checkpoint if there is one. A search that had ended is only read: the Trainer would take a step more."""
        file = Path(checkpoint or "") / TRAINER_STATE_NAME
        if checkpoint is not None and file.is_file():
            state, args = TrainerState.load_from_json(str(file)), self.args
            if args.max_steps <= state.global_step if args.max_steps > 0 else args.num_train_epochs <= (state.epoch or 0):
                self.state = state
                self._load_trajectory(checkpoint)
                return
        self.train(resume_from_checkpoint=checkpoint)


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
        resume_from_checkpoint: a folder, or True for the latest if there is one; a search that had ended gives its result at once.
        settings: for the trainer: ``reparameterise``, ``consistency``, ``drop``, ``data_collator`` and so on.

    Raises:
        GatewiseError: no hyper-network, or K out of range; and what ``SearchMixin`` and ``BilevelMixin`` refuse.
    """
    tuner = hyper_network(model)
    chosen_layers(tuner.gates(), keep)
    weights, upper = split_in_half(train_dataset, args.seed)
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or "") / SEARCH_FOLDER)
    trainer = trainer_class(model=model, args=own, train_dataset=weights, upper_dataset=upper, **settings)
    trainer.search_from(_checkpoint_in(own, resume_from_checkpoint))
    layers = chosen_layers(trainer.gates[-1], keep)
    config: Any = tuner.peft_config[tuner.active_adapters[0]]
    saved = None if config.modules_to_save is None else list(dict.fromkeys(config.modules_to_save))
    chosen = dataclasses.replace(config, prompt_layers=layers, modules_to_save=saved, inference_mode=False)
    return SearchResult(trainer.gates, layers, chosen, trainer.state.log_history)


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
        resume_from_checkpoint: as in ``search``, so that a script of both stages that was interrupted goes on with True for both.
        settings: for the Trainer.

    Raises:
        GatewiseError: the configuration is that of a hyper-network, a model whose adapter was taken off, or a checkpoint of other
            layers.
    """
    if config.prompt_layers is None:
        raise GatewiseError(
            "the configuration has prompt_layers=None, which is the hyper-network: give it the layers that were chosen"
        )
    checkpoint = _checkpoint_in(args, resume_from_checkpoint)
    if checkpoint is not None and (layers := read_config(Path(checkpoint)).get("prompt_layers")) != config.prompt_layers:
        raise GatewiseError(
            f"the checkpoint {checkpoint} has prompts at layers {layers}, but now they are at {config.prompt_layers}: begin anew"
        )
    adapted = get_peft_model(_without_adapters(model), dataclasses.replace(config, inference_mode=False))
    assert isinstance(adapted, PeftModel)
    trainer = trainer_class(model=adapted, args=args, train_dataset=train_dataset, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    return adapted


def _checkpoint_in(args: TrainingArguments, given: str | bool | None) -> str | None:
    if given is not True:
        return given or None
    return get_last_checkpoint(str(args.output_dir)) if Path(str(args.output_dir)).is_dir() else None


def _without_adapters(model: Any) -> Any:
    """The base model with the heads it had before they were trained."""
    if not isinstance(model, PeftModel):
        return model
    inner = model.get_base_model()
    heads = {name: module.original_module for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    base: Any = model.base_model.unload()  # type: ignore[operator]
    for name, head in heads.items():
        base.set_submodule(name, head)
    return base


def chosen_layers(gates: Tensor, keep: int) -> list[int]:
    """The ``keep`` layers with the largest a (n,), in order; of equal ones the lower.

    Raises:
        GatewiseError: ``keep`` is not a number of layers.
    """
    if not is_whole(keep) or not 1 <= keep <= len(gates):
        raise GatewiseError(f"keep is {keep!r}: expected a whole number from 1 to {len(gates)}, the model's layers")
    return sorted(gates.sort(descending=True, stable=True).indices[:keep].tolist())


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
