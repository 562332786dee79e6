"""Recipes as YAML files: reading one with the changes of ``--set``, writing one, and what is said about wrong keys.

A wrong key is named with its path, what was expected and, for an unknown key, a known one of nearly the same name.
"""

import difflib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from gatewise.errors import GatewiseError
from gatewise.parts import DEFAULT_TASK, METHODS, Section, given
from gatewise.runs.recipe import Recipe, checked, owners, recipe_class

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe. A section without keys has its defaults.

    Args:
        path: the YAML file. Relative data files, and a model given as a folder, are taken from the file's own folder.
        overrides: ``"a.b=c"`` settings in YAML syntax that replace or add keys; where the key takes text, and where it is not
            valid YAML, the value is the text as it stands. ``max_steps`` replaces the file's ``epochs``, and the other way round.
            Their relative paths are taken from the working folder, where the one who types them is.

    Raises:
        GatewiseError: the file cannot be read, or a key is unknown, of a wrong type or at odds with another.
    """
    path = Path(path)
    tree = _read_file(path)
    _make_paths_absolute(tree, path.parent)
    changes = [Change.parse(setting) for setting in overrides]
    for change in changes:
        change.apply(tree, change.value())
    _drop_the_other_end(tree, {change.keys for change in changes})
    text_expected = _text_expected(tree) if changes else set()
    for change in changes:
        if change.keys in text_expected:
            change.apply(tree, change.text)
    try:
        return checked(tree)
    except ValidationError as error:
        raise GatewiseError("\n".join(_problems(error, tree, path, changes))) from None


def recipe_as_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that ``load_recipe`` reads back to an equal recipe."""
    stream = io.StringIO()
    _yaml().dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


# YAML -----------------------------------------------------------------------------------------------------------------

_NOT_TEXT = {
    "null": (r"(?:~|null|Null|NULL)?\Z", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)\Z", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z",
        list("-+.0123456789"),
    ),
    "merge": (r"<<\Z", ["<"]),
}
"""What stands for something else than text when it is not quoted, with the characters it can begin with."""


class _Resolver(VersionedResolver):
    """YAML 1.2 without its dates and its numbers such as 010, which are labels more often than anything else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for tag, (pattern, first) in _NOT_TEXT.items():
            self.add_version_implicit_resolver((1, 2), f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


class _Constructor(SafeConstructor):
    """Refuses a key given twice beside a merge key too, where SafeConstructor does not look."""

    def flatten_mapping(self, node: MappingNode) -> None:
        if node.merge is None:  # else it was flattened before, and has the keys of both
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, ScalarNode)):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        super().flatten_mapping(node)


class _Representer(SafeRepresenter):
    """Quotes text with the line breaks of other alphabets, which would be read back as spaces."""

    def represent_str(self, text: str) -> Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Constructor, yaml.Representer = _Resolver, _Constructor, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # said to be None, which sorts
    return yaml


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = _yaml().load(path)
    except OSError as error:
        raise GatewiseError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        where = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise GatewiseError(f"{where}: not valid YAML: {error.problem}") from None
    except YAMLError as error:
        raise GatewiseError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise GatewiseError(f"{path}: expected keys such as 'method: alora' and 'model: ...', got {given(tree)}")
    return tree


# The changes of --set -------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """What one ``--set KEY=VALUE`` asks for."""

    keys: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, setting: str) -> "Change":
        name, equals, text = setting.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            raise GatewiseError(f"--set {setting}: expected KEY=VALUE with a dotted key, such as --set training.learning_rate=1e-4")
        return cls(keys, text)

    def __str__(self) -> str:
        return f"--set {'.'.join(self.keys)}={self.text}"

    def value(self) -> Any:
        """The value as YAML. Text without quotes is the text as it stands, as is what is not valid YAML."""
        try:
            value = _yaml().load(self.text)
        except YAMLError:
            return self.text
        # YAML would end it at " #" and join its lines.
        return self.text.strip() if isinstance(value, str) and self.text.lstrip()[:1] not in tuple("'\"|>!&") else value

    def apply(self, tree: dict[str, Any], value: Any) -> None:
        """Puts a value into the tree, making the sections on the way."""
        part = value
        for key in reversed(self.keys):
            part = {key: part}
        _make_paths_absolute(part, Path())
        for depth, key in enumerate(self.keys[:-1], 1):
            part = part[key]
            if tree.get(key) is None:
                tree[key] = {}
            tree = tree[key]
            if not isinstance(tree, dict):
                raise GatewiseError(f"{self}: {'.'.join(self.keys[:depth])} is a single value ({given(tree)}), so it has no keys")
        tree.update(part)


def _text_expected(tree: dict[str, Any]) -> set[tuple[Any, ...]]:
    """The keys that take text and have something else: 'Review: {text}' and '{text}' are mappings in YAML."""
    try:
        checked(tree)
    except ValidationError as error:
        return {fault["loc"] for fault in error.errors() if fault["type"] == "string_type" and fault["input"] is not None}
    return set()


def _drop_the_other_end(tree: dict[str, Any], changed: set[tuple[str, ...]]) -> None:
    """Takes the file's own end of a run out where a change gives another kind of end."""
    for section in ("training", "search"):
        for end, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
            keys = tree.get(section)
            if (
                (section, end) in changed
                and (section, other) not in changed
                and isinstance(keys, dict)
                and keys.get(end) is not None
            ):
                keys.pop(other, None)


def _make_paths_absolute(tree: dict[str, Any], folder: Path) -> None:
    """Takes relative paths from a folder. What is no path (a sample, a data set's or a model's name) stays."""
    data, model = tree.get("data"), tree.get("model")
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("train", "dev", "test") and isinstance(value, str) and value.lower().endswith(DATA_SUFFIXES):
                data[key] = str((folder / Path(value).expanduser()).resolve())
    if isinstance(model, str) and model and (model.startswith((".", "~", "/")) or (folder / model).is_dir()):
        tree["model"] = str((folder / Path(model).expanduser()).resolve())


# What is wrong --------------------------------------------------------------------------------------------------------


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


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
    "multiple_of": "expected a multiple of {multiple_of}",
    "greater_than_equal": "expected a number of at least {ge}",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected a number of at most {le}",
    "too_short": "expected at least {min_length}",
}
_MISSING = {
    "method": f"expected {_either([*METHODS])}",
    "model": "expected an embedded model such as smollm2-135m-instruct, a folder or a hub name",
    "data": "expected a section with train and dev",
    "data.train": "expected a .jsonl, .json or .csv file, sample:NAME or a data set's name",
    "data.dev": "expected a .jsonl, .json or .csv file, sample:NAME or a data set's name, to measure on",
    "template.prompt": "expected text with the row's fields in braces, such as 'Review: {text}'",
}
_OTHER_NAMES = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "num_virtual_tokens": "num_prompt_tokens",
}
"""What people call some keys."""


def _problems(error: ValidationError, tree: dict[str, Any], path: Path, changes: Sequence[Change]) -> Iterator[str]:
    """One sentence for every fault, those of the file in the order of the schema."""
    recipe = recipe_class(tree.get("method"), tree.get("task"))
    for fault in error.errors(include_url=False):
        kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
        keys = tuple(str(key) for key in fault["loc"] if key != "[key]")
        if kind == "combination":
            keys = tuple(context["path"].split("."))
        name = ".".join(keys)
        if kind == "combination":
            text = f"{name} {context['problem']}"
        elif kind == "extra_forbidden":
            text = (
                _of_another_part(keys, tree) or f"{name} is not a known key (given {given(value)}){_known_keys_near(keys, recipe)}"
            )
        elif kind == "missing":
            text = f"{name} is missing: {_MISSING.get(name, 'expected a value')}"
        elif kind == "literal_error":
            choices = [choice.strip("\"' ") for choice in re.findall(r"'([^']*)'", context["expected"])]
            text = f"{name}: expected {_either(choices)}, got {given(value)}{_did_you_mean(_nearest(str(value), choices))}"
        elif kind in _EXPECTED:
            text = f"{name}: {_EXPECTED[kind].format(**context)}, got {given(value)}"
        else:
            text = f"{name}: {fault['msg']}"
        source = next((str(change) for change in changes if change.keys == keys[: len(change.keys)]), str(path))
        yield f"{source}: {text}"


def _of_another_part(keys: tuple[str, ...], tree: dict[str, Any]) -> str | None:
    """What to do with a key that other methods or tasks have."""
    if (found := owners(keys)) is None:
        return None
    kind, names = found
    remove = f"remove the section, or set {kind}: {names[0]}" if len(keys) == 1 else "remove the key"
    listed = f"{kind} {names[0]}" if len(names) == 1 else f"{kind}s {', '.join(names[:-1])} and {names[-1]}"
    return f"{'.'.join(keys)} is for {listed}, but the {kind} is {tree.get(kind) or DEFAULT_TASK}: {remove}"


def _known_keys_near(keys: tuple[str, ...], recipe: type[Recipe]) -> str:
    """A hint at the key that is meant, or else the keys that the section has."""
    section, key = ".".join(keys[:-1]), _OTHER_NAMES.get(keys[-1], keys[-1])
    by_section = [known.rpartition(".") for known in _all_keys(recipe)]
    siblings = [name for parent, _, name in by_section if parent == section]
    near = [".".join((*keys[:-1], name)) for name in _nearest(key, siblings)]
    # A key in the wrong section is as common as a misspelt one.
    near = near or [f"{parent}.{name}" for parent, _, name in by_section if name == key]
    return _did_you_mean(near) or f"; known here: {', '.join(siblings)}"


def _all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.75)


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
