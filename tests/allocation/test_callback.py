"""RankAllocation in real Trainers on tiny models: what it decides, what it leaves behind, and that it can be interrupted."""

import copy
import itertools
import json
import logging
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import EXPERTS, OTHER_LAYERS, load_in_peft, tiny_base
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from gatewise import ConstantBudget, Cubic, RankAllocation, scores
from gatewise.allocation import scoring, slots
from gatewise.allocation.algorithm import plan_round
from gatewise.errors import GatewiseError


@pytest.fixture
def examples(batch):
    """examples(family, n) -> n rows of one length, a list of dicts of tensors."""

    def make(family="llama", n=24, width=8):
        generator = torch.Generator().manual_seed(2)
        rows = []
        if family in ("wav2vec2", "t5", "bart"):
            data = batch(family, rows=n)
            return [{key: value[row] for key, value in data.items()} for row in range(n)]
        for _ in range(n):
            ids = torch.randint(1, 60, (width,), generator=generator)
            labels = torch.randint(0, 3, (), generator=generator) if family == "bert" else ids.clone()
            rows.append({"input_ids": ids, "attention_mask": torch.ones(width, dtype=torch.long), "labels": labels})
        return rows

    return make


def when(**settings):
    """Three rounds that move a sixth of the budget each, but for what is set otherwise."""
    return ConstantBudget(**{"rounds": 3, "first_round": 3, "recover": 2, "prune_fraction": 1 / 6, **settings})


def down(target_rank, **settings):
    """A budget that comes down in three rounds."""
    return Cubic(target_rank=target_rank, **{"rounds": 3, "first_round": 3, "recover": 2, **settings})


@pytest.fixture
def run(adapted, examples, tmp_path):
    """run(family, peft settings, allocation settings, training settings) -> model, allocation, trainer, after training.

    Of a model given, another one is not made; ``allocation`` may be a list of settings, for as many callbacks.
    """

    def train(family="llama", peft=None, allocation=None, training=None, resume=None, callbacks=(), base_dtype=None, model=None):
        torch.manual_seed(0)
        model = model or adapted(family, trained=False, **(peft or {}))
        for name, parameter in model.named_parameters() if base_dtype else ():
            if "lora_" not in name:
                parameter.data = parameter.data.to(base_dtype)
        data = examples(family)
        held_out = {key: torch.stack([row[key] for row in data[:6]]) for key in data[0]}
        several = allocation if isinstance(allocation, list) else [allocation or {}]
        settings = {"score": "taylor", "schedule": when(), "validation_batch": held_out}
        allocations = [RankAllocation(**settings | one) for one in several]
        arguments = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **(training or {}),
        }
        kinds = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if family in ("t5", "bart") else (Trainer, TrainingArguments)
        trainer = kinds[0](
            model=model,
            args=kinds[1](**arguments),
            train_dataset=data,
            eval_dataset=data[:8],
            callbacks=[*allocations, *callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, allocations if isinstance(allocation, list) else allocations[0], trainer

    return train


def logits(model, rows):
    model.eval()
    if "_original_forward" in model.__dict__:  # mixed precision: the Trainer leaves its autocast in the model's forward
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
    with torch.no_grad():
        columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return model(**{key: value for key, value in columns.items() if key != "labels" or model.config.is_encoder_decoder}).logits


# Scores are compared with slow references in scores/; here each serves some kinds of adapter and training.
@pytest.mark.parametrize(
    ("family", "peft", "training", "score", "budget"),
    [
        ("llama", {}, {}, "taylor", "parameters"),
        ("llama", {"target_modules": ["q_proj", "down_proj"]}, {}, "random", "parameters"),
        ("llama", {"use_rslora": True}, {"gradient_accumulation_steps": 2}, "path_integral", "ranks"),
        ("llama", {}, {"gradient_checkpointing": True, "weight_decay": 0.1}, "ablation", "ranks"),
        ("llama", {}, {"bf16": True}, "path_moments", "parameters"),
        ("llama", {"use_dora": True, "lora_dropout": 0.1}, {}, "taylor", "parameters"),
        ("llama", {"init_lora_weights": "olora"}, {}, "sensitivity", "ranks"),
        ("gpt2", {"fan_in_fan_out": True}, {}, "ablation", "parameters"),
        ("bert", {}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, "path_moments", "parameters"),
        (
            "llama", {"target_modules": OTHER_LAYERS["llama"], "use_dora": True}, {"gradient_checkpointing": True}, "sensitivity",
            "parameters",
        ),
        ("gpt2", {"target_modules": OTHER_LAYERS["gpt2"], "fan_in_fan_out": True}, {"bf16": True}, "path_integral", "ranks"),
        ("mixtral", EXPERTS, {"gradient_checkpointing": True, "weight_decay": 0.1}, "path_moments", "parameters"),
        ("t5", {}, {"predict_with_generate": True, "bf16": True}, "taylor", "parameters"),
        (
            "bart", {"use_dora": True}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, "path_integral",
            "parameters",
        ),
    ],
)  # fmt: skip
def test_ends_as_a_plain_adapter_within_budget(run, adapted, examples, tmp_path, family, peft, training, score, budget):
    model, allocation, _ = run(family, peft=peft, allocation={"score": score, "budget": budget}, training=training)
    assert [one.step for one in allocation.history] == [3, 5, 7]
    ranks_at_start = dict.fromkeys(allocation.history[0].ranks, 3)
    cost = dict.fromkeys(ranks_at_start, 1)
    if budget == "parameters":
        cost = slots.costs(slots.lora_layers(adapted(family, **peft)), "default")
    start = allocation.budget
    assert start == sum(3 * cost[path] for path in ranks_at_start)
    for one in allocation.history:
        assert sum(rank * cost[path] for path, rank in one.ranks.items()) <= start
        freed = sum(cost[path] * len(dead) for path, dead in one.pruned.items())
        assert round(start / 6) <= freed < round(start / 6) + max(cost.values())
        assert not one.pruned.keys() & one.grown.keys()
        assert torch.isfinite(torch.tensor([one.loss_before, one.loss_after])).all()
    live = {path: rank for path, rank in slots.ranks(model).items() if rank}  # an expert stays with its fellows without
    assert live == {path: rank for path, rank in allocation.history[-1].ranks.items() if rank}
    expected = logits(model, examples(family))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(set(slots.ranks(model).values())) == 1 or config["rank_pattern"]
    assert json.loads((tmp_path / "adapter" / "allocation.json").read_text())["rounds"][2]["round"] == 3
    if peft.get("init_lora_weights") == "olora":  # which rewrites the base weights: the adapter fits these, not a fresh copy
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "adapter")
        torch.testing.assert_close(logits(loaded, examples(family)), expected, rtol=1e-5, atol=1e-5)
    else:
        loaded = load_in_peft(family, tmp_path / "adapter")
        assert {p: layer.scaling["default"] for p, layer in slots.lora_layers(loaded).items()} == pytest.approx(
            dict.fromkeys(slots.ranks(model), 6 / 3**0.5 if peft.get("use_rslora") else 2.0)
        )
        torch.testing.assert_close(logits(loaded, examples(family)), expected, rtol=1e-5, atol=1e-5)


def test_same_training_as_stock_lora_until_the_first_round(run):
    model, _, _ = run(allocation={"schedule": when(rounds=0)})
    stock, _, _ = run(allocation=[])
    found = {name: model.state_dict()[name] for name in stock.state_dict()}
    torch.testing.assert_close(found, dict(stock.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "peft"),
    [
        ("llama", {"lora_dropout": 0.1}),
        ("t5", {"lora_dropout": 0.1, "target_modules": ["shared", "q", "wo"]}),
        ("mixtral", EXPERTS),
    ],
)
def test_resumed_equals_uninterrupted(run, tmp_path, family, peft):
    training = {"save_strategy": "steps", "save_steps": 4}
    whole, allocation, _ = run(family, peft=peft, training=training)
    resumed, again, _ = run(family, peft=peft, training=training, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert [one.round for one in again.history] == [1, 2, 3]
    assert [(o.pruned, o.grown, o.ranks) for o in again.history] == [(o.pruned, o.grown, o.ranks) for o in allocation.history]
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def test_rounds_of_a_checkpoint_from_before_are_kept(run, tmp_path):
    training = {"save_strategy": "steps", "save_steps": 4}
    _, whole, _ = run(training=training)
    state = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text().replace('"rounds": [', '"history": ['))
    _, again, _ = run(training=training, resume=str(state.parent))
    assert [one.step for one in again.history] == [one.step for one in whole.history]


def test_every_checkpoint_is_a_plain_adapter(run, examples, tmp_path):
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept[state.global_step] = logits(kwargs["model"], examples()).clone()
            kwargs["model"].train()

    run(training={"save_strategy": "steps", "save_steps": 1}, callbacks=[Keep()])
    assert sorted(kept) == list(range(1, 11))
    for step, expected in kept.items():
        folder = tmp_path / "run" / f"checkpoint-{step}"
        loaded = load_in_peft("llama", folder)
        torch.testing.assert_close(logits(loaded, examples()), expected, rtol=1e-5, atol=1e-5)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


@pytest.mark.parametrize(("worst", "rounds"), [(True, 0), (False, 3)])
def test_best_checkpoint_is_the_one_compacted_and_described(run, worst, rounds):
    """Loss falls, so that the "best" of the highest loss is step 2, before any round, and of the lowest one step 10."""
    model, allocation, trainer = run(training=BEST | {"greater_is_better": worst}, allocation={"budget": "ranks"})
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2" if worst else "checkpoint-10")
    assert len(allocation.history) == len(allocation.to_json()["rounds"]) == rounds
    expected = allocation.history[-1].ranks if rounds else dict.fromkeys(slots.ranks(model), 3)
    assert slots.ranks(model) == {path: r for path, r in expected.items() if r}
    assert sum(expected.values()) == allocation.budget or rounds


def test_a_best_checkpoint_that_has_gone_leaves_the_last_weights_and_their_history(run):
    """As on a resumed run whose folder was moved: Transformers warns, and loads nothing."""

    class Move(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            state.best_model_checkpoint = f"{args.output_dir}/elsewhere/checkpoint-2"

    model, allocation, _ = run(training=BEST, callbacks=[Move()])
    assert [one.step for one in allocation.history] == [3, 5, 7]
    assert slots.ranks(model) == {path: rank for path, rank in allocation.history[-1].ranks.items() if rank}


def test_what_a_trainer_reports_to_is_told_of_rounds(run, monkeypatch):
    """Reporters stand before all other callbacks. The log of the loss, due at the same step, comes too."""
    told = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            told.append((state.global_step, logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    _, allocation, trainer = run(training={"report_to": "tensorboard", "logging_steps": 1})
    rounds = [(step, logs) for step, logs in told if "allocation/round" in logs]
    assert [step for step, logs in told if "loss" in logs] == list(range(1, 11))
    for (step, logs), one in zip(rounds, allocation.history, strict=True):
        scores = sorted(score for own in one.scores.values() for score in own)
        assert (step, logs["allocation/loss_after"], logs["allocation/score_lowest"]) == (one.step, one.loss_after, scores[0])
        assert {path: logs[f"ranks/{path}"] for path in one.ranks} == one.ranks
        assert 0 < logs["allocation/budget_used"] <= 1
        assert {**logs, "step": step} in trainer.state.log_history


@pytest.mark.parametrize(("family", "score"), [("llama", "path_moments"), ("t5", "ablation")])
def test_a_round_takes_no_more_tokens_at_once_than_training_does(run, monkeypatch, family, score):
    """On an accelerator, for which the CPU stands in here: as many rows as a training step, each like the longest."""
    taken = {True: [], False: []}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            def look(module, _, inputs):
                taken[module.training].append(inputs["input_ids"].numel())

            model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)

    step_tokens = scoring.step_tokens
    monkeypatch.setattr(scoring, "step_tokens", lambda _, batches: step_tokens(torch.device("cuda"), batches))
    run(
        family,
        allocation={"score": score, "schedule": when(rounds=1)},
        training={"per_device_train_batch_size": 2},
        callbacks=[Watch()],
    )
    assert max(taken[True]) >= max(taken[False]) > min(taken[True]) // 2
    assert step_tokens(torch.device("cuda"), []) == 8192


@pytest.mark.parametrize("score", [partial(scores.taylor), "gatewise.scores:taylor"])
def test_a_score_in_other_clothes_prunes_the_same_ranks(run, score):
    """A partial of "taylor" was taken for a score on which a rank that does nothing scores zero."""
    (_, expected, _), (_, found, _) = run(), run(allocation={"score": score})
    assert found.to_json()["score"] == "taylor"
    assert [replace(one, seconds=0) for one in found.history] == [replace(one, seconds=0) for one in expected.history]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda paths: {**dict.fromkeys(paths, [0.0] * 3), paths[0]: torch.rand(1)},
            r"does not fit at model.*0.*q_proj: expected an",
        ),
        (
            lambda paths: dict.fromkeys(paths[1:], [0.0] * 3),
            r"does not fit at .*q_proj: expected an entry for each of the 14 paths",
        ),
        (lambda paths: dict.fromkeys([*paths, "elsewhere"], [0.0] * 3), r"does not fit at elsewhere"),
        (lambda paths: None, r"returned NoneType; expected path -> one number for each live rank"),
        (lambda paths: dict.fromkeys(paths, [math.nan] * 3), r"at step 3: a score of module .* the round was not carried out"),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_the_name_of_what_does_not(run, wrong, message):
    def wrong_score(model, batch, adapter=None):
        return wrong(list(slots.lora_layers(model, adapter)))

    with pytest.raises(GatewiseError, match=rf"^score 'wrong_score' {message}"):
        run(allocation={"score": wrong_score})


def test_a_rule_of_ones_own(run):
    """It sees what it is to keep to, and its plan is carried out."""
    seen = []

    def best_give_to_last(scores, limits):
        seen.append(limits)
        first, *_, last = scores
        if len(scores[first]) == 1:
            return {}, {}
        return {first: [max(range(len(scores[first])), key=scores[first].__getitem__)]}, {last: 1}

    _, allocation, _ = run(allocation={"rule": best_give_to_last, "budget": "ranks", "min_rank": 1})
    (first, *_), *_ = (list(one.scores) for one in allocation.history)
    assert [list(one.pruned) for one in allocation.history] == [[first], [first], []]
    assert [sum(map(len, one.grown.values())) for one in allocation.history] == [1, 1, 0]
    assert (seen[0].count, seen[0].budget, seen[0].min_rank, seen[0].costs) == (7, 42, 1, None)
    assert set(seen[0].capacity.values()) == {6}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda scores: ({"nowhere": [0]}, {}), r"cannot be carried out \(after it 42 would live, and see nowhere\)"),
        (
            lambda scores: ({next(iter(scores)): [3]}, {}),
            r"see model\.layers\.0\.self_attn\.q_proj\): expected positions of live ranks",
        ),
        (lambda scores: ({}, dict.fromkeys(scores, 1)), r"after it 56 would live\): .* at most 42 of the budget"),
        (lambda scores: ({path: range(3) for path in scores}, {}), "at least one rank that stays"),
        (lambda scores: None, "the rule returned None; expected a gatewise.budget.Plan"),
        (
            lambda scores: ({next(iter(scores)): range(3)}, {}),
            r"see model\.layers\.0\.self_attn\.q_proj\): .* \(1 in each module\)",
        ),
        (lambda scores: ({}, {next(iter(scores)): math.inf}), "the rule returned .*inf"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(run, plan, message):
    with pytest.raises(GatewiseError, match=message):
        run(allocation={"rule": lambda scores, limits: plan(scores), "budget": "ranks", "min_rank": 1})


def test_cubic_budget_ends_at_its_target(run, caplog):
    """42 ranks down to 28 in three rounds, nothing grown, and stock LoRA's width until the first."""
    settings = {"score": "path_integral", "schedule": down(2), "budget": "ranks"}
    model, allocation, _ = run(allocation=settings)
    assert (allocation.budget, allocation.target) == (42, 28)
    assert set(allocation.to_json()["r_max"].values()) == {3}
    assert [sum(one.ranks.values()) for one in allocation.history] == [28 + round(14 * (2 / 3) ** 3), 28 + round(14 / 27), 28]
    assert not any(one.grown for one in allocation.history)
    assert sum(slots.ranks(model).values()) == 28
    assert "given back" not in caplog.text
    # Rounds that do not fit are left out, and the target is reached all the same.
    model, allocation, _ = run(allocation=settings | {"schedule": down(2, rounds=9)})
    assert [one.step for one in allocation.history] == [3, 5, 7, 9]
    assert sum(slots.ranks(model).values()) == 28


def test_cubic_budget_is_met_when_training_ends_early(run, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    with caplog.at_level(logging.WARNING, logger="gatewise"):
        settings = {"schedule": down(2), "budget": "ranks"}
        model, allocation, _ = run(allocation=settings, callbacks=[Stop()])
    assert [one.step for one in allocation.history] == [3, 5, 6]
    assert sum(slots.ranks(model).values()) == 28
    assert "before the budget was down to its target of 28 ranks" in caplog.text


def test_what_module_pruning_leaves_above_the_target_is_said(run, caplog):
    """Every module is worth something and keeps a rank: 14 of them, where 7 were wanted. Training did not end too early."""

    def worthy(model, batch, adapter):  # which may give lists
        return {path: [0.5] * len(slots.live_slots(layer, adapter)) for path, layer in slots.lora_layers(model, adapter).items()}

    settings = {"schedule": down(0.5), "budget": "ranks", "score": worthy, "module_pruning": True}
    with caplog.at_level(logging.WARNING, logger="gatewise"):
        model, allocation, _ = run(allocation=settings)
    assert sum(slots.ranks(model).values()) == 14
    assert len(allocation.history) == 3
    assert allocation.to_json()["score"] == "worthy"
    assert "the adapter has 14 ranks, where the target was 7: not all rounds ran, or modules that module_pruning" in caplog.text
    assert "training ended" not in caplog.text


def test_finishing_an_interrupted_training_says_what_is_left(adapted, batch, examples, tmp_path, caplog):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = adapted(trained=True)
    allocation = RankAllocation("taylor", down(2, rounds=2, first_round=2), batch(), budget="ranks")
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=5, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(), callbacks=[allocation, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with caplog.at_level(logging.WARNING, logger="gatewise"):
        allocation.finish(model)
    assert "the adapter has 30 ranks, where the target was 28: not all rounds ran" in caplog.text
    assert "module_pruning" not in caplog.text


@pytest.mark.parametrize("schedule", [when(prune_fraction=1 / 4), down(1)])
def test_what_is_stored_with_trained_biases_stays_within_the_budget(run, tmp_path, schedule):
    """Modules whose biases are trained stay in the adapter, and are written with a rank: none may lose its last one."""

    def last_layer(model, batch, adapter):
        found = {}
        for path, layer in slots.lora_layers(model, adapter).items():
            found[path] = [10.0 if "layer.1" in path else 0.1] * len(slots.live_slots(layer, adapter))
        return found

    model, done, _ = run("bert", peft={"bias": "lora_only"}, allocation={"score": last_layer, "schedule": schedule})
    model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    stored = sum(tensor.numel() for name, tensor in tensors.items() if ".lora_" in name)
    assert stored <= done.target <= done.budget
    live = slots.ranks(model)
    assert stored == sum(live[path] * cost for path, cost in slots.costs(slots.lora_layers(model), "default").items())


def test_layers_that_no_budget_counts_are_named(run, caplog):
    """Convolutions, plain and in groups."""
    targets = {"r": 4, "target_modules": ["conv_layers.1.conv", "pos_conv_embed.conv", "q_proj", "v_proj"]}
    with caplog.at_level(logging.WARNING, logger="gatewise"):
        model, allocation, _ = run("wav2vec2", peft=targets, allocation={"schedule": down(2), "budget": "ranks"})
    convolutions = slots.left_alone(model, "default")
    assert [path.rpartition(".")[2] for path in convolutions] == ["conv", "conv"]
    assert f"{', '.join(convolutions)}: no ranks of this kind of layer are moved or taken away" in caplog.text
    assert "the budget of 8 ranks does not count them" in caplog.text
    assert sum(slots.ranks(model).values()) == allocation.target == 8
    assert all(model.get_base_model().get_submodule(path).r["default"] == 4 for path in convolutions)
    caplog.clear()
    run(allocation={"schedule": down(2)})
    assert "taken away" not in caplog.text


@pytest.mark.parametrize("score", ["taylor", "ablation"])
def test_a_rank_that_does_nothing_scores_zero_where_the_size_of_scores_counts(run, adapted, score):
    """AB-LoRA's own number for it is far below zero, and would send the smallest modules first, or useful modules as a whole."""
    model, found = adapted(), {}
    slots.lora_layers(model)["model.layers.1.mlp.up_proj"].lora_B["default"].weight.data[:, 1] = 0
    for name, more in {
        "parameters": {"budget": "parameters"},
        "modules": {"budget": "ranks", "module_pruning": True},
        "ranks": {"budget": "ranks"},
    }.items():
        options = {"mode": "exact"} if score == "ablation" else {}
        settings = {"score": score, "score_options": options, "schedule": when(rounds=1), **more}
        _, allocation, _ = run(model=copy.deepcopy(model), allocation=settings, training={"learning_rate": 0.0, "max_steps": 4})
        found[name] = allocation.history[0].scores
    idle = found["ranks"]["model.layers.1.mlp.up_proj"][1]
    assert abs(idle) > 1e-3
    for path, values in found["ranks"].items():
        for name in ("parameters", "modules"):
            assert [value - idle for value in values] == pytest.approx(found[name][path], abs=1e-5)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"schedule": when(r_max=3)}, r"schedule 'cubic', but now it is 'constant-budget'"),
        ({"budget": "ranks"}, "unit 'parameters'"),
    ],
)
def test_a_checkpoint_of_other_rounds_is_refused(run, tmp_path, now, message):
    training = {"save_strategy": "steps", "save_steps": 4}
    run(training=training, allocation={"schedule": down(2)})
    with pytest.raises(GatewiseError, match=rf"the checkpoint's rounds have {message}"):
        run(training=training, allocation={"schedule": down(2), **now}, resume=str(tmp_path / "run" / "checkpoint-4"))


def test_module_pruning_takes_whole_modules_for_good(run):
    """A score that hates one module and likes every other: the first round empties it, and it never comes back."""
    hated = "model.layers.1.mlp.down_proj"

    def score(model, batch, adapter=None):
        layers = slots.lora_layers(model, adapter)
        return {p: torch.full((len(slots.live_slots(la, adapter)),), -1.0 if p == hated else 1.0) for p, la in layers.items()}

    model, allocation, _ = run(
        allocation={"score": score, "module_pruning": True, "schedule": when(prune_fraction=4 / 42), "budget": "ranks"}
    )
    first = allocation.history[0]
    assert first.pruned[hated] == [0, 1, 2]
    assert sum(map(len, first.pruned.values())) == 4
    assert all(one.ranks[hated] == 0 and hated not in one.grown for one in allocation.history)
    assert hated not in slots.ranks(model)
    assert all(rank > 0 for rank in slots.ranks(model).values())
    assert model.get_base_model().get_submodule(hated).__class__ is torch.nn.Linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "luck"}, "score 'luck' is not known; expected one of ablation"),
        ({"score": 5}, "score is 5; expected a name, a function or"),
        ({"rule": 5}, "rule is 5; expected a function"),
        ({"schedule": "cubic"}, r"schedule is 'cubic'; expected gatewise.ConstantBudget"),
        ({"schedule": down(3), "budget": "ranks"}, "target_rank is 3 a module, 42 ranks in all, but the adapter starts with 42"),
        ({"schedule": down(0.05)}, "23 parameters in all, but the adapter starts with 1392 and keeps 40 "),
        ({"budget": "modules"}, "budget 'modules' is not known; expected one of parameters, ranks"),
        ({"schedule": down(1), "min_rank": 2}, r"464 parameters in all, but the adapter starts with 1392 and keeps 928 "),
        (
            {"min_rank": 3},
            "no module starts with more than 3 ranks, and min_rank, DoRA or trained biases keep 3 in each: no rank could",
        ),
        ({"module_pruning": True, "min_rank": 1}, "min_rank is 1, but module_pruning takes all"),
        (
            {"module_pruning": True, "rule": plan_round},
            "module_pruning is part of the papers' rule",
        ),
        ({"score": "path_integral", "score_options": {"points": 0}}, "points is 0; expected a whole number"),
        ({"schedule": when(r_max=2)}, "r_max is 2 but .* already has rank 3"),
    ],
)
def test_bad_settings_are_refused(run, settings, message):
    with pytest.raises(GatewiseError, match=message):
        run(allocation=settings)


def test_what_it_cannot_work_with_is_refused(adapted, examples, tmp_path, run):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", max_steps=1, use_cpu=True, disable_tqdm=True)
    base = adapted().get_base_model()
    with pytest.raises(GatewiseError, match="expected a PeftModel"):
        Trainer(model=base, args=arguments, callbacks=[RankAllocation()])
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GatewiseError, match=r"ready optimizer, which does not hold .*: call allocation\.prepare\(model\) before"):
        Trainer(model=model, args=arguments, callbacks=[RankAllocation()], optimizers=(optimizer, None))
    trainer = Trainer(model=adapted(), args=arguments, train_dataset=examples())
    trainer.add_callback(RankAllocation())
    with pytest.raises(GatewiseError, match="callbacks="):
        trainer.train()
    allocation = RankAllocation(validation_batch={"labels": torch.ones(1)})
    trainer = Trainer(model_init=lambda: adapted(), args=arguments, train_dataset=examples(), callbacks=[allocation])
    with pytest.raises(GatewiseError, match="not model_init"):
        trainer.train()
    _, _, trainer = run()
    with pytest.raises(GatewiseError, match="has finished"):
        trainer.train()


def test_grace_lets_new_ranks_live(run):
    """A score that values a rank by its B prunes what has just grown; a grace period keeps it for that long."""

    def by_size(model, batch, adapter=None):
        layers = slots.lora_layers(model, adapter)
        return {p: slots.factors(la, adapter)[1].detach().norm(dim=0)[slots.live_slots(la, adapter)] for p, la in layers.items()}

    def killed_young(history):
        pairs = itertools.pairwise(history)
        return sum(len(set(old.grown.get(p, [])) & set(dead)) for old, new in pairs for p, dead in new.pruned.items())

    _, churning, _ = run(allocation={"score": by_size, "schedule": when(r_max=6)})
    assert killed_young(churning.history) > 0
    _, calm, _ = run(allocation={"score": by_size, "schedule": when(r_max=6, grace_rounds=1)})
    assert sum(map(len, calm.history[0].grown.values())) > 0
    assert killed_young(calm.history) == 0


def test_diverged_training_stops(run):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    for layer in slots.lora_layers(kwargs["model"]).values():
                        layer.lora_B["default"].weight[:, 0] = float("nan")

    with pytest.raises(GatewiseError, match="diverged"):
        run(callbacks=[Break()])


def test_several_adapters_only_the_active_one_changes(adapted, run, tmp_path):
    model = adapted(trained=False)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    before = {name: value.clone() for name, value in model.state_dict().items() if ".default." in name}
    _, allocation, _ = run(model=model)
    assert allocation.budget == 2 * 2 * (16 + 16) + 2 * 2 * (16 + 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if ".default." in name)
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["second"])
    assert (tmp_path / "adapter" / "second" / "allocation.json").is_file()


def test_the_last_rank_of_the_model_is_left(run, caplog):
    """Two modules lose ranks in every round, so nothing grows: the budget shrinks, with a warning, but not to nothing."""
    with caplog.at_level(logging.WARNING, logger="gatewise"):
        model, allocation, _ = run(
            peft={"target_modules": ["q_proj"]},
            allocation={"schedule": when(rounds=8, first_round=2, recover=1.0 / 6, prune_fraction=0.5)},
        )
    assert sum(slots.ranks(model).values()) >= 1
    assert sum(allocation.history[-1].ranks.values()) < allocation.budget
    assert "gave back" in caplog.text


def test_an_adapter_saved_without_the_allocated_one_has_no_history(run, tmp_path):
    model, _, _ = run()
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "allocation.json").is_file()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "second", True, ["second"])
    assert not (tmp_path / "second" / "allocation.json").exists()
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "allocation.json").is_file()
    model.set_adapter("second")
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "left")
    assert not (tmp_path / "left" / "allocation.json").exists()


def test_what_transformers_would_not_load_again_is_refused(adapted, run, batch):
    model = get_peft_model(tiny_base("llama"), LoraConfig(r=3, target_modules="all-linear"), adapter_name="named")
    with pytest.raises(GatewiseError, match="only an adapter called 'default' of the best checkpoint, not 'named'"):
        run(model=model, training=BEST)
    with pytest.raises(GatewiseError, match="the Trainer has two RankAllocations"):
        run(callbacks=[RankAllocation(validation_batch=batch())])


def test_layers_that_cannot_be_trained_beside_a_sharded_base_are_refused(monkeypatch, run):
    """With two processes DeepSpeed stopped with an assertion in the first backward pass, FSDP2 when it saved a checkpoint."""
    monkeypatch.setattr("gatewise.allocation.callback.is_sharded", lambda model: True)
    for family, peft in (("llama", {"target_modules": ["embed_tokens", "q_proj"]}), ("mixtral", EXPERTS)):
        with pytest.raises(GatewiseError, match=r"embeddings or experts cannot be trained under FSDP2 and ZeRO-3"):
            run(family, peft=peft)


def test_an_adapter_that_is_not_trained_is_refused_before_training(run, examples, tmp_path):
    data = examples()
    held_out = {key: torch.stack([row[key] for row in data[:6]]) for key in data[0]}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )

    def trainer(active, frozen=False):
        torch.manual_seed(0)
        model = get_peft_model(tiny_base("llama"), LoraConfig(r=2, target_modules=["q_proj"], inference_mode=frozen))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(active, inference_mode=frozen)
        allocation = RankAllocation("taylor", when(), held_out, adapter=active)
        return model, Trainer(model=model, args=arguments, train_dataset=data, callbacks=[allocation])

    model, one = trainer("other")
    model.base_model.set_adapter("default")
    with pytest.raises(GatewiseError, match=r"adapter 'other' is not active, or frozen, when training begins"):
        one.train()
    with pytest.raises(GatewiseError, match=r"adapter 'default' is not active, or frozen, when training begins"):
        trainer("default", frozen=True)[1].train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {**data, "input_ids": data["input_ids"].tolist()}, r"validation_batch has lists .input_ids."),
        (lambda data: {**data, "labels": data["labels"][:2]}, r"unlike numbers of rows .*'labels': 2"),
        (lambda data: None, r"needs validation_batch"),
        (
            lambda data: [data, {**data, "labels": data["labels"].tolist()}],
            r"a batch of tensors with 'labels' to score the ranks on$",
        ),
        (lambda data: iter([data]), r"one or a list: a batch of tensors"),  # of which a second round would find nothing
        (lambda data: "rows.jsonl", r"a batch of tensors with 'labels' to score the ranks on$"),
    ],
)
def test_a_validation_batch_that_is_none_is_refused_before_training(run, batch, change, message):
    """Also for a cubic budget without rounds, whose pruning is done at the end of training."""
    with pytest.raises(GatewiseError, match=message):
        run(allocation={"validation_batch": change(batch(rows=6)), "schedule": down(2, rounds=0)})
