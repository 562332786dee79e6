"""The arms of a comparison: what they share, what is their own, and that each can be trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import write_recipe

from gatewise.adapters.lora import rank_settings, target_settings
from gatewise.comparing.arms import CONTROLS, Arm, arms_of, same_answers, same_size
from gatewise.errors import GatewiseError
from gatewise.parts import METHODS
from gatewise.runs.run import train


def arms(recipe: Path, *names: Any, overrides: tuple[str, ...] = ()) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(recipe, [*map(str, names)], overrides)}


def test_arms_share_everything_but_their_method(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, allocation=None)
    found = arms(
        recipe, *METHODS, *CONTROLS, overrides=("peft.r=1", "data.held_out=5", "prompts.num_prompt_tokens=2", "search.keep=1")
    )
    assert list(found) == [*METHODS, *CONTROLS]
    shared = {"model", "task", "data", "seed", "dtype", "launch"}
    first = found["lora"].recipe
    for name, arm in found.items():
        assert arm.recipe.model_dump(include=shared) == first.model_dump(include=shared)
        assert arm.recipe.training == first.training.model_copy(update={"lora_plus_ratio": 16 if name == "lora+" else None})
        peft = getattr(arm.recipe, "peft", None)
        # MiLoRA's gates add up to one over three modules, and AdaLoRA divides alpha by the two ranks that it starts with.
        alpha = {"milora": 12, "adalora": 8}.get(name, 4)
        assert peft is None or (peft.r, peft.lora_alpha, peft.lora_dropout) == (1, alpha, 0.1)
        assert any(f"has {alpha // 4} times the peft.lora_alpha" in one for one in arm.told) == (alpha != 4)
    assert found["random"].recipe.allocation == found["alora"].recipe.allocation.model_copy(update={"score": "random"})
    assert found["lora-ga"].recipe.peft.init_lora_weights == "lora_ga"
    assert found["prompt-tuning"].recipe.prompts.num_prompt_tokens == 2


def test_an_arm_has_the_scale_of_the_recipe_whichever_the_first_is(tmp_path: Path) -> None:
    peft = {"r": 2, "lora_alpha": 24}
    found = arms(write_recipe(tmp_path, "milora", peft=peft, routing={"top_k": 4}), "milora", "lora", "alora")
    assert [found[name].recipe.peft.lora_alpha for name in ("milora", "lora", "alora")] == [24, 6, 6]
    # What gates add that are probabilities is not known; a control of the scale keeps it.
    unknown = arms(write_recipe(tmp_path, "milora", peft=peft, routing={"normalize_gates": False}), "lora", "rslora")
    assert [arm.recipe.peft.lora_alpha for arm in unknown.values()] == [24, 24]
    assert arms(write_recipe(tmp_path, "milora", peft=peft), "rslora")["rslora"].recipe.peft.lora_alpha == 24


def test_a_scale_that_is_given_is_kept_and_told(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.yaml", tmp_path / "part.yaml"
    whole.write_text(json.dumps({"method": "milora", "peft": {"r": 2, "lora_alpha": 4}}))
    part.write_text(json.dumps({"method": "milora", "routing": {"top_k": 2}}))
    recipe = write_recipe(tmp_path)  # r of 2, alpha of 4
    found = arms(recipe, "lora", whole, part, "milora")
    assert [arm.recipe.peft.lora_alpha for arm in found.values()] == [4, 4, 8, 12]
    found = arms(recipe, "lora", "milora", overrides=("peft.lora_alpha=6",))
    assert found["milora"].recipe.peft.lora_alpha == 6
    assert found["milora"].told == ("adds 0.33 times as much with the peft.lora_alpha of --set",)


@pytest.mark.parametrize("method", ["milora", "adalora"])
def test_the_scale_is_that_of_the_first_at_another_rank_too(method: str, tmp_path: Path) -> None:
    first, other = same_size([*arms(write_recipe(tmp_path, peft={"r": 16, "lora_alpha": 32}), "lora", method).values()])
    scales = [METHODS[arm.recipe.method](arm.recipe).scale * arm.recipe.peft.lora_alpha for arm in (first, other)]
    assert scales == [2, pytest.approx(2, rel=0.05)]


def test_an_arm_of_the_recipes_own_method_has_its_sections(tmp_path: Path) -> None:
    section = {"rounds": 3, "score": "path_integral", "score_options": {"points": 2}}
    recipe = write_recipe(tmp_path, "alora", allocation=section, push_to_hub="me/mine")
    found = arms(recipe, "alora", "pi-lora", "random", "lora")
    assert [found[name].recipe.allocation.rounds for name in ("alora", "pi-lora", "random")] == [3, 8, 3]
    assert (found["random"].recipe.allocation.score, found["random"].recipe.allocation.score_options) == ("random", {})
    assert not hasattr(found["lora"].recipe, "allocation")
    assert found["alora"].recipe.push_to_hub is None


def test_a_recipe_file_brings_its_method_and_its_rates(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    own = {
        "method": "alora",
        "peft": {"r": 4},
        "allocation": {"budget": "ranks"},
        "training": {"max_steps": 8, "batch_size": 2, "learning_rate": 0.03, "lora_plus_ratio": 4},
    }
    file = tmp_path / "as-published.yaml"
    file.write_text(json.dumps(own))
    arm = arms(recipe, "lora", file)["as-published"]
    assert (arm.recipe.method, arm.recipe.peft.r, arm.recipe.allocation.budget) == ("alora", 4, "ranks")
    training = arm.recipe.training
    assert (training.learning_rate, training.lora_plus_ratio, training.batch_size) == (0.03, 4, 4)
    assert (arm.recipe.peft.lora_alpha, arm.recipe.peft.lora_dropout) == (16, 0)
    assert arm.told[:1] == (f"training.batch_size is 4, as all arms have it, and not 2 as in {file}",)
    file.write_text(json.dumps({"method": "alora", "allocation": {"rounds": 2}}))
    arm = arms(recipe, "lora", file)["as-published"]
    assert (arm.recipe.peft.r, arm.recipe.peft.lora_dropout, arm.recipe.training.learning_rate) == (2, 0.1, 0.01)
    file.write_text(json.dumps({"method": "alora", "allocation": {"schedule": "cubic", "init_r": 4}}))  # less than PEFT's r of 8
    assert arms(recipe, "lora", file)["as-published"].recipe.peft.r == 2
    for wrong, said in (
        ({"alocation": {}}, "alocation is not a known key"),
        ({"method": "dora"}, "allocation is not a known key"),
    ):
        file.write_text(json.dumps(own | wrong))
        with pytest.raises(GatewiseError, match=said):
            arms(recipe, "lora", file)


def test_what_a_file_leaves_to_defaults_is_told(tmp_path: Path) -> None:
    recipe, file = write_recipe(tmp_path, peft={"r": 2, "lora_alpha": 16, "lora_dropout": 0.1}), tmp_path / "two.yaml"
    file.write_text(json.dumps({"method": "lora", "peft": {"target_modules": ["q_proj"], "lora_dropout": 0.1}}))
    assert arms(recipe, "lora", file)["two"].told == (
        "has a peft of its own, whose r is 8, and not 2 as in the recipe",
    )  # and PEFT's alpha is the recipe's 16
    file.write_text(json.dumps({"method": "lora", "peft": None}))
    assert arms(recipe, "lora", file)["two"].recipe.peft.r == 8


def test_all_arms_learn_the_same_answers_of_a_conversation(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    alone, both = arms(recipe, "lora", "dora"), arms(recipe, "lora", "milora")
    assert same_answers([*alone.values()]) == [*alone.values()]
    lora, milora = same_answers([*both.values()])
    assert [arm.recipe.data.assistant for arm in (lora, milora)] == ["last", "last"]
    assert lora.told == ("learns the last answer of a conversation alone, as milora has to (data.assistant: last)",)
    assert milora.told == both["milora"].told
    said = arms(recipe, "lora", "milora", overrides=("data.assistant=last",))
    assert same_answers([*said.values()]) == [*said.values()]


@pytest.mark.parametrize("key", ["method", "seed"])
def test_what_a_comparison_has_several_of_is_not_set(tmp_path: Path, key: str) -> None:
    with pytest.raises(GatewiseError, match=f"--set {key}: a comparison has the {key}s of --{key}s"):
        arms(write_recipe(tmp_path), "lora", overrides=(f"{key}=7",))


def test_what_is_set_for_all_arms_holds_for_recipe_files_too(tmp_path: Path) -> None:
    recipe, file = write_recipe(tmp_path, data={"train": "train.jsonl", "dev": "dev.jsonl", "held_out": 0}), tmp_path / "file.yaml"
    file.write_text(json.dumps({"method": "alora", "task": "causal", "launch": {}, "training": {"max_steps": 8}}))
    same, other = (arms(recipe, file, overrides=("data.held_out=5", f"training.max_steps={n}"))["file"] for n in (8, 5))
    assert (same.told, same.recipe.training.max_steps) == ((), 8)
    assert other.told == (f"training.max_steps is 5, as all arms have it, and not 8 as in {file}",)


def test_controls_stay_what_they_are(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "alora", allocation=None)
    found = arms(recipe, "alora", "random", "lora+", overrides=("allocation.score=ablation", "allocation.score_options.mode=exact"))
    assert [found[name].recipe.allocation.score for name in ("alora", "random")] == ["ablation", "random"]


def test_ranks_from_a_file_are_kept_or_it_is_told(tmp_path: Path) -> None:
    pattern = {"target_modules": ["q_proj"], **rank_settings({"q_proj": 2}, {"q_proj": 2.0})}
    recipe = write_recipe(tmp_path, peft={"pattern": pattern})
    found = arms(recipe, "lora", "lora+", "dora", "alora", "spt")
    assert [bool(arm.told) for arm in found.values()] == [False, False, False, True, True]
    assert found["alora"].told == (f"has no peft.pattern, and so not the modules of {recipe}",)
    assert found["dora"].recipe.peft.pattern == pattern


def test_the_scale_of_other_methods_is_by_rank_too(tmp_path: Path) -> None:
    found = arms(write_recipe(tmp_path, peft={"r": 4, "use_rslora": True}), "lora", "dora", "adalora")
    assert [arm.recipe.peft.use_rslora for arm in found.values()] == [True, True, False]  # adalora has a scale of its own
    assert [arm.recipe.peft.lora_alpha for arm in found.values()] == [16, 16, 48]  # 16 / 2 = 48 / 6


@pytest.fixture(scope="module")
def every_arm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arm]:
    recipe = write_recipe(tmp_path_factory.mktemp("arms"), training={"max_steps": 2, "batch_size": 4})
    found = arms(recipe, *METHODS, *CONTROLS, overrides=("prompts.bottleneck=4", "search.keep=1", "search.max_steps=2"))
    return {arm.name: arm for arm in same_size([*found.values()])}


@pytest.mark.parametrize("name", [*METHODS, *CONTROLS])
def test_every_arm_trains_and_stores_what_was_counted(
    every_arm: dict[str, Arm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("attr" if name == "corda" else "peft")
    monkeypatch.setattr("gatewise.runs.run._drawn", lambda run, result, *_: result)
    arm = every_arm[name]
    recipe = arm.recipe
    if name == "adalora":
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 4})})
    result = train(recipe, tmp_path / "out", console=Console(quiet=True))
    stored = result.parameters["adapter"]
    if name in ("alora", "pi-lora", "random"):  # rounds are placed into a run of any length; what fits no rank is left of a budget
        assert json.loads((tmp_path / "out/adapter/allocation.json").read_text())["rounds"]
        assert 0 <= arm.parameters - stored < 40
    elif name == "adalora":  # its budget counts ranks
        assert abs(stored / arm.parameters - 1) < 0.05
    else:
        assert stored == arm.parameters


def test_arms_store_as_much_as_the_first(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, peft={"r": 16, "lora_alpha": 32})
    found = arms(recipe, "lora", *(METHODS.keys() - {"lora"}), *CONTROLS, overrides=("prompts.bottleneck=1", "search.keep=1"))
    found = {arm.name: arm for arm in same_size([*found.values()])}
    target = found["lora"].parameters
    for name, arm in found.items():
        near = abs(arm.parameters / target - 1)
        assert near < 0.01 or any(f"{near:.1%} " in line for line in arm.told), name
    assert found["lora-ga"].recipe.peft.r == 8
    scaled = found["dora"].recipe.peft
    assert scaled.r < 16
    assert scaled.lora_alpha == 2 * scaled.r
    assert found["alora"].told == ()


def test_heads_are_left_aside_where_sizes_are_compared(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lora", "bert", peft={"r": 1, "lora_alpha": 2})
    found = same_size(
        [*arms(recipe, "lora", "dora", "spt", "prompt-tuning", overrides=("prompts.bottleneck=1", "search.keep=1")).values()]
    )
    heads = 16 * 2 + 2
    assert [arm.heads for arm in found] == [heads] * 4
    first, dora, *_ = found
    more = (dora.parameters - first.parameters) / (first.parameters - heads)
    assert dora.told[-1] == (
        f"stores {dora.parameters:,} parameters, {more:.1%} more than lora's {first.parameters:,}, {heads} of heads left aside"
    )


@pytest.mark.parametrize(
    ("names", "overrides", "said"),
    [
        (("lora", "alroa"), (), "--methods alroa: expected a recipe file .*; did you mean alora?"),
        (("lora", "lora.yaml"), (), "--methods names lora twice: an arm that is a recipe file has the file's name"),
        (("lora", "lora"), (), "--methods names lora twice: leave one out"),
        (("lora,dora",), (), "--methods lora,dora: expected spaces between methods, and no comma"),
        (("lora", "spt"), ("peft.rr=1",), r"--set peft.rr=1, for arm lora: peft.rr is not a known key"),
        (("lora",), ("method=dora",), "--set method: a comparison has the methods of --methods"),
        (("milora",), ("training.lora_plus_ratio=4", "peft.init_lora_weights=eva"), "arm milora: peft.init_lora_weights is eva"),
    ],
)
def test_what_is_refused(tmp_path: Path, names: tuple[str, ...], overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(GatewiseError, match=said):
        arms(write_recipe(tmp_path), *names, overrides=overrides)


def test_a_recipe_file_with_the_name_of_a_method_is_refused_after_it_and_before_it(tmp_path: Path) -> None:
    (own := tmp_path / "lora.yaml").write_text(json.dumps({"method": "lora"}))
    for names in (("lora", own), (own, "lora")):
        with pytest.raises(GatewiseError, match="--methods names lora twice: an arm that is a recipe file has the file's name"):
            arms(write_recipe(tmp_path), *names)


def test_arms_that_differ_in_size_alone_are_refused(tmp_path: Path) -> None:
    recipe, larger = write_recipe(tmp_path), tmp_path / "larger.yaml"
    larger.write_text(json.dumps({"method": "lora", "peft": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}}))
    with pytest.raises(
        GatewiseError,
        match="arm larger is the same as lora once it stores as much as lora, and no sizes are compared: leave one out",
    ):
        same_size([*arms(recipe, "lora", larger).values()])
    larger.write_text(json.dumps({"method": "lora", "peft": {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1}}))  # another scale
    assert len(same_size([*arms(recipe, "lora", larger).values()])) == 2
    larger.write_text(json.dumps({"method": "lora", "training": {"max_steps": 400}}))
    with pytest.raises(
        GatewiseError, match=r"arm larger is the same as lora: leave one out \(training.max_steps is \d+, as all arms"
    ):
        same_size([*arms(recipe, "lora", larger).values()])
    with pytest.raises(GatewiseError, match="arm rslora is the same as lora: leave one out"):
        same_size([*arms(write_recipe(tmp_path, peft={"r": 2, "use_rslora": True}), "lora", "rslora").values()])


def test_b_learns_faster_in_all_arms_of_lora_where_it_does_in_the_recipe(tmp_path: Path) -> None:
    plain, own = tmp_path / "plain.yaml", tmp_path / "own.yaml"
    plain.write_text(json.dumps({"method": "lora", "peft": {"target_modules": ["q_proj"]}}))
    own.write_text(json.dumps({"method": "alora", "training": {"lora_plus_ratio": 2}}))
    names = ("lora", "dora", "random", "lora+", "spt", plain, own)
    found = arms(write_recipe(tmp_path, training={"max_steps": 4, "lora_plus_ratio": 8}), *names)
    assert [arm.recipe.training.lora_plus_ratio for arm in found.values()] == [8, 8, 8, 16, None, None, 2]  # a file has its own


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ranks_that_inspect_suggested_are_an_arm(method: str, tmp_path: Path) -> None:
    ends = ("q_proj", "v_proj", "down_proj")
    modules = [f"model.layers.{layer}.{'mlp' if end == 'down_proj' else 'self_attn'}.{end}" for layer in (0, 1) for end in ends]
    ranks = dict(zip(modules, (3, 1, 2, 1, 3, 1), strict=True))
    pattern = {"target_modules": modules, **rank_settings(ranks, dict.fromkeys(modules, 2.0))}
    (tmp_path / "pattern.json").write_text(json.dumps(pattern))
    file = tmp_path / "suggested.yaml"
    file.write_text(json.dumps({"method": method, "peft": {"pattern": "pattern.json"}}))  # in the file's own folder
    _, arm = same_size([*arms(write_recipe(tmp_path), "lora", file).values()])
    (tmp_path / "pattern.json").unlink()  # the recipe has what was in it
    done = train(arm.recipe, tmp_path / "out", console=Console(quiet=True))
    saved = load_file(done.adapter / "adapter_model.safetensors")
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(a)
        for name, a in saved.items()
        if "lora_A" in name
    }
    assert found == ranks
    assert arm.parameters == done.parameters["adapter"] == sum(one.numel() for one in saved.values())
    config = LoraConfig.from_pretrained(str(done.adapter))
    scales = {config.alpha_pattern.get(key, config.lora_alpha) / rank for key, rank in config.rank_pattern.items()}
    assert scales | {config.lora_alpha / config.r} == {2.0}
    deeper = ["model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj"]
    for whole in (False, True):  # as a list, and as a regular expression
        other = pattern | {"target_modules": target_settings(deeper, (), whole)["target_modules"]}
        (tmp_path / "pattern.json").write_text(json.dumps(other))
        with pytest.raises(GatewiseError, match=r"peft.pattern: 'model.layers.9.self_attn.q_proj' is no linear module of "):
            same_size([*arms(write_recipe(tmp_path), "lora", file).values()])
