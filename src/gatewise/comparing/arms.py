"""The arms of a comparison: a recipe for each method, control and recipe file, alike in all but what is compared.

What all arms share comes from the recipe that is compared with: model, task, data, seed, precision, launch, and training but its
rates. An arm's own are the sections of its method. Where the recipe is of that method they are the recipe's; an arm of another
method has its method's defaults, on the recipe's modules and with its rank where the method has such. A recipe file brings its own
sections, and need say nothing of the rest.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict

from gatewise.errors import GatewiseError
from gatewise.models.loading import load_tokenizer
from gatewise.parts import DEFAULT_TASK, METHODS, TASKS
from gatewise.progress import quiet
from gatewise.runs.recipe import Recipe, by_key, changed, checked, load_recipe, read_tree, takes

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
_NOT_SHARED = ("method", "push_to_hub", "hub_private")  # nothing is uploaded

Tree = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One of what is compared.

    Attributes:
        name: of the method, the control or the recipe file.
        recipe: what is trained.
        told: what a reader of the comparison should know of it, in sentences that do not name it.
        parameters: the numbers that its adapter stores.
    """

    name: str
    recipe: Recipe
    told: tuple[str, ...] = ()
    parameters: int = 0


def arms_of(
    recipe: str | Path, names: Sequence[str], overrides: Sequence[str], say: Callable[[str], None], *, same_size: bool = True
) -> list[Arm]:
    """The arms of a comparison, as they are to be trained.

    Args:
        recipe: the file of what they share.
        names: methods, names in ``CONTROLS``, and recipe files.
        overrides: as of ``load_recipe``, each for all arms that have the key.
        say: tells the user something.
        same_size: set the size of each adapter (``Method.size_key``) so that it stores as much as the first arm's.

    Raises:
        GatewiseError: a name that stands for nothing or for two arms, or a recipe that is not in order.
    """
    if not names:
        raise GatewiseError("--methods names nothing to compare: expected methods, controls or recipe files")
    base = read_tree(recipe)
    for setting in overrides:
        if setting.partition("=")[0].strip() == "method":
            raise GatewiseError(f"--set {setting}: a comparison has the methods of --methods")
    shared = [setting for setting in overrides if takes(base, setting)]
    load_recipe(recipe, shared)  # refuses what no arm would see of it
    base = changed(base, shared)
    trees: dict[str, tuple[Tree, list[str]]] = {}
    for name in names:
        is_file = name not in CONTROLS and name not in METHODS
        called = Path(name).stem if is_file else name
        if called in trees:
            raise GatewiseError(
                f"--methods names {called} twice: an arm that is a recipe file has the file's name, so give it another"
            )
        trees[called] = _of_file(Path(name), base) if is_file else (_of_method(name, base), [])
    for setting in overrides:
        if not any(takes(tree, setting) for tree, _ in trees.values()):
            section = f"{setting.partition('.')[0]}="
            nearest = next((name for name, (tree, _) in trees.items() if takes(tree, section)), next(iter(trees)))
            checked(changed(trees[nearest][0], [setting]), f"--set {setting}, for arm {nearest}")
    recipes = {
        name: checked(_as_named(name, changed(tree, [one for one in overrides if takes(tree, one)])), f"arm {name}")
        for name, (tree, _) in trees.items()
    }
    for name, (_, told) in trees.items():
        fixed = [one for one in CONTROLS.get(name, ())[1:] if one not in overrides]
        set_too = {setting.partition("=")[0].strip() for setting in overrides}
        told += [f"keeps {one}, which makes it what it is" for one in fixed if one.partition("=")[0] in set_too]
    say("counting what each arm stores")
    first, *others = recipes
    stored = _Stored(recipes[first])
    target = stored(recipes[first])
    arms = [Arm(first, recipes[first], tuple(trees[first][1]), target)]
    for name in others:
        own, count, told = recipes[name], stored(recipes[name]), [*trees[name][1]]
        if same_size and count != target:
            own, count = _fitted(own, count, target, stored)
        key = METHODS[own.method](own).size_key
        if own is not recipes[name]:
            told.append(f"has {key} {_value(own, key)} and not {_value(recipes[name], key)}, to store as much as {first}")
        if abs(count - target) > 0.01 * target:
            told.append(f"stores {abs(count / target - 1):.0%} {'more' if count > target else 'less'} than {first}")
        arms.append(Arm(name, own, tuple(told), count))
    return arms


def _shared(base: Tree, method: str) -> Tree:
    """What the arms share, for an arm of this method."""
    own = METHODS[base["method"]].sections()
    tree = {key: value for key, value in base.items() if key not in _NOT_SHARED and key not in own}
    training = base.get("training") or {}
    return {**tree, "method": method, "training": {key: value for key, value in training.items() if key != "lora_plus_ratio"}}


def _of_method(name: str, base: Tree) -> Tree:
    """A method or a control."""
    method = CONTROLS.get(name, (name,))[0]
    tree, sections = _shared(base, method), METHODS[method].sections()
    if method == base["method"]:
        tree |= {key: base[key] for key in sections if key in base} | {"training": base.get("training")}
    else:
        tree |= _taken_over(base, method)
    return tree


def _as_named(name: str, tree: Tree) -> Tree:
    """With what makes a control what it is, whatever was set for all arms."""
    return changed(tree, CONTROLS.get(name, ())[1:])


def _taken_over(base: Tree, method: str) -> Tree:
    """What another method's arm has of the recipe that is compared with: modules, rank and scale."""
    kind, given = METHODS[method].sections().get("peft"), base.get("peft") or {}
    if kind is None:
        return {}
    keys = [*TAKEN_OVER, *(["use_rslora"] if METHODS[method].is_lora else [])]
    return {"peft": {key: given[key] for key in keys if key in given and key in kind.model_fields}}


def _of_file(path: Path, base: Tree) -> tuple[Tree, list[str]]:
    """A recipe file, which need not say what is shared, and what it says of that in vain."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        known = [*METHODS, *CONTROLS]
        near = difflib.get_close_matches(str(path), known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise GatewiseError(f"--methods {path}: expected a recipe file (.yaml), or one of {', '.join(known)}{hint}")
    own = read_tree(path)
    for key in ("model", "task"):
        theirs = base.get(key) or DEFAULT_TASK
        if own.get(key) not in (None, theirs):
            raise GatewiseError(f"{path} has {key} {own[key]}, but what it is compared with has {theirs}: arms share it")
    tree = _shared(base, str(own.get("method")))
    alone = checked({**tree, **own}, str(path))
    sections, rates = METHODS[alone.method].sections(), own.get("training") or {}
    tree |= _taken_over(base, alone.method) | {key: own[key] for key in sections if key in own}
    tree["training"] = {**tree["training"], **{key: rates[key] for key in RATES if key in rates}}
    shared = by_key(checked(tree, str(path)).model_dump())
    its_own: Any = {**dict.fromkeys([*_NOT_SHARED, *sections], True), "training": set(RATES)}
    said = by_key(alone.model_dump(exclude_unset=True, exclude=its_own))
    return tree, [
        f"{key} is {shared.get(key)}, as all arms have it, and not {mine} as in {path}"
        for key, mine in said.items()
        if mine != shared.get(key)
    ]


# What they store ------------------------------------------------------------------------------------------------------


class _Stored:
    """How many numbers the adapter of an arm stores: of its shapes alone, on one model that is loaded once."""

    def __init__(self, recipe: Recipe) -> None:
        self.task = TASKS[recipe.task](recipe.model_copy(update={"quantization": None}))
        self.task.read(None)
        self.bases: dict[bool, Any] = {}

    def __call__(self, recipe: Recipe) -> int:
        method, rows = METHODS[recipe.method](recipe), len(self.task.train)
        if method.trains_whole not in self.bases:
            dtype = torch.float32 if self.task.in_float32 else torch.bfloat16
            with quiet(bars=True):
                base: Any = self.task.base(dtype, load_tokenizer(recipe.model), ("pooler",) if method.trains_whole else ())
            self.bases[method.trains_whole] = base.to("meta")
        base = deepcopy(self.bases[method.trains_whole])
        steps = {"steps": recipe.training.total_steps(rows), "steps_per_epoch": recipe.training.steps_per_epoch(rows)}
        run: Any = SimpleNamespace(recipe=recipe, task=self.task, **steps)
        model = get_peft_model(base, method.saved_config(run, base))
        if model.active_peft_config.is_prompt_learning:  # which PEFT saves by way of its numbers
            return sum(value.numel() for value in model.parameters() if value.requires_grad)
        return sum(value.numel() for value in get_peft_model_state_dict(model, save_embedding_layers=False).values())


def _fitted(recipe: Recipe, now: int, target: int, stored: Callable[[Recipe], int]) -> tuple[Recipe, int]:
    """The recipe whose adapter stores the target, as nearly as the size of its method's adapter can be set, and what it stores."""
    method = METHODS[recipe.method](recipe)
    if method.size_key is None:
        return recipe, now

    def resized(size: int) -> Recipe:
        changes = [f"{key}={value}" for key, value in method.resized(size).items()]
        return checked(changed(recipe.model_dump(exclude_unset=True), changes), f"{recipe.method} with {method.size_key} {size}")

    # What is stored grows evenly with the size.
    size = _value(recipe, method.size_key)
    wanted = size + size * (target - now) / (stored(resized(2 * size)) - now)
    near = {int(min(max(1, one), method.largest_size or math.inf)) for one in (math.floor(wanted), math.ceil(wanted))}
    tried = [(recipe, now), *((one, stored(one)) for one in map(resized, sorted(near - {size})))]
    return min(tried, key=lambda one: abs(one[1] - target))


def _value(recipe: Recipe, key: str | None) -> int:
    """Of a key such as "peft.r"."""
    section, _, name = str(key).partition(".")
    return int(getattr(getattr(recipe, section), name))
