"""Carries out a recipe: checks everything, loads, measures, trains, measures again, writes the adapter, and draws.

What a run leaves in its output folder is listed in ``gatewise/runs/folder.py``.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from gatewise import inspection, processes
from gatewise.adapters.files import SEARCH_FILE, Selection, read_note, read_selection, stored_numbers
from gatewise.allocation import slots
from gatewise.allocation.callback import RankAllocation, in_steps
from gatewise.errors import GatewiseError
from gatewise.files import finite
from gatewise.inspection.routing import routing_of_rows
from gatewise.internals.sharding import join, reshard
from gatewise.internals.soft_prompt_fixes import without_prompts
from gatewise.internals.zero import is_asked_for
from gatewise.models import load_model, load_tokenizer, resolve
from gatewise.models.device import has_bfloat16, pick_device, pick_dtype, say_slow
from gatewise.models.loading import class_names, most_tokens, pad_as
from gatewise.progress import quiet
from gatewise.prompts.stages import search
from gatewise.routed import ACTIVATION_PARAMETERS, RoutingLog
from gatewise.runs.baselines import AdaLoraSchedule, ranks_asked_for, to_plain_lora
from gatewise.runs.build import adapted, recompute_activations, training_arguments
from gatewise.runs.folder import (
    ADAPTER,
    CHECKPOINTS,
    GATES,
    LAYERS,
    METRICS,
    PLOT,
    ROUTING,
    SEARCH_CHECKPOINTS,
    RunResult,
    before_the_end,
    check_output,
    save_adapter,
    write_metrics,
    writing,
)
from gatewise.runs.progress import RunProgress
from gatewise.runs.recipe import (
    ALLOCATING,
    PROMPTING,
    AllocationSection,
    PointingSection,
    PromptsSection,
    Recipe,
    RoutingSection,
    SearchSection,
)
from gatewise.runs.trainer import (
    EarlyStopping,
    RecipeTrainer,
    SearchRecipeTrainer,
    TwoLevelRecipeTrainer,
    checkpoint_step,
    has_stopped_early,
)
from gatewise.tasks import PadCollator, Records, Template, default_template, encode, encode_classification, evaluate, load_records
from gatewise.tasks.metrics import Metrics, cut_line, metrics_line
from gatewise.tasks.records import check_labels, load_like


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Carries out a recipe.

    Data, template, base model, modules and the output folder are all checked before training begins. An interrupt or a
    fault leaves complete checkpoints and nothing half written.

    Args:
        output: the folder to write. It must be new or empty, unless resumed or overwritten.
        resume: go on from the latest complete checkpoint in ``output``; on the CPU the result is that of a run never stopped.
        overwrite: first remove what an earlier run left in ``output``.
        console: where progress is shown; stderr by default.

    Raises:
        GatewiseError: anything in recipe, data or folder that a user can put right, or a loss that is not finite.
    """
    started = time.monotonic()
    output = Path(output)
    join(pick_device(recipe.device))
    if recipe.method == "adalora" and is_asked_for():
        raise GatewiseError(
            "method adalora reads whole gradients, which DeepSpeed does not keep: take launch.strategy ddp, or method alora"
        )
    progress = RunProgress((console or Console(stderr=True)) if processes.is_main() else Console(quiet=True))
    checkpoint = processes.by_main(lambda: check_output(output, recipe, resume, overwrite))
    selection = processes.by_main(lambda: _found(output) if resume and recipe.searched else None)
    with quiet(bars=True):
        prepared = _prepare(recipe, progress, selection, checkpoint)
        if checkpoint is not None and (
            checkpoint_step(checkpoint) >= prepared.steps or has_stopped_early(checkpoint, recipe.training.early_stopping_patience)
        ):
            # The Trainer cannot resume where there is nothing left to train: it goes there once more.
            checkpoint = before_the_end(output / CHECKPOINTS, checkpoint_step(checkpoint))
            begins = f"from step {checkpoint_step(checkpoint)}" if checkpoint else "from the start"
            progress.say(
                f"the latest checkpoint is where training ended, from which nothing can be resumed: it is trained again {begins}"
            )
        with writing(output, recipe, overwrite) if processes.is_main() else nullcontext():
            if recipe.searched and selection is None:
                selection = _search(recipe, prepared, output, progress)
            trainer = _trainer(recipe, prepared, output, checkpoint, progress)
            metrics: dict[str, dict[str, Metrics]] = {name: {} for name in prepared.measured}
            seconds = {"evaluation": 0.0, "training": 0.0}
            if selection is not None:
                seconds["search"] = selection.seconds
            # Prompts change the function from the start, and "before" means the base model.
            with without_prompts(prepared.model) if recipe.method in PROMPTING else nullcontext(trainer.model) as start:
                _measure(recipe, prepared, start, "before", metrics, seconds, progress)
            set_seed(recipe.seed)
            begun = time.monotonic()
            with progress.training():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            seconds["training"] = time.monotonic() - begun
            # Without the wrapper that mixed precision puts around forward: both measurements run in the base's dtype.
            model: PeftModel = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            if recipe.method == "adalora":
                budget = ranks_asked_for(model)
                model = to_plain_lora(model)
                left = sum(slots.ranks(model).values())
                if left > budget:
                    progress.say(
                        f"warning: AdaLoRA has {left} ranks left, and {budget} were its budget: training (or its best checkpoint) "
                        "ended before its pruning did"
                    )
            _measure(recipe, prepared, model, "after", metrics, seconds, progress)
            if recipe.task == "text2mdt":
                prepared.note["calibration"] = _pointing().calibration(model, prepared.tokenizer, prepared.measured["dev"])
                if prepared.note["calibration"] is None:
                    progress.say("trees will have no confidence: too few nodes were found in dev, or all are right or all wrong")
            seconds["total"] = time.monotonic() - started
            log = trainer.state.log_history

            def written() -> RunResult:
                save_adapter(model, output / ADAPTER, prepared.note, selection)
                result = RunResult(
                    output=output,
                    adapter=output / ADAPTER,
                    metrics_file=output / METRICS,
                    metrics=metrics,
                    seconds=seconds,
                    steps=trainer.state.global_step,
                    dtype=prepared.note["trained_in"],
                    device=str(prepared.device),
                    resumed_from=checkpoint_step(checkpoint) if checkpoint else None,
                    selection=selection,
                    **_stored(recipe, prepared, output / ADAPTER),
                )
                # The run is whole from here on: what is drawn of it may fail.
                write_metrics(recipe, result, log)
                return result

            reshard(model)
            result = processes.by_main(written)
            if recipe.method == "milora":
                result = _routed(recipe, prepared, model, result, progress)

            def drawn() -> RunResult:
                if recipe.method == "milora":
                    write_metrics(recipe, result, log)
                return _drawn(recipe, result, progress)

            result = processes.by_main(drawn)
    return result


def _found(output: Path) -> Selection | None:
    """What the search of the run in a folder chose; None where it has not ended."""
    return read_selection(output / SEARCH_FILE) if (output / SEARCH_FILE).is_file() else None


def _stored(recipe: Recipe, prepared: "_Prepared", adapter: Path) -> dict[str, Any]:
    """What the adapter's folder says of it, for ``RunResult``."""
    if recipe.method in PROMPTING:
        return {
            "parameters": {"base": prepared.base_parameters, "adapter": stored_numbers(adapter)},
            "prompts": inspection.read_prompts(adapter) if recipe.method == "spt" else None,
        }
    budget = inspection.read_budget(adapter)
    return {
        "parameters": {"base": prepared.base_parameters, "adapter": budget.parameters + budget.other_parameters},
        "budget": budget,
    }


def _routed(recipe: Recipe, prepared: "_Prepared", model: PeftModel, result: RunResult, progress: RunProgress) -> RunResult:
    """The result with the map of what the prompts of dev chose."""
    with _may_fail("the routing of dev", progress):
        size = recipe.training.eval_batch_size
        routing = routing_of_rows(
            model, prepared.tokenizer, prepared.dev, size, base_model=recipe.model, data="dev", collate=prepared.collate
        )
        return replace(result, routing=routing)
    return result


def _drawn(recipe: Recipe, result: RunResult, progress: RunProgress) -> RunResult:
    """The result with where its pictures are: ranks or prompt layers, and the routing."""
    if result.routing is not None:
        with _may_fail(ROUTING, progress):
            inspection.plot_routing(result.routing, result.output / ROUTING)
    name = LAYERS if recipe.method in PROMPTING else PLOT
    with _may_fail(name, progress):
        if result.prompts is not None:
            return replace(result, plot=inspection.plot_prompts(result.prompts, result.output / name))
        if result.budget is not None:
            return replace(result, plot=inspection.plot(result.budget, result.output / name))
    return result


@contextmanager
def _may_fail(what: str, progress: RunProgress) -> Iterator[None]:
    """Says what could not be made of a finished run, and goes on: adapter and metrics are written."""
    try:
        yield
    except Exception as error:
        progress.say(f"warning: {what} could not be made ({type(error).__name__}: {error}); adapter and metrics.json are whole")


# What a run is made of --------------------------------------------------------------------------------------------------


@dataclass
class _Prepared:
    """Everything a run needs, loaded and checked."""

    measured: dict[str, Any]
    template: Template | None
    tokenizer: PreTrainedTokenizerBase
    collate: Callable[..., dict[str, Tensor]]
    device: torch.device
    model: PeftModel
    base_parameters: int
    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    steps: int
    steps_per_epoch: int
    max_length: int
    note: dict[str, Any]
    held_out: list[dict[str, Any]]
    fresh_base: Callable[[], PreTrainedModel]
    allocation: RankAllocation | None = field(default=None)


def _prepare(recipe: Recipe, progress: RunProgress, selection: Selection | None, checkpoint: Path | None) -> _Prepared:
    data, pointing = recipe.data, recipe.task == "text2mdt"
    rows: Any
    rows, measured, template = _read_trees(recipe) if pointing else _read_rows(recipe)
    device = pick_device(recipe.device)
    dtype = torch.float32 if recipe.task == "classification" else pick_dtype(recipe.dtype, device, progress.say)
    if recipe.training.bf16 and recipe.dtype != "bfloat16" and not has_bfloat16(device):
        say_slow(progress.say)
    where = f"{device}" if processes.count() == 1 else f"{device}, {processes.count()} processes"
    progress.say(f"loading {recipe.model} in {_name(dtype)} on {where}")
    processes.by_main(lambda: resolve(recipe.model, progress=progress.say))
    tokenizer = load_tokenizer(recipe.model)
    if recipe.task == "classification" and data.labels is None:
        # A base model that is a classifier of these labels already has its order, and so has a run that goes on.
        known = class_names(recipe.model) if checkpoint is None else read_note(checkpoint).get("labels")
        if known is not None and set(known) == set(rows.labels):
            rows, measured = replace(rows, labels=known), {name: replace(one, labels=known) for name, one in measured.items()}
    labels = rows.labels if isinstance(rows, Records) else None
    fresh_base = partial(_base, recipe, len(labels or ()) if recipe.task == "classification" else None, dtype, tokenizer)
    base = fresh_base()
    # Learned positions end where the table ends, and PEFT's prompts take some of them.
    positions = most_tokens(base, tokenizer)
    if recipe.method in ("prompt-tuning", "prefix-tuning"):
        positions -= (recipe.prompts or PromptsSection()).num_prompt_tokens
    max_length = min(data.max_length, positions)
    if max_length < 1:
        raise GatewiseError(
            f"prompts.num_prompt_tokens leaves none of the {recipe.model}'s positions for the text: lower it by {1 - max_length}"
        )
    if data.max_new_tokens is not None and data.max_new_tokens >= positions:
        raise GatewiseError(f"data.max_new_tokens is {data.max_new_tokens}: expected 1 to {positions - 1} for this model")

    def features(records: Any, what: str) -> list[dict[str, Any]]:
        if pointing:
            section = recipe.pointing or PointingSection()
            copies = {"swapped": section.swapped if what == "data.train" else 0, "seed": recipe.seed}
            limits: dict[str, Any] = {"longest": section.longest, "max_length": max_length}
            return _pointing().training_rows(records, tokenizer, what=what, say=progress.say, **limits, **copies)
        if recipe.task == "classification":
            return encode_classification(records, tokenizer, max_length=max_length)
        return list(encode(records, tokenizer, template, max_length=max_length))

    train, dev = features(rows, "data.train"), features(measured["dev"], "data.dev")
    held_out: list[dict[str, Any]] = []
    if set_aside := _set_aside(recipe):
        train, held_out = _hold_out(train, set_aside, recipe.seed)
    read: Any = base  # of a pointing model, the part that is no adapter's
    base_parameters = sum(p.numel() for p in (read.encoder if pointing else read).parameters())
    steps = recipe.training.total_steps(len(train))
    prepared = _Prepared(
        measured=measured,
        template=template,
        tokenizer=tokenizer,
        collate=_pointing().PointingCollator(tokenizer) if pointing else PadCollator(tokenizer),
        device=device,
        model=adapted(recipe, base, steps, selection.layers if selection else None),
        base_parameters=base_parameters,
        train=train,
        dev=dev,
        steps=steps,
        steps_per_epoch=recipe.training.steps_per_epoch(len(train)),
        max_length=max_length,
        note={
            "format": 1,
            "base": recipe.model,
            "task": recipe.task,
            "template": template.prompt if template else None,
            "labels": labels,
            "dtype": recipe.dtype,
            "trained_in": _name(dtype),
            "label_words": template.labels if template else None,
            "max_length": max_length,
            "max_new_tokens": data.max_new_tokens,
            "training": recipe.training.model_dump(
                include={"learning_rate", "batch_size", "weight_decay", "max_grad_norm", "gradient_accumulation"}
            ),
        },
        held_out=held_out,
        fresh_base=fresh_base,
    )
    if pointing:
        prepared.note["heads"] = read.heads.settings.to_json()
    if recipe.method == "spt":
        prepared.note["num_layers"] = int(base.config.get_text_config().num_hidden_layers)
    if recipe.method in ALLOCATING:
        prepared.allocation = _allocation(recipe, prepared, progress)
    return prepared


def _read_rows(recipe: Recipe) -> tuple[Records, dict[str, Any], Template | None]:
    """The training rows, those to measure on by name, and how a causal model's prompts are written."""
    data = recipe.data
    rows = load_records(data.train, split=data.train_split, limit=data.limit_train, labels=data.labels)
    check_labels(rows, "give rows with other labels too, or name them all in data.labels")
    measured = {"dev": load_like(data.dev, rows.labels, split=data.dev_split, limit=data.limit_dev)}
    if data.test is not None:
        measured["test"] = load_like(data.test, rows.labels, split=data.test_split)
    for name, records in measured.items():
        if records.kind != rows.kind:
            raise GatewiseError(
                f"data.{name} ({records.source}) holds {records.kind} rows, but data.train ({rows.source}) holds "
                f"{rows.kind} rows: expected the same kind"
            )
    if recipe.task == "classification":
        return rows, measured, None
    if data.max_new_tokens is not None and rows.kind in ("label", "choice"):
        raise GatewiseError(
            f"data.max_new_tokens is {data.max_new_tokens}, but {data.train} holds {rows.kind} rows, to which nothing is written: "
            "remove the key"
        )
    given = recipe.template
    template = Template(given.prompt, given.labels) if given else default_template(rows)
    for records in (rows, *measured.values()):
        template.check(records)
    for row in measured["test"].rows if "test" in measured else ():  # the others are rendered when they are encoded
        template.render(row)
    return rows, measured, template


def _pointing() -> Any:
    """What runs with task text2mdt take from ``gatewise_mdt``, which all others do without."""
    from gatewise_mdt.pointing import training

    return training


def _read_trees(recipe: Recipe) -> tuple[list[Any], dict[str, Any], None]:
    """Texts with trees: to train on, and to measure on by name."""
    data, read_records = recipe.data, _pointing().read_records
    measured = {"dev": read_records(data.dev, data.limit_dev)}
    if data.test is not None:
        measured["test"] = read_records(data.test)
    return read_records(data.train, data.limit_train), measured, None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _base(recipe: Recipe, num_labels: int | None, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model as it is loaded, the head that a classifier is given drawn from the recipe's seed."""
    set_seed(recipe.seed)
    if recipe.task == "text2mdt":
        section = recipe.pointing or PointingSection()
        encoder = load_model(recipe.model, task="encoder", dtype=dtype)
        return _pointing().pointing_model(encoder, **section.model_dump(include={"width", "longest", "dropout"}))
    # What some encoders pool with is in no file, and is trained whole then. PEFT's own prompts have no room for it.
    brought = () if recipe.method in ("prompt-tuning", "prefix-tuning") else ("pooler",)
    base = load_model(recipe.model, task=recipe.task, num_labels=num_labels, dtype=dtype, brought=brought)
    if recipe.task == "classification":
        pad_as(base, tokenizer)
    return base


def _set_aside(recipe: Recipe) -> int:
    """Training rows that a method wants for itself: to score ranks on, or for the upper of its two levels."""
    if recipe.method in ALLOCATING:
        return (recipe.allocation or AllocationSection()).validation_rows
    routing = recipe.routing or RoutingSection()
    return routing.validation_rows if recipe.method == "milora" and routing.two_levels else 0


def _hold_out(train: list[dict[str, Any]], rows: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows, and at most ``rows`` (and a quarter) of them set aside to score ranks on: dev only measures.

    Of rows that are copies of each other, which have the same ``group``, the first is set aside and the others are not trained on.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for i, row in enumerate(train):
        groups.setdefault(row.get("group", i), []).append(row)
    held = list(groups.values())
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(rows, max(1, len(held) // 4))
    apart = set(order[:count])
    kept = [row for i, group in enumerate(held) if i not in apart for row in group]
    return kept or train, [held[i][0] for i in order[:count]]


def _allocation(recipe: Recipe, prepared: _Prepared, progress: RunProgress) -> RankAllocation:
    section = recipe.allocation or AllocationSection()
    first = section.first_round
    step = in_steps(first, prepared.steps_per_epoch)
    if step >= prepared.steps:
        raise GatewiseError(
            f"allocation.first_round is {first}, after step {step}, but the run has {prepared.steps} steps and what a round "
            "grows must learn: lower it or train longer"
        )
    batch = prepared.collate(prepared.held_out)
    settings = section.model_dump(exclude={"validation_rows", "init_r"})
    if section.schedule == "cubic" and section.budget != "modules":
        settings["target_rank"] = recipe.peft.r
    return RankAllocation(**settings, validation_batch=batch, seed=recipe.seed, on_round=progress.say_round)


def _trainer(recipe: Recipe, prepared: _Prepared, output: Path, checkpoint: Path | None, progress: RunProgress) -> RecipeTrainer:
    training = recipe.training
    callbacks: list[TrainerCallback] = []
    if prepared.allocation is not None:
        callbacks.append(prepared.allocation)
    if recipe.method == "adalora":
        callbacks.append(AdaLoraSchedule(checkpoint))
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(training.early_stopping_patience))
    if training.gradient_checkpointing:
        recompute_activations(prepared.model)
    trainer: Any = RecipeTrainer
    if recipe.method == "milora":
        routing = recipe.routing or RoutingSection()
        if routing.two_levels:
            trainer = partial(
                TwoLevelRecipeTrainer,
                upper_dataset=prepared.held_out,
                upper_parameters=ACTIVATION_PARAMETERS,
                upper_learning_rate=routing.activation_learning_rate,
                upper_every=min(routing.activation_every, prepared.steps),
            )
    made: RecipeTrainer = trainer(
        model=prepared.model,
        args=training_arguments(training, recipe.seed, prepared.steps, output / CHECKPOINTS, prepared.device),
        train_dataset=prepared.train,
        eval_dataset=prepared.dev,
        collator=prepared.collate,
        note=prepared.note,
        callbacks=[*callbacks, progress],
        group_by_length=training.group_by_length,
    )
    if recipe.method == "milora":
        RoutingLog.attach(made, per_layer=False)
    return made


# The search of method spt -----------------------------------------------------------------------------------------------


def _search(recipe: Recipe, prepared: _Prepared, output: Path, progress: RunProgress) -> Selection:
    """Searches the layers that take a prompt, by SPT-DARTS, and has a fresh model with prompts there take the searched one's place.

    Draws ``gates.png`` and writes ``search.json``, whose presence says that the search is done. It goes on from the latest complete
    checkpoint of a search in the folder, if there is one; on the CPU the result is that of a search never stopped.
    """
    section, training = recipe.search or SearchSection(), recipe.training
    steps = recipe.search_steps(len(prepared.train))
    checkpoint = before_the_end(output / SEARCH_CHECKPOINTS, steps)
    if training.gradient_checkpointing:
        recompute_activations(prepared.model)
    # Nothing is measured while searching: dev is for the model that comes of it.
    alone = training.model_copy(update={"eval_every": None, "early_stopping_patience": None, "load_best": False})
    trainer = partial(
        SearchRecipeTrainer,
        eval_dataset=[],
        collator=prepared.collate,
        note=prepared.note,
        callbacks=[progress],
        group_by_length=training.group_by_length,
    )
    set_seed(recipe.seed)
    begun = time.monotonic()
    with progress.training("searching"):
        found = search(
            prepared.model,
            prepared.train,
            training_arguments(alone, recipe.seed, steps, output / CHECKPOINTS, prepared.device),
            keep=section.keep,
            choose=section.choose,
            trainer_class=trainer,
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            upper_learning_rate=section.gate_learning_rate,
            reparameterise=section.reparameterise,
            consistency=section.consistency,
            drop=section.drop,
        )
    selection = Selection(
        layers=found.layers,
        gates=found.gates[-1].tolist(),
        losses=None if found.losses is None else found.losses.tolist(),
        steps=steps,
        seconds=round(time.monotonic() - begun, 2),
        resumed_from=None if checkpoint is None else checkpoint_step(checkpoint),
        settings={
            "search": section.model_dump(mode="json"),
            "prompts": (recipe.prompts or PromptsSection()).model_dump(mode="json", include=PromptsSection().keys_of("spt")),
        },
        log=[finite(entry) for entry in found.log if "loss" in entry],
    )
    if processes.is_main():
        inspection.plot_gates(found.gates.tolist(), found.layers, output / GATES, recipe.model)
        selection.write(output / SEARCH_FILE)
    progress.say(_told(selection))
    # Nothing of the search but its choice: head and activations of the base are as they were too.
    prepared.model = adapted(recipe, prepared.fresh_base(), prepared.steps, selection.layers)
    return selection


def _told(selection: Selection) -> str:
    numbers = selection.gates if selection.losses is None else selection.losses
    chosen = ", ".join(f"{layer} ({numbers[layer]:.3f})" for layer in selection.layers)
    others = [number for layer, number in enumerate(numbers) if layer not in selection.layers]
    if not others:
        return f"the search chose all layers: {chosen}"
    rest = f"gates are at most {max(others):.3f}" if selection.losses is None else f"mean losses are at least {min(others):.3f}"
    return f"the search chose layers {chosen}; the other {rest}"


# Measuring --------------------------------------------------------------------------------------------------------------


def _measure(
    recipe: Recipe,
    prepared: _Prepared,
    model: Any,
    when: str,
    metrics: dict[str, dict[str, Metrics]],
    seconds: dict[str, float],
    progress: RunProgress,
) -> None:
    begun = time.monotonic()
    for name, records in prepared.measured.items():
        answers: list[dict[str, Any]] = []
        with progress.counting(f"measuring on {name} {when} training") as count:
            size = recipe.training.eval_batch_size
            if recipe.task == "text2mdt":
                metrics[name][when] = _pointing().measured(model, prepared.tokenizer, records, size, count)
            else:
                metrics[name][when] = evaluate(
                    model,
                    prepared.tokenizer,
                    records,
                    prepared.template,
                    batch_size=size,
                    max_new_tokens=recipe.data.max_new_tokens,
                    max_length=prepared.max_length,
                    progress=count,
                    answers=answers,
                )
        progress.say(f"{name} {when} training: {metrics_line(metrics[name][when])}")
        if when == "after" and (line := cut_line(answers, "data.max_new_tokens")):
            progress.say(line)
    seconds["evaluation"] += time.monotonic() - begun
