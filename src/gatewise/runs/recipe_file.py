"""Reads a recipe from a YAML file, with a safe loader.

An unknown key, a wrong type or a combination that makes no sense is refused with the key's path, what was expected and, for a key
that is not known, the nearest one that is.

OmegaConf would take ``${...}`` in a prompt for its own, and pydantic-settings does not say where a wrong value came from.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from gatewise.errors import GatewiseError
from gatewise.runs.recipe import Method, Recipe, Section, given

DATA_SUFFIXES = (".jsonl", ".json", ".csv")
_ONE_OF = (("training", ("max_steps", "epochs")), ("search", ("max_steps", "epochs")))
"""Keys of a section of which one alone may be given."""


PATH_KEYS = (("data", "train"), ("data", "dev"), ("data", "test"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file. Relative data files, and a model given as a folder, are taken from the file's own folder.
        overrides: ``"a.b=c"`` settings in YAML syntax that replace or add keys; ``max_steps`` replaces the file's ``epochs``, and
            the other way round. Their relative paths are taken from the working folder, where the one who types them is.

    Raises:
        GatewiseError: the file cannot be read, or a key is unknown, of a wrong type or at odds with another.
    """
    path = Path(path)
    tree = _read_yaml(path)
    _anchor_paths(tree, path.parent)
    changed: list[tuple[tuple[str, ...], str]] = []
    for text in overrides:
        keys, part = _override(text)
        _anchor_paths(part, Path())
        _merge(tree, part, keys, text)
        changed.append((keys, text))
    _drop_what_is_replaced(tree, [keys for keys, _ in changed])
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise GatewiseError("\n".join(_problems(error, path, changed))) from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people expect it: 1e-4 is a number, only true and false are booleans, a key given twice is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float | bool) else id(key_node))
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where "1e-4" is text and "no" (a label, say) is a boolean.
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


class RecipeDumper(yaml.SafeDumper):
    """Quotes text that this file's reader, or one of YAML 1.1, would take for something else: 1e3, yes, 2001-01-01."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML breaks a line at these without saying so, and reads a plain line break or none.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


RecipeDumper.add_representer(str, _quoted)
RecipeDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_RecipeLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_RecipeLoader.yaml_implicit_resolvers}
}


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GatewiseError(f"the recipe {path} does not exist: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise GatewiseError(f"the recipe {path} cannot be read: {reason}") from None
    try:
        tree = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise GatewiseError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise GatewiseError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise GatewiseError(f"{path}: expected keys such as 'method: alora' and 'model: ...', got {given(tree)}")
    return tree


def _override(text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """``"a.b=c"`` as its keys and the nested mapping it stands for."""
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise GatewiseError(f"--set {text}: expected KEY=VALUE with a dotted key, such as --set training.learning_rate=1e-4")
    try:
        tree: Any = _parse(value)
    except yaml.YAMLError:
        raise GatewiseError(f"--set {text}: the value is not valid YAML: quote it, as in --set 'template.prompt=\"...\"'") from None
    for key in reversed(keys):
        tree = {key: tree}
    return keys, tree


def _merge(tree: dict[str, Any], part: dict[str, Any], keys: tuple[str, ...], text: str) -> None:
    """Puts the one value of an override into the tree, making the sections on the way."""
    for depth, key in enumerate(keys[:-1]):
        part = part[key]
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise GatewiseError(f"--set {text}: {'.'.join(keys[: depth + 1])} is a single value ({given(tree)}), so it has no keys")
    tree[keys[-1]] = part[keys[-1]]


def _drop_what_is_replaced(tree: dict[str, Any], changed: Sequence[tuple[str, ...]]) -> None:
    """Takes the file's own end of a run out where an override gives another kind of end."""
    for section, rivals in _ONE_OF:
        given_now = [key for key in rivals if (section, key) in changed and tree[section][key] is not None]
        for key in rivals:
            if given_now and (section, key) not in changed:
                tree[section].pop(key, None)


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a tree absolute. What is no path (a sample, a data set's or a model's name) stays."""
    data = tree.get("data")
    for section, key in PATH_KEYS:
        value = data.get(key) if section == "data" and isinstance(data, dict) else None
        if isinstance(value, str) and value.lower().endswith(DATA_SUFFIXES):
            data[key] = str((folder / Path(value).expanduser()).resolve())  # type: ignore[index]
    model = tree.get("model")
    if isinstance(model, str) and model and (model.startswith((".", "~", "/")) or (folder / model).is_dir()):
        tree["model"] = str((folder / Path(model).expanduser()).resolve())


# Refusals -------------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "list_type": "expected a list",
    "dict_type": "expected keys with values",
    "model_type": "expected a section with keys of its own",
    "model_attributes_type": "expected a section with keys of its own",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected a number of at least {ge}",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected a number of at most {le}",
    "too_short": "expected at least {min_length}",
}


def _problems(error: ValidationError, path: Path, overrides: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    """One sentence for every fault, those of the file in the order of the schema."""
    lines = []
    for fault in error.errors(include_url=False):
        context = fault.get("ctx", {})
        keys = tuple(str(key) for key in fault["loc"] if key != "[key]")
        if fault["type"] == "combination":
            keys, text = tuple(context["path"].split(".")), f"{context['path']} {context['problem']}"
        elif fault["type"] == "extra_forbidden":
            text = _unknown_key(keys, fault["input"])
        elif fault["type"] == "missing":
            text = f"{'.'.join(keys)} is missing: {_missing(keys)}"
        elif fault["type"] == "literal_error":
            choices = [str(choice).strip("'\" ") for choice in re.findall(r"'([^']*)'", context["expected"])]
            got = f"{given(fault['input'])}{_near(fault['input'], choices)}"
            text = f"{'.'.join(keys)}: expected {_either(choices)}, got {got}"
        elif fault["type"] in _EXPECTED:
            text = f"{'.'.join(keys)}: {_EXPECTED[fault['type']].format(**context)}, got {given(fault['input'])}"
        else:
            text = f"{'.'.join(keys)}: {fault['msg']}"
        source = next((f"--set {setting}" for at, setting in overrides if at == keys[: len(at)]), str(path))
        lines.append(f"{source}: {text}")
    return lines


_SHORT = {"lr": "learning_rate", "bs": "batch_size", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""What people call some keys."""


def _unknown_key(keys: tuple[str, ...], value: Any) -> str:
    parent, key = ".".join(keys[:-1]), keys[-1]
    everything = list(_known_keys(Recipe))
    siblings = [known.rpartition(".")[2] for known in everything if known.rpartition(".")[0] == parent]
    known = f"; known here: {', '.join(siblings)}"
    key = _SHORT.get(key, key)
    near = [".".join((*keys[:-1], word)) for word in difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)]
    # A key in the wrong section is as common as a misspelt one.
    near = near or [path for path in everything if path.rpartition(".")[2] == key]
    if near:
        known = ""
    else:
        near = [".".join((*keys[:-1], word)) for word in difflib.get_close_matches(key, siblings, n=1, cutoff=0.3)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{'.'.join(keys)} is not a known key (given {given(value)}){known}{hint}"


def _known_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _known_keys(kind, f"{prefix}{name}.")


def _missing(keys: tuple[str, ...]) -> str:
    return {
        ("method",): f"expected {_either(get_args(Method))}",
        ("model",): "expected an embedded model such as smollm2-135m-instruct, a folder or a hub name",
        ("data",): "expected a section with train and dev",
        ("data", "train"): "expected a .jsonl, .json or .csv file, sample:NAME or a data set's name",
        ("data", "dev"): "expected a .jsonl, .json or .csv file, sample:NAME or a data set's name, to measure on",
        ("template", "prompt"): "expected text with the row's fields in braces, such as 'Review: {text}'",
    }.get(keys, "expected a value")


def _near(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
