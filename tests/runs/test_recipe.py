"""The recipe: what is accepted, what is refused, and in which words."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.allocation.scores import DEFAULT, NAMES, as_score
from gatewise.errors import GatewiseError
from gatewise.runs.recipe import checked, load_recipe, recipe_as_yaml

MINIMAL = "method: alora\nmodel: smollm2-135m-instruct\ndata: {train: rows.jsonl, dev: 'sample:support-dev'}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def refusal(file: Path, more: str = "", overrides: tuple[str, ...] = (), instead: str | None = None) -> str:
    """What a recipe is refused with."""
    file.write_text(MINIMAL + more if instead is None else instead, encoding="utf-8")
    with pytest.raises(GatewiseError) as error:
        load_recipe(file, overrides)
    return str(error.value).replace(str(file), "my.yaml")


def test_a_minimal_recipe_gets_its_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert (recipe.method, recipe.task, recipe.dtype, recipe.device, recipe.seed) == ("alora", "causal", "auto", "auto", 0)
    assert (recipe.peft.r, recipe.peft.lora_alpha, recipe.peft.target_modules) == (8, 16, "all-linear")
    assert recipe.training.learning_rate == 2e-4


def test_relative_paths_are_the_recipes_and_names_stay(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "base").mkdir()
    elsewhere = file.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(file)
    assert recipe.data.train == str(file.parent / "rows.jsonl")
    assert recipe.data.dev == "sample:support-dev"
    assert recipe.model == "smollm2-135m-instruct"
    file.write_text(MINIMAL.replace("smollm2-135m-instruct", "base"), encoding="utf-8")
    assert load_recipe(file).model == str(file.parent / "base")
    # Typed on the command line, a path means what the shell completes it to.
    assert load_recipe(file, ["data.train=other.jsonl"]).data.train == str(elsewhere / "other.jsonl")


def test_labels_are_the_text_that_was_written(file: Path) -> None:
    labels = "labels: [10:30, 010, 2001-01-01, no, 1_0, 0x1F, 12]"
    file.write_text(MINIMAL.replace("}", f", {labels}}}"), encoding="utf-8")
    assert load_recipe(file).data.labels == ["10:30", "010", "2001-01-01", "no", "1_0", "0x1F", "12"]


def test_merge_keys_bring_the_keys_of_another_section_but_not_over_own_ones(file: Path) -> None:
    sections = "training: &run {max_steps: 7}\nsearch: {<<: *run, keep: 2}\nprompts: {<<: {tau: 0.5, phm: 4}, phm: 8}\n"
    file.write_text(MINIMAL.replace("alora", "spt") + sections, encoding="utf-8")
    recipe = load_recipe(file)
    assert (recipe.search.max_steps, recipe.search.keep) == (7, 2)
    assert (recipe.prompts.tau, recipe.prompts.phm) == (0.5, 8)


SUGGESTED = "{r: 1, lora_alpha: 2, rank_pattern: {}, alpha_pattern: {}, target_modules: [q_proj]}"
"""As ``gatewise inspect --suggest`` writes it."""


@pytest.mark.parametrize("section", ["peft", "allocation", "training"])
def test_an_empty_section_has_its_defaults(file: Path, section: str) -> None:
    plain = load_recipe(file)
    file.write_text(f"{MINIMAL}{section}:\n", encoding="utf-8")
    assert load_recipe(file) == plain


def test_numbers_and_words_mean_what_people_write(file: Path) -> None:
    file.write_text(
        MINIMAL + "training: {learning_rate: 1e-4}\ntemplate: {prompt: '{text}', labels: {no: bad, 0: fine}}\n", "utf-8"
    )
    recipe = load_recipe(file)
    assert recipe.training.learning_rate == 1e-4
    assert recipe.template.labels == {"no": "bad", "0": "fine"}


def test_written_out_it_reads_back_as_the_same_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["training.epochs=0.5", "allocation.recover=3", "peft.target_modules=[q_proj, v_proj]"])
    again = tmp_path / "sub" / "again.yaml"
    again.parent.mkdir()
    again.write_text(recipe_as_yaml(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    # The sections of its own method and task, and no others.
    assert recipe.model_dump().keys() >= {"template", "peft", "allocation", "training"}
    assert not recipe.model_dump().keys() & {"routing", "prompts", "adalora", "pointing"}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("spt", "search: {keep: 2, epochs: 1}\nprompts: {tau: 0.5}"),
        ("spt", "prompts: {prompt_layers: [5, 2]}"),
        ("spt", "prompts: {prompt_layers: last, keep: 3}"),
        ("spt", ""),
        ("prompt-tuning", "prompts: {init: random}"),
        ("prefix-tuning", "prompts: {num_prompt_tokens: 4}"),
    ],
)
def test_recipes_of_prompts_read_back(file: Path, tmp_path: Path, method: str, more: str) -> None:
    file.write_text(MINIMAL.replace("alora", method) + more, encoding="utf-8")
    recipe = load_recipe(file)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_as_yaml(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("peft: {lora_alfa: 3}", "my.yaml: peft.lora_alfa is not a known key (given 3); did you mean lora_alpha?"),
        ("learning_rate: 1e-4", "learning_rate is not a known key (given 0.0001); known here: method, model, task"),
        ("training: {workers: 2}", "training.workers is not a known key (given 2); known here: max_steps"),
        ("zzz:", "zzz is not a known key (given None)"),
        ("adalora: {beta1: 0.9}", "adalora is not a known key"),
        ("peft: {r: eight}", "my.yaml: peft.r: Input should be a valid integer, got 'eight'"),
        ("peft: {r: 8.0}", "peft.r: Input should be a valid integer, got 8.0"),
        ("peft: {r: true}", "peft.r: Input should be a valid integer, got True"),
        ("peft: {r: 010}", "peft.r: Input should be a valid integer, got '010'"),
        ("peft: {r: 0}", "peft.r: Input should be greater than 0, got 0"),
        ("training: {bf16: yes}", "training.bf16: Input should be a valid boolean, got 'yes'"),
        ("training: {learning_rate: .nan}", "training.learning_rate: Input should be a finite number"),
        ("training: 3", "training: Input should be a valid dictionary"),
        ("training: {optim: schedule_free_adamw}", "training.optim: Input should be 'adamw_torch', 'adamw_torch_fused', 'sgd'"),
        ("training: {lora_plus_ratio: 0.5}", "training.lora_plus_ratio: Input should be greater than or equal to 1, got 0.5"),
        ("quantization: fp4", "quantization: Input should be 'nf4' or 'int8', got 'fp4'"),
        ("device: gpu", "device: String should match pattern '^(auto|cpu|cuda"),
        ("task: clasification", "task is 'clasification', expected one of "),
        ("peft: {target_modules: []}", "peft.target_modules: expected 'all-linear' or a list of module names"),
        (
            "peft: {init_lora_weights: loftq}",
            "Input should be True, 'gaussian', 'eva', 'pissa', 'pissa_niter_16', 'olora', 'corda'",
        ),
        ("allocation: {budget: rank}", "allocation.budget: Input should be 'parameters' or 'ranks', got 'rank'"),
        ("allocation: {first_round: -1}", "allocation.first_round: expected a number above 0 (1.0 or 0.25: epochs;"),
        ("prompts: {prompt_layers: [3, 3]}", "expected a list of different layer numbers from 0, such as [3, 7], or first, last"),
        ("prompts: {prompt_layers: frist}", "or first, last, spread or random, got 'frist'"),
        ("search: {drop: 1}", "search.drop: Input should be less than 1, got 1"),
    ],
)
def test_wrong_keys_and_types_are_named_with_what_was_expected(file: Path, more: str, expected: str) -> None:
    method = ("method=spt",) if more.startswith(("prompts", "search")) else ()
    assert expected in refusal(file, more, method)


@pytest.mark.parametrize(
    ("more", "overrides", "expected"),
    [
        ("training: {max_steps: 5, epochs: 1}", (), "training.epochs cannot be given together with training.max_steps"),
        ("training: {load_best: true}", (), "training.load_best needs training.eval_every"),
        ("training: {eval_every: 2, best_by: accuracy}", (), "training.best_by is accuracy, which nothing goes by"),
        ("training: {early_stopping_patience: 2}", (), "training.early_stopping_patience needs training.eval_every"),
        (
            "training: {load_best: true, eval_every: 4, save_every: 6}",
            (),
            "training.save_every is 6, expected training.eval_every (4) or nothing",
        ),
        ("", ("data.held_out=0",), "data.held_out is 0, but method alora scores ranks on rows held out of data.train: give 32"),
        (
            "",
            ("data.dev=0.6", "data.test=0.5"),
            "data.test is 0.5 and data.dev 0.6: expected parts that leave some of data.train to",
        ),
        ("", ("data.dev=0.1", "data.dev_split=test"), "data.dev_split is for a data set, but data.dev is a part of data.train"),
        ("", ("data.group=customer",), "data.group says what stays together where data.dev or data.test is a part of data.train"),
        (
            "",
            ("data.columns={text: a, label: a}",),
            "data.columns is {'text': 'a', 'label': 'a'}: expected another column for each",
        ),
        ("", ("data.dev=1",), "data.dev: expected a file or another source of rows, or a part of data.train such as 0.1, got 1"),
        ("", ("data.test=[c.csv]",), "data.test: expected a file or another source of rows, or a part of data.train such as 0.1"),
        ("task: classification\ndtype: bfloat16", (), "dtype is bfloat16, expected auto or float32"),
        ("allocation: {init_r: 12}", (), "allocation.init_r is for the other schedule"),
        ("allocation: {schedule: cubic, init_r: 8}", (), "allocation.init_r is 8, expected more than peft.r (8)"),
        ("allocation: {schedule: cubic, r_max: 16}", (), "allocation.r_max is for the other schedule"),
        ("allocation: {schedule: cubic, prune_fraction: 0.2}", (), "allocation.prune_fraction is for the other schedule"),
        ("allocation: {r_max: 4}", (), "allocation.r_max is 4, expected at least peft.r (8)"),
        ("adalora: {init_r: 8}", ("method=adalora",), "adalora.init_r is 8, expected more than peft.r (8)"),
        ("peft: {use_rslora: true}", ("method=adalora",), "peft.use_rslora is true, but AdaLoRA"),
        ("prompts: {phm: 3}", ("method=spt",), "prompts.phm is 3, expected a divisor of prompts.bottleneck (64)"),
        ("prompts: {prompt_layers: spread}", ("method=spt",), "prompts.keep is missing: with prompt_layers: spread say how many"),
        (
            "prompts: {keep: 2}",
            ("method=spt",),
            "prompts.keep is for prompt_layers: first, last, spread, random; remove the key, sea",
        ),
        ("prompts: {prompt_layers: [1], keep: 1}", ("method=spt",), "remove the key, the list says which layers take a prompt"),
        ("prompts: {prompt_layers: [1]}\nsearch: {keep: 1}", ("method=spt",), "search goes without prompts.prompt_layers"),
        ("search: {max_steps: 3, epochs: 1}", ("method=spt",), "search.epochs cannot be given together with search.max_steps"),
        (
            "training: {gradient_checkpointing: true}",
            ("method=prefix-tuning",),
            "training.gradient_checkpointing is true, but prefix",
        ),
        ("task: classification\nquantization: nf4", (), "quantization is nf4, but task classification trains on the weights as"),
        ("quantization: int8", ("method=dora",), "quantization is int8, with which PEFT's DoRA does not run: take nf4"),
        ("quantization: int8", ("method=adalora",), "quantization is int8, with which PEFT's AdaLoRA does not run: take nf4"),
        ("training: {lora_plus_ratio: 4}", ("method=spt",), "training.lora_plus_ratio is for LoRA, which method spt is not"),
        (
            "peft: {init_lora_weights: pissa}",
            (),
            "peft.init_lora_weights is pissa, expected one of true, gaussian, eva with method al",
        ),
        ("peft: {init_lora_weights: eva}", ("method=milora",), "is eva, expected one of true, gaussian with method milora"),
        (
            "peft: {init_lora_weights: olora}\nquantization: nf4",
            ("method=lora",),
            "quantization is nf4, but peft.init_lora_weights changes the base's weights: leave one out",
        ),
        (
            "peft: {pattern: nowhere.json}",
            ("method=lora",),
            "peft.pattern: expected a file that `gatewise inspect ADAPTER --scores",
        ),
        *(
            (f"peft: {{pattern: {SUGGESTED}}}", (f"method={method}",), f"is given, but method {method} has ranks of its own: take")
            for method in ("alora", "pi-lora", "milora", "adalora")
        ),
        (
            f"peft: {{use_rslora: true, pattern: {SUGGESTED}}}",
            ("method=lora",),
            "is given with use_rslora or a start that has ranks",
        ),
        ("peft: {init_lora_weights: gaussian}", ("method=adalora",), "peft.init_lora_weights is for the other methods"),
    ],
)
def test_keys_that_contradict_each_other(file: Path, more: str, overrides: tuple[str, ...], expected: str) -> None:
    assert expected in refusal(file, more, overrides)


@pytest.mark.parametrize("setting", ["quantization=nf4", "training.optim=paged_adamw_8bit"])
def test_without_bitsandbytes_what_needs_it_is_refused(file: Path, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(file, [setting])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    key, value = setting.split("=")
    assert refusal(file, "", (setting,)).endswith(f"{key} is {value}, which needs bitsandbytes: pip install 'gatewise[quant]'")


def test_every_fault_has_a_line(file: Path) -> None:
    lines = refusal(file, instead="method: alora\nmodel: 3\n").splitlines()
    assert lines == ["my.yaml: model: Input should be a valid string, got 3", "my.yaml: data is missing"]
    said = refusal(file, instead="method: allora\nmodel: 3\n")
    assert said.startswith("my.yaml: method is 'allora', expected one of ")
    assert said.endswith("; did you mean alora?")
    assert refusal(file, instead="model: tiny\n").startswith("my.yaml: method is missing, expected one of lora, ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected keys such as 'method: alora' and 'model: ...', got None"),
        ("- a", "got ['a']"),
        ("a: [\n", "the recipe my.yaml cannot be read: while parsing"),
        ("method: lora\npeft: {r: 8, r: 4}", 'found duplicate key "r"'),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(file: Path, text: str, expected: str) -> None:
    assert expected in refusal(file, instead=text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"method: l\xf6ra\n")
    for path, said in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.yaml", "invalid start byte"),
    ):
        with pytest.raises(GatewiseError, match=said):
            load_recipe(path)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=1e-4", ("training", "learning_rate"), 1e-4),
        ("training.bf16=true", ("training", "bf16"), True),
        ("template.prompt=Text: {text}", ("template", "prompt"), "Text: {text}"),
        ("template.prompt='Text: {text}'", ("template", "prompt"), "Text: {text}"),
        ("template.prompt={text}", ("template", "prompt"), "{text}"),
        ("template.prompt=[Text] {text}", ("template", "prompt"), "[Text] {text}"),
        ("template={prompt: '{text}'}", ("template", "prompt"), "{text}"),
        ("template.prompt=Review {text} #topic", ("template", "prompt"), "Review {text} #topic"),
        ("template.prompt=Review\n{text}", ("template", "prompt"), "Review\n{text}"),
        ("task=", ("task",), "causal"),
        ("data.test_split=2", ("data", "test_split"), "2"),
        ("peft.target_modules=[q_proj]", ("peft", "target_modules"), ["q_proj"]),
        ("seed=7", ("seed",), 7),
    ],
)
def test_overrides_are_yaml(file: Path, override: str, key: tuple[str, ...], value: Any) -> None:
    found: Any = load_recipe(file, [override]).model_dump()
    for name in key:
        found = found[name]
    assert found == value


def test_one_end_of_a_run_replaces_the_other(file: Path) -> None:
    ends = "search: {keep: 2, epochs: 2}\ntraining: {epochs: 3}\n"
    file.write_text(MINIMAL.replace("alora", "spt") + ends, encoding="utf-8")
    training = load_recipe(file, ["training.max_steps=5"]).training
    assert (training.max_steps, training.epochs) == (5, None)
    recipe = load_recipe(file, ["search.max_steps=5", "training.epochs=1"])
    assert (recipe.search.max_steps, recipe.search.epochs, recipe.training.epochs) == (5, None, 1)
    assert load_recipe(file, ["training.max_steps=null"]).training.epochs == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_step=4", "my.yaml with its --set: training.max_step is not a known key (given 4); did you mean max_steps?"),
        ("training.batch_size=four", "my.yaml with its --set: training.batch_size: Input should be a valid integer, got 'four'"),
        ("method.x=1", "--set method.x: method is a single value, so it has no keys"),
        ("seed", "--set seed: expected KEY=VALUE with a dotted key"),
        ("a..b=1", "--set a..b=1: expected KEY=VALUE with a dotted key"),
        ("seed=[", "my.yaml with its --set: seed: Input should be a valid integer, got '['"),
        ("model=", "my.yaml with its --set: model is missing"),
    ],
)
def test_faults_in_overrides(file: Path, override: str, expected: str) -> None:
    assert refusal(file, overrides=(override,)).startswith(expected)


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [
        ("{max_steps: 7}", 100, 7),
        ("{epochs: 1, batch_size: 8}", 17, 3),
        ("{epochs: 2, batch_size: 8, gradient_accumulation: 2}", 17, 4),
        ("{epochs: 0.5, batch_size: 8}", 33, 3),
        ("{batch_size: 8}", 16, 6),
    ],
)
def test_steps_are_counted_as_the_trainer_counts(file: Path, training: str, rows: int, steps: int) -> None:
    file.write_text(f"{MINIMAL}training: {training}\n", encoding="utf-8")
    assert load_recipe(file).training.total_steps(rows) == steps


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe: Any = load_recipe(path)
    assert recipe.data.train.startswith("sample:")
    if section := getattr(recipe, "allocation", None):
        as_score(section.score, section.score_options)


# What people, YAML 1.1, YAML 1.2 or JSON take for something else than text.
_LIKE_SOMETHING_ELSE = [
    "1e3", "1E5", "-2e-4", ".5", "5.", "1_000", "0o7", "0x1F", "010", "12:30:00", "yes", "no", "on", "Off", "True", "null", "~", "",
    ".inf", ".nan", "2001-01-01", "2001-01-01 10:00:00", "=", "<<", "- a", "a: b", "# a", "'a'", '"', "{a}", "[a]", "a\nb", " a ",
    "&a", "*a",
    "!a", "%a", "@a", "`a`", "\ta", "a\x85b", "\u2028", "|", ">", "?", ": ", "\ufeff",
]  # fmt: skip
_TEXT = st.one_of(
    st.sampled_from(_LIKE_SOMETHING_ELSE),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.from_regex(r"[-+]?[0-9_.]{1,4}([eE][-+]?[0-9]{1,2})?", fullmatch=True),
)
_NUMBERS = st.one_of(st.floats(1e-12, 1e12), st.sampled_from([1e-5, 3e-3, 1.0, 1e16]))


@settings(max_examples=100, deadline=None)
@given(
    prompt=_TEXT,
    words=st.dictionaries(_TEXT, _TEXT, min_size=2, max_size=4),
    split=st.none() | _TEXT,
    excluded=st.none() | st.lists(_TEXT, max_size=3),
    options=st.dictionaries(_TEXT, st.none() | st.booleans() | st.integers() | _NUMBERS | _TEXT, max_size=3),
    rate=_NUMBERS,
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_text_it_holds_it_reads_back_as_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, words: Any, split: Any, excluded: Any, options: Any, rate: Any, seed: int
) -> None:
    recipe = checked(
        {
            "method": "alora",
            "model": "org/name",
            "seed": seed,
            "data": {"train": "sample:support-train", "dev": "sample:support-dev", "dev_split": split, "labels": list(words)},
            "template": {"prompt": prompt, "labels": words},
            "peft": {"exclude_modules": excluded},
            "allocation": {"score_options": options},
            "training": {"learning_rate": rate},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(recipe_as_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_every_score_is_known_and_a_new_one_is_one_new_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(file).allocation.score == DEFAULT
    for name in NAMES:
        assert load_recipe(file, [f"allocation.score={name}"]).allocation.score == name
    own = load_recipe(file, ["allocation.score=my_own:score", "allocation.rule=my_own:rule"]).allocation
    assert (own.score, own.rule) == ("my_own:score", "my_own:rule")
    said = refusal(file, overrides=("allocation.score=tailor",))
    assert "allocation.score: " in said
    # The names are those of the files in allocation/scores.
    monkeypatch.setattr("gatewise.allocation.method.NAMES", (*NAMES, "tailor"))
    assert load_recipe(file, ["allocation.score=tailor"]).allocation.score == "tailor"
