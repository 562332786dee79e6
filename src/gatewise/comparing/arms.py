"""The arms of a comparison: a recipe for each method, control and recipe file, alike in all but what is compared.

What all arms share comes from the recipe that is compared with: model, task, data, seed, precision, launch, and training but its
rates. An arm's own are the sections of its method. Where the recipe is of that method they are the recipe's; an arm of another
method has its method's defaults, on the recipe's modules and with its rank and scale where the method has such, and B learns faster
than A where it does in the recipe. A recipe file brings its own sections, and need say nothing of the rest.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict

from gatewise.errors import GatewiseError
from gatewise.models.loading import load_tokenizer
from gatewise.parts import METHODS, TASKS, Task
from gatewise.progress import quiet
from gatewise.runs.recipe import Recipe, by_key, changed, checked, read_tree, takes

CONTROLS: dict[str, tuple[str, ...]] = {
    "random": ("alora", "allocation.score=random", "allocation.score_options=null"),
    "lora+": ("lora", "training.lora_plus_ratio=16"),
    "rslora": ("lora", "peft.use_rslora=true"),
    "eva": ("lora", "peft.init_lora_weights=eva"),
    "lora-ga": ("lora", "peft.init_lora_weights=lora_ga"),
    "pissa": ("lora", "peft.init_lora_weights=pissa"),
    "olora": ("lora", "peft.init_lora_weights=olora"),
    "corda": ("lora", "peft.init_lora_weights=corda"),
}
"""Name -> method, and its settings as ``--set`` has them."""
RATES = ("learning_rate", "lora_plus_ratio")
"""Of training, what an arm has of its own."""
TAKEN_OVER = ("r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout")
"""Of peft, what an arm of another method has from the recipe that is compared with."""

ROOM = 0.01
"""Arms whose parameters, heads aside, differ by more than this share are told of."""

Tree = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One of what is compared.

    Attributes:
        name: of the method, the control or the recipe file.
        recipe: what is trained.
        told: what a reader of the comparison should know of it, in sentences that do not name it.
        parameters: the numbers that its adapter stores, once they are counted.
        heads: how many of them are of heads, which are trained whole and alike in all arms.
    """

    name: str
    recipe: Recipe
    told: tuple[str, ...] = ()
    parameters: int = 0
    heads: int = 0


def arms_of(recipe: str | Path, names: Sequence[str], overrides: Sequence[str]) -> list[Arm]:
    """The arms of a comparison.

    Args:
        recipe: the file of what they share.
        names: methods, names in ``CONTROLS``, and recipe files.
        overrides: as of ``load_recipe``, each for all arms that have the key.

    Raises:
        GatewiseError: a name that stands for nothing or for two arms, or a recipe that is not in order.
    """
    base, arms = read_tree(recipe), dict[str, Arm]()
    keys = [setting.partition("=")[0].strip() for setting in overrides]
    for key in ("method", "seed"):
        if key in keys:
            raise GatewiseError(f"--set {key}: a comparison has the {key}s of --{key}s")
    base = changed(base, [setting for setting in overrides if takes(base, setting)])
    shared = checked(base, str(recipe))  # refuses what no arm would see of it
    base = {key: value for key, value in base.items() if key not in ("push_to_hub", "hub_private")}
    for given in names:
        is_file = given not in CONTROLS and given not in METHODS
        name = Path(given).stem if is_file else given
        if name in arms:
            is_again = names.count(given) > 1
            advice = "leave one out" if is_again else "an arm that is a recipe file has the file's name, so give it another"
            raise GatewiseError(f"--methods names {name} twice: {advice}")
        method, *fixed = CONTROLS.get(given, (given,))
        tree, told, own_scale = base, tuple[str, ...](), True
        if is_file:
            tree, told, own_scale = _of_file(Path(given), base)
        elif method != base["method"]:
            tree, own_scale = _shared(base, method), given == "rslora"
        if not is_file and (base.get("peft") or {}).get("pattern") and not (tree.get("peft") or {}).get("pattern"):
            told = (f"has no peft.pattern, and so not the modules of {recipe}",)
        tree = changed(changed(tree, [setting for setting in overrides if takes(tree, setting)]), fixed)
        arms[name] = Arm(name, checked(tree, f"arm {name}"), told)
        if not own_scale:
            arms[name] = _at_scale(arms[name], shared, is_set="peft.lora_alpha" in keys)
    first = next(iter(arms.values()))
    for setting in overrides:
        if not any(takes(vars(arm.recipe), setting) for arm in arms.values()):
            checked(changed(first.recipe.model_dump(exclude_unset=True), [setting]), f"--set {setting}, for arm {first.name}")
    return [*arms.values()]


def _shared(base: Tree, method: str) -> Tree:
    """What an arm has of a recipe of another method: all but its sections, of which modules, rank and scale stay."""
    sections, peft = METHODS[base["method"]].sections(), METHODS[method].sections().get("peft")
    tree: Tree = {key: value for key, value in base.items() if key not in sections}
    without = () if METHODS[method].is_lora else ("lora_plus_ratio",)
    tree |= {"method": method, "training": {key: one for key, one in (base.get("training") or {}).items() if key not in without}}
    if peft is not None:
        keys = [*TAKEN_OVER, *(["use_rslora"] if METHODS[method].is_lora else [])]
        keys += ["pattern"] if method in ("lora", "dora") else []  # the others have ranks of their own
        given = base.get("peft") or {}
        tree["peft"] = {key: given[key] for key in keys if key in given and key in peft.model_fields}
    return tree


def _at_scale(arm: Arm, shared: Recipe, is_set: bool) -> Arm:
    """An arm with such an alpha that its modules add as much as the recipe's. That of ``--set`` stays, and what it does is told."""
    own, theirs = METHODS[arm.recipe.method](arm.recipe).scale, METHODS[shared.method](shared).scale
    if own is None or theirs is None or math.isclose(own, theirs):
        return arm
    if is_set:
        return replace(arm, told=(*arm.told, f"adds {own / theirs:.2g} times as much with the peft.lora_alpha of --set"))
    alpha = max(1, round(shared.peft.lora_alpha * theirs / own))  # type: ignore[attr-defined]
    return replace(
        arm,
        recipe=checked(changed(arm.recipe.model_dump(exclude_unset=True), [f"peft.lora_alpha={alpha}"]), f"arm {arm.name}"),
        told=(*arm.told, f"has {theirs / own:.3g} times the peft.lora_alpha, so that its modules add about as much"),
    )


def _of_file(path: Path, base: Tree) -> tuple[Tree, tuple[str, ...], bool]:
    """A recipe file, which need not say what is shared; what it says of that in vain; and whether rank and alpha are its own."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        known = [*METHODS, *CONTROLS]
        if "," in str(path):
            raise GatewiseError(f"--methods {path}: expected spaces between methods, and no comma")
        near = "".join(f"; did you mean {one}?" for one in difflib.get_close_matches(str(path), known, n=1))
        raise GatewiseError(f"--methods {path}: expected a recipe file (.yaml), or one of {', '.join(known)}{near}")
    own = read_tree(path)
    lent = _shared(base, method) if (method := str(own.get("method"))) in METHODS else base
    alone = checked({key: lent[key] for key in ("model", "task", "data", "peft") if key in lent} | own, str(path))
    sections, rates = METHODS[alone.method].sections(), own.get("training") or {}
    tree = lent | {key: own[key] for key in sections if key in own}
    others = {key: value for key, value in tree["training"].items() if key != "lora_plus_ratio"}  # a file has its own, or none
    tree["training"] = others | {key: rates[key] for key in RATES if key in rates}
    shared = by_key(checked(tree, str(path)).model_dump())
    its_own: Any = {**dict.fromkeys(sections, True), "training": set(RATES)}
    said = by_key(alone.model_dump(exclude_unset=True, exclude=its_own))
    told = tuple(
        f"{key} is {shared.get(key)}, as all arms have it, and not {mine} as in {path}"
        for key, mine in said.items()
        if mine != shared.get(key)
    )
    peft = own.get("peft") or {}
    if peft and "pattern" not in peft:
        told += tuple(
            f"has a peft of its own, whose {key} is {shared[f'peft.{key}']}, and not {value} as in the recipe"
            for key, value in lent.get("peft", {}).items()
            if key not in peft and shared[f"peft.{key}"] != value
        )
    return tree, told, "peft" in own


def same_answers(arms: Sequence[Arm]) -> list[Arm]:
    """The arms on conversations: where one of them can learn their last answers alone, all do, unless the recipe says which."""
    those = [arm.name for arm in arms if METHODS[arm.recipe.method].reads_prompt]
    if not those or getattr(arms[0].recipe.data, "assistant", "all") is not None:
        return [*arms]
    told = f"learns the last answer of a conversation alone, as {those[0]} has to (data.assistant: last)"
    return [
        replace(
            arm,
            recipe=arm.recipe.model_copy(update={"data": arm.recipe.data.model_copy(update={"assistant": "last"})}),
            told=arm.told if arm.name in those else (*arm.told, told),
        )
        for arm in arms
    ]


# What they store ------------------------------------------------------------------------------------------------------


def same_size(arms: Sequence[Arm]) -> list[Arm]:
    """The arms, each set to store as much as the first, as nearly as its method can be set (``Method.size_key``).

    Raises:
        GatewiseError: two arms are then the same.
    """
    first, *others = arms
    task = TASKS[first.recipe.task](first.recipe.model_copy(update={"quantization": None}))
    task.read(None)
    sizes = partial(_sizes, task, {})
    target, heads = sizes(first.recipe)
    sized = [replace(first, parameters=target, heads=heads)]
    for arm in others:
        recipe, count = _fitted(arm.recipe, target, lambda recipe: sizes(recipe)[0])
        key, told = METHODS[recipe.method](recipe).size_key, [*arm.told]
        if recipe is not arm.recipe:
            told.append(f"has {key} {_size(recipe, key)} and not {_size(arm.recipe, key)}, to store as much as {first.name}")
        if twin := next((one.name for one in sized if one.recipe.model_dump() == recipe.model_dump()), None):
            size = "" if recipe is arm.recipe else f" once it stores as much as {first.name}, and no sizes are compared"
            why = f" ({'; '.join(arm.told)})" if arm.told else ""
            raise GatewiseError(f"arm {arm.name} is the same as {twin}{size}: leave one out{why}")
        if another := another_size(count, target, first.name, heads):
            told.append(another)
        sized.append(replace(arm, recipe=recipe, told=tuple(told), parameters=count, heads=heads))
    return sized


def another_size(count: int, than: int, first: str, heads: int) -> str | None:
    """What is told of an arm that stores ``count`` numbers where the first arm stores ``than``; None where they are about as many.

    Args:
        heads: how many of both are of heads, in which arms do not differ.
    """
    more = (count - than) / max(than - heads, 1)
    if abs(more) <= ROOM:
        return None
    aside = f", {heads:,} of heads left aside" if heads else ""
    return f"stores {count:,} parameters, {abs(more):.1%} {'more' if more > 0 else 'fewer'} than {first}'s {than:,}{aside}"


def _sizes(task: Task, bases: dict[bool, Any], recipe: Recipe) -> tuple[int, int]:
    """How many numbers the adapter of an arm stores, and how many of them are of heads: by shapes alone, the base loaded once."""
    method, rows = METHODS[recipe.method](recipe), len(task.train)
    if method.trains_whole not in bases:
        dtype = torch.float32 if task.in_float32 else torch.bfloat16
        with quiet(bars=True):
            whole: Any = task.base(dtype, load_tokenizer(recipe.model), ("pooler",) if method.trains_whole else ())
        bases[method.trains_whole] = whole.to("meta")
    base = deepcopy(bases[method.trains_whole])
    steps = {"steps": recipe.training.total_steps(rows), "steps_per_epoch": recipe.training.steps_per_epoch(rows)}
    run: Any = SimpleNamespace(recipe=recipe, task=task, **steps)
    model = get_peft_model(base, method.saved_config(run, base))
    wrapped: list[Any] = [part for part in model.modules() if isinstance(part, ModulesToSaveWrapper)]
    heads = sum(value.numel() for part in wrapped for value in part.modules_to_save.parameters())
    if model.active_peft_config.is_prompt_learning:  # which PEFT saves by way of its numbers
        return sum(value.numel() for value in model.parameters() if value.requires_grad), heads
    return sum(value.numel() for value in get_peft_model_state_dict(model, save_embedding_layers=False).values()), heads


def _fitted(recipe: Recipe, target: int, stored: Callable[[Recipe], int]) -> tuple[Recipe, int]:
    """The recipe whose adapter stores the target, as nearly as the size of its method's adapter can be set, and what it stores."""
    method, now = METHODS[recipe.method](recipe), stored(recipe)
    if method.size_key is None or now == target:
        return recipe, now

    def resized(size: int) -> Recipe:
        changes = [f"{key}={value}" for key, value in method.resized(size).items()]
        return checked(changed(recipe.model_dump(exclude_unset=True), changes), f"{recipe.method} with {method.size_key} {size}")

    # What is stored grows evenly with the size.
    size = _size(recipe, method.size_key)
    wanted = size + size * (target - now) / (stored(resized(2 * size)) - now)
    near = {int(min(max(1, one), method.largest_size or math.inf)) for one in (math.floor(wanted), math.ceil(wanted))}
    tried = [(recipe, now), *((one, stored(one)) for one in map(resized, sorted(near - {size})))]
    return min(tried, key=lambda one: abs(one[1] - target))


def _size(recipe: Recipe, key: str | None) -> int:
    return int(by_key(recipe.model_dump())[str(key)])
