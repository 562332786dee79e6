"""Writes docs/reference from the code: commands, recipe keys, the Python API, and what fits with what.

    python tools/reference.py

Its pages are committed: guides link to them on GitHub too, `make docs` needs no PyTorch, and a change of a default is seen in its
diff. `tests/test_reference.py` holds them to the code.
"""

import ast
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent, indent
from types import FunctionType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import gatewise_mdt
import torch
import typer.main
from safetensors.torch import save_file

import gatewise
from gatewise.adapters.files import read_lora
from gatewise.bilevel.trainer import BilevelMixin
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.internals.zero import _NOT_WITH_STAGE_3
from gatewise.parts import DEFAULT_TASK, METHODS, TASKS, Section
from gatewise.runs.launch import SHARED_BY, STRATEGIES
from gatewise.runs.recipe import Recipe, checked
from gatewise.runs.run import check_sharing
from gatewise.runs.schema import recipe_schema
from gatewise.serving.engines import serving_settings
from gatewise.serving.server.catalogue import kind_of
from gatewise.serving.server.with_vllm import _not_in_vllm

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- Made by tools/reference.py: change the code, and run it again. -->\n\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(re.sub(r"\s+", " ", one).replace("|", "\\|") for one in line) + " |\n" for line in lines)


def prose(text: str) -> str:
    """A docstring's words as Markdown, with links to the pages that it names."""
    text = re.sub(r":\w+:(?=`)", "", text)
    return re.sub(r"(?<![\w/])docs/([\w/]+\.md)", r"[\1](../\1)", text)


# Commands -------------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    made = [
        MADE,
        "# Commands\n\nAll commands with all options, as `gatewise COMMAND --help` shows them. What you can mend ends in one "
        "sentence and\nexit code 2, an interruption in 130. `gatewise --install-completion` has the shell complete them.\n",
    ]
    for name, command in leaves(typer.main.get_command(app), "gatewise"):
        about, *examples = re.split(r"\n\n\x08\n", inspect.cleandoc(command.help or ""))
        made.append(f"\n## {name}\n\n{prose(about)}\n")
        for example in examples:
            title, _, lines = example.partition("\n")
            made.append(f"\n{title}\n\n{indent(dedent(lines), '    ')}\n")
        kinds = get_type_hints(inspect.unwrap(command.callback))
        rows = [
            [f"`{spelled(one, kinds.get(one.name))}`", *meaning_and_default(one)]
            for one in command.params
            if not getattr(one, "hidden", False)
        ]
        if rows:
            made.append("\n" + table(["", "what it does", "default"], rows))
    return "".join(made)


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands that run something, with their full names."""
    if not hasattr(command, "commands"):
        yield name, command
    for inner, one in getattr(command, "commands", {}).items():
        yield from leaves(one, f"{name} {inner}")


def spelled(parameter: Any, kind: Any) -> str:
    """An argument or option as it is typed."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or value_of(kind)}"


def value_of(kind: Any) -> str:
    """What stands for a value of this type."""
    kinds = [kind, *(inner for one in get_args(kind) for inner in (one, *get_args(one)))]
    for one in kinds:
        if get_origin(one) is Literal:
            return "|".join(map(str, get_args(one)))
        if isinstance(one, type) and issubclass(one, Enum):
            return "|".join(str(member.value) for member in one)
    return next((word for one, word in ((Path, "PATH"), (int, "NUMBER"), (float, "NUMBER")) if one in kinds), "TEXT")


def meaning_and_default(parameter: Any) -> list[str]:
    """What its help says, and what is taken where it is left out: that is in some helps, where it is no single value."""
    told, _, default = (parameter.help or "").partition(" [default: ")
    value = getattr(parameter.default, "value", parameter.default)
    if isinstance(value, str | int | float | Path) and value is not False and parameter.show_default is not False:
        default = f"`{value}`]"
    elif isinstance(parameter.show_default, str):
        default = f"{parameter.show_default}]"
    rest = default.partition("]")[2]
    return [prose(told + rest), "needed" if parameter.required else default.partition("]")[0]]


# Recipes --------------------------------------------------------------------------------------------------------------


def recipes_page() -> str:
    """Every key of a recipe with its type, its default and what it means."""
    schema = recipe_schema()
    made = [
        MADE,
        "# Recipe keys\n\nAll keys of a recipe, by section. A section belongs to the methods or tasks below its heading, and is "
        "refused with\nothers. Where a key is for some of them alone, or has another default with them, its row says so. "
        "A recipe is YAML 1.2: `no` and `10:30` are text,\nand `<<:` merges. Relative files are taken from its folder.\n",
    ]
    fields = Recipe.model_fields
    plain = [name for name, one in fields.items() if not (inspect.isclass(one.annotation) and issubclass(one.annotation, Section))]
    made.append("\n## At the top\n\n")
    described = {name: {**schema["properties"][name], "description": fields[name].description} for name in plain}
    described["task"]["default"] = DEFAULT_TASK
    needed = [name for name in plain if fields[name].is_required()]
    made.append(table(["key", "type", "default", "meaning"], [row("", key, one, key in needed) for key, one in described.items()]))
    for name, kinds in sections().items():
        everyone = {owner for owners in kinds.values() for owner in owners}
        made.append(f"\n## {name}\n\n{prose(about_sections(kinds))}\n\n")
        found: dict[tuple[str, ...], list[str]] = {}
        for kind, owners in kinds.items():
            definition = schema["definitions"][kind.__qualname__]
            for key, one in definition["properties"].items():
                needs_it = key in definition.get("required", ())
                found.setdefault(tuple(row(f"{name}.", key, one, needs_it)), []).extend(owners)
        rows = [
            [*line[:3], line[3] if set(owners) == everyone else f"*{', '.join(owners)}:* {line[3]}"]
            for line, owners in found.items()
        ]
        keys = [line[0] for line in rows]
        rows.sort(key=lambda line, keys=keys: keys.index(line[0]))
        made.append(table(["key", "type", "default", "meaning"], rows))
    return "".join(made)


def sections() -> dict[str, dict[Any, list[str]]]:
    """Section -> its models, with the methods or tasks that have each; none for those of every recipe."""
    found: dict[str, dict[Any, list[str]]] = {}
    for parts_of in ({name: TASKS[name] for name in sorted(TASKS)}, METHODS):
        for owner in parts_of:
            for name, kind in parts_of[owner].sections().items():
                found.setdefault(name, {}).setdefault(kind, []).append(owner)
    for name in ("training", "launch"):
        found[name] = {Recipe.model_fields[name].annotation: []}
    order = ["data", "template", "peft", "training", "launch"]
    return dict(sorted(found.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))


def about_sections(kinds: Mapping[Any, Sequence[str]]) -> str:
    """Whose section it is, and what it says, once for each of its models."""
    return "\n\n".join(
        (f"**{', '.join(owners)}**: " if owners else "") + re.sub(r"\s+", " ", inspect.getdoc(kind) or "")
        for kind, owners in kinds.items()
    )


def row(section: str, key: str, one: Mapping[str, Any], needed: bool) -> list[str]:
    """The row of a key, from its schema."""
    options = [part for part in one.get("anyOf", [one]) if part.get("type") != "null"]
    found = next((part for part in (one, *options) if "default" in part), {})
    default = found.get("default")
    shown = "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`".replace('"', "")
    description = one.get("description") or next((part["description"] for part in options if "description" in part), "")
    kinds = " or ".join(dict.fromkeys(type_in_words(part) for part in options))
    return [f"`{section}{key}`", kinds, "needed" if needed else shown, prose(description)]


def type_in_words(one: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "enum" in one:
        return ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in one["enum"] if value is not None)
    kind = one.get("type")
    if isinstance(kind, list):
        return " or ".join(type_in_words({"type": part}) for part in kind if part != "null")
    if kind == "array":
        return f"list of {type_in_words(one.get('items', {}))}"
    if kind == "object":
        return "mapping"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}.get(
        str(kind), "anything"
    )
    low, high = one.get("minimum", one.get("exclusiveMinimum")), one.get("maximum", one.get("exclusiveMaximum"))
    if low is not None and kind in ("integer", "number"):
        words += f" {'from' if 'minimum' in one else 'above'} {low}"
        if high is not None:
            words += f" {'to' if 'maximum' in one else 'to below'} {high}"
    return words


# Python ---------------------------------------------------------------------------------------------------------------


BY_IMPORT = {
    "gatewise.compress": ("compress", "Goal", "Recovery", "Compressed"),
    "gatewise.inspection": ("read_budget", "BudgetMap", "plot", "read_prompts", "plot_prompts", "route_data", "plot_routing"),
    "gatewise.parts": ("Method", "Task", "Run", "Report", "Measured"),
}
"""Public modules that ``import gatewise`` does not name, with what is public of them."""
STABLE = {
    "gatewise.adapters": ("read_note", "NOTE_FILE", "fingerprint", "load_adapter", "load_as_trained"),
    "gatewise.allocation.slots": ("lora_layers", "factors", "by_slot", "live_mask", "live_slots"),
    "gatewise.checks": ("is_whole", "is_number", "HALF_A_PAIR", "has_half_a_pair", "printable", "writable"),
    "gatewise.errors": ("GatewiseError", "reason_of", "some"),
    "gatewise.files": (
        *("whole_file", "whole_folder", "check_new_file", "check_new_folder", "content_of", "is_one_file", "is_special", "finite"),
        *("write_json", "write_json_lines", "sync_to_disk"),
    ),
    "gatewise.flags": ("OUT", "BaseOption", "DeviceOption", "JsonOption"),
    "gatewise.losses": ("base_of", "mean_loss"),
    "gatewise.models": ("ModelAround", "load_model", "attention_implementation", "most_tokens"),
    "gatewise.parts": (
        *("Method", "Task", "Run", "Report", "Measured", "Features", "Counting", "Section", "DataSection"),
        *("Count", "Positive", "NotNegative", "Fraction", "Share"),
    ),
    "gatewise.progress": ("ConsoleProgress", "quiet"),
    "gatewise.tasks": (
        "Records",
        "Template",
        "PadCollator",
        "prompt_ids",
        "generate_ids",
        "end_ids",
        "measuring",
        "most_positions",
    ),
}
"""What other packages may use beside that: `mdt/tests/test_rooms.py` holds gatewise-mdt to it."""


def python_page() -> str:
    """The public names of gatewise, with their arguments and what they do, from their docstrings."""
    about = (
        "# Python API\n\nThe public names with their docstrings, as `gatewise.NAME` after `import gatewise`. How they go "
        "together: [in your own\nscript](../guides/trainer.md), [extend it](../guides/extend.md). What reads adapters and data "
        "from disk, inspects or compresses\nneeds `pip install '.[cli]'`; the rest needs `pip install .` alone.\n\n## gatewise\n"
    )
    shown = {id(getattr(gatewise, name)) for name in gatewise.__all__}
    made, modules = [MADE, about], [name for name in gatewise.__all__ if inspect.ismodule(getattr(gatewise, name))]
    made.extend(entry(f"gatewise.{name}", getattr(gatewise, name)) for name in gatewise.__all__ if name not in modules)
    for name in modules:
        module = getattr(gatewise, name)
        made.append(f"\n## gatewise.{name}\n\n{said_by(module)}\n")
        inner = {one: getattr(module, one) for one in public(module)}
        made.extend(entry(f"gatewise.{name}.{one}", value) for one, value in inner.items() if id(value) not in shown)
    for path, names in BY_IMPORT.items():
        module = import_module(path)
        made.append(f"\n## {path}\n\n{said_by(module)}\n")
        made.extend(entry(f"{path}.{name}", getattr(module, name)) for name in names)
    made.append(
        "\n## For packages built on gatewise\n\nWhat such a package may use beside the names above, by import. All other modules "
        "may change at any time.\n\n"
    )
    rows = [
        [f"`{path}`", f"`{name}`", about_name(getattr(import_module(path), name))]
        for path, names in STABLE.items()
        for name in names
    ]
    made.append(table(["module", "name", "what it is"], rows))
    return "".join(made)


def about_name(value: Any) -> str:
    """The first sentence of a docstring, or the value of a constant."""
    if isinstance(value, str):
        return f"`{value}`"
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return ""
    first = " ".join(own_docstring(value).split("\n\n")[0].split())
    return prose(re.split(r"(?<=\.) (?=[A-Z`])", first)[0])


def trees_page() -> str:
    """The public names of gatewise_mdt."""
    about = "# Python API of decision trees\n\nThe public names of `gatewise_mdt` with their docstrings.\n"
    return "".join([MADE, about, *(entry(f"gatewise_mdt.{name}", getattr(gatewise_mdt, name)) for name in gatewise_mdt.__all__)])


def public(module: Any) -> list[str]:
    """The names of a module that are meant for others: those it lists, or those that it defines and does not hide."""
    listed = getattr(module, "__all__", None)
    own = [name for name, one in vars(module).items() if getattr(one, "__module__", None) == module.__name__ and callable(one)]
    return sorted(listed or [name for name in own if not name.startswith("_")])


def said_by(one: Any) -> str:
    """A docstring as Markdown: its headings are in italics, and what each explains is a list."""
    lines: list[str] = []
    in_list = False
    for line in own_docstring(one).splitlines():
        if re.fullmatch(r"(Args|Raises|Returns|Attributes|Yields):", line):
            lines += [f"*{line}*", ""]
            in_list = line not in ("Returns:", "Yields:")
        elif in_list and re.match(r"    \S", line):
            lines.append("- " + re.sub(r"^([\w, *]+):(?= )", r"`\1`:", line.strip()))
        elif in_list and line.startswith("        "):
            lines[-1] += " " + line.strip()
        else:
            in_list = in_list and not line
            lines.append(line.strip() if "*Returns:*" in lines or "*Yields:*" in lines else line)
    return prose("\n".join(lines).strip())


def own_docstring(one: Any) -> str:
    """A docstring that stands in the source: none that is inherited from a library, or made of a dataclass's fields."""
    made = inspect.isclass(one) and (one.__doc__ or "").startswith(f"{one.__name__}(")
    return "" if made else inspect.cleandoc(one.__doc__ or "")


def entry(path: str, value: Any) -> str:
    """A name with its arguments and its docstring; nothing for constants and types."""
    code = getattr(value, "function", value)  # of a score
    if not (inspect.isclass(code) or inspect.isfunction(code)) or not code.__module__.startswith("gatewise"):
        return ""
    made = f"\n### {path}\n\n"
    given = arguments(code.__init__, drop=1) if inspect.isclass(code) and "__init__" in vars(code) else arguments(code)
    if given or not inspect.isclass(code):
        made += indent(called(path, given), "    ") + "\n\n"
    made += said_by(code) + "\n"
    verbs = {name: one for name, one in vars(code).items() if not name.startswith(("_", "on_"))} if inspect.isclass(code) else {}
    told = []
    for name, one in verbs.items():
        if isinstance(one, FunctionType | classmethod | staticmethod) and (said := own_docstring(getattr(code, name))):
            given = arguments(getattr(code, name), 0 if isinstance(one, staticmethod) else 1)
            first = " ".join(re.split(r"\n\n", said)[0].split())
            told.append(f"- `{name}({', '.join(given)})`: {prose(first)}\n")
    return made + ("\n*Methods:*\n\n" + "".join(told) if told else "")


def called(path: str, given: Sequence[str]) -> str:
    """A call with its arguments, one a line where they are many."""
    line = f"{path}({', '.join(given)})"
    return line if len(line) <= 100 else f"{path}(\n" + "".join(f"    {one},\n" for one in given) + ")"


def arguments(function: Any, drop: int = 0) -> list[str]:
    """The arguments of a function, as its source has them, so that they are the same under every Python."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    try:
        [found] = ast.parse(dedent(inspect.getsource(function))).body
    except OSError:  # of a dataclass
        return []
    if not isinstance(found, ast.FunctionDef):
        return []
    every, defaults = found.args.args, found.args.defaults
    padded: list[ast.expr | None] = [*[None] * (len(every) - len(defaults)), *defaults]
    listed = [spelled_out(one, default) for one, default in zip(every, padded, strict=True)][drop:]
    if found.args.vararg:
        listed.append("*" + ast.unparse(found.args.vararg))
    elif found.args.kwonlyargs:
        listed.append("*")
    listed += [spelled_out(one, default) for one, default in zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True)]
    return listed + (["**" + ast.unparse(found.args.kwarg)] if found.args.kwarg else [])


def spelled_out(argument: ast.arg, default: ast.expr | None) -> str:
    """An argument as it stands in a signature."""
    equals = " = " if argument.annotation else "="
    return ast.unparse(argument) + (equals + ast.unparse(default) if default else "")


# What fits ------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "`quantization: nf4`": {"quantization": "nf4"},
    "`quantization: int8`": {"quantization": "int8"},
    "`training.lora_plus_ratio`": {"training": {"lora_plus_ratio": 16}},
    "`training.gradient_checkpointing`": {"training": {"gradient_checkpointing": True}},
    "`peft.use_rslora`": {"peft": {"use_rslora": True}},
    "`peft.init_lora_weights: eva`": {"peft": {"init_lora_weights": "eva"}},
    "`pissa`, `olora`, `corda`, `lora_ga`": {"peft": {"init_lora_weights": "pissa"}},
    "`training.optim` of bitsandbytes": {"training": {"optim": "adamw_8bit"}},
    "`data.assistant: all`": {"data": {"assistant": "all"}},
    "`data.held_out: 0`": {"data": {"held_out": 0}},
}
NOT_SHARED = (*[*SETTINGS][:3], *[*SETTINGS][6:8])
"""Of these, what the base model or the optimiser must be whole for."""
WRITES: dict[str, dict[str, Any]] = {
    **{one: {"peft_type": "LORA"} for one in ("lora", "alora", "pi-lora", "adalora")},
    "dora": {"peft_type": "LORA", "use_dora": True},
    "milora": {"peft_type": "ROUTED_LORA"},
    "spt": {"peft_type": "SELECTIVE_PROMPT"},
    "prompt-tuning": {"peft_type": "PROMPT_TUNING"},
    "prefix-tuning": {"peft_type": "PREFIX_TUNING"},
}


def fits_page() -> str:
    """Methods against tasks, settings, launchers and engines: what gatewise refuses, found by asking it."""
    methods, tasks = {f"`{one}`": one for one in METHODS}, sorted(TASKS)
    adapters = {label: WRITES[one] for label, one in methods.items()}
    adapters |= {f"`lora`, task `{one}`": {"peft_type": "LORA", "task_type": TASKS[one].task_type} for one in tasks}
    engines = {"`--engine transformers`": kind_of, "`--engine vllm`": in_vllm}
    return "".join(
        [
            MADE,
            "# What fits with what\n\nMade by asking gatewise for each pair. Yes: nothing refuses it. No: for the reason of this "
            "number below\nthe table. What was tried with quantised bases, optimisers and trainers: [limits](limits.md).\n",
            "\n## Methods and tasks\n\n",
            grid(methods, {one: one for one in tasks}, recipe_of),
            "\nPrompt tuning refuses classification by a decoder, when the model is loaded.\n",
            "\n## Methods and settings\n\nWith task `causal`. Nothing stands where the method has no such key.\n\n",
            grid(SETTINGS, {one: one for one in METHODS}, lambda given, method: recipe_of(method, "causal", given)),
            "\n## Methods and launchers\n\n`launch.strategy` of a recipe, or `--strategy`.\n\n",
            grid(methods, {one: one for one in STRATEGIES}, launched),
            "\nSettings under the same launchers:\n\n",
            grid(
                {name: one for name, one in SETTINGS.items() if name in NOT_SHARED},
                {one: one for one in STRATEGIES},
                lambda given, strategy: launched("lora", strategy, given),
            ),
            "\n## Adapters and engines\n\n`gatewise serve` with its own engine and with vLLM. What they refuse, "
            "`gatewise export` may write as plain LoRA.\n\n",
            grid(adapters, engines, served),
        ]
    )


def grid(rows: Mapping[str, Any], columns: Mapping[str, Any], ask: Callable[[Any, Any], object]) -> str:
    """A table of what is refused, with the reasons below it, by number."""
    reasons: dict[str, int] = {}

    def cell(one: Any, other: Any) -> str:
        try:
            ask(one, other)
        except KeyError:
            return ""
        except GatewiseError as error:
            return f"no ({reasons.setdefault(of_any(str(error)), len(reasons) + 1)})"
        return "yes"

    made = table(["", *columns], [[name, *(cell(one, other) for other in columns.values())] for name, one in rows.items()])
    return made + "\n" + "".join(f"{at}. {one}\n" for one, at in reasons.items())


def of_any(reason: str) -> str:
    """A refusal without the names of what was asked for, so that it is told once."""
    for pattern, others in (
        (r"^the recipe: ", ""),
        (r"the adapter /\S+", "the adapter"),
        (r"\b(which|with) method [\w-]+", r"\1 this method"),
        (r"^method is [\w-]+, ", "the method is one "),
        (r"^.* (does not go with \w+: .*)", r"it \1"),
    ):
        reason = re.sub(pattern, others, reason)
    return reason


def recipe_of(method: str, task: str, given: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe with nothing but what is needed, and what is asked about.

    Raises:
        KeyError: a section that the method does not have.
    """
    tree: dict[str, Any] = {"method": method, "task": task, "model": "a-model", "data": {"train": "a.jsonl", "dev": "b.jsonl"}}
    for key, one in (given or {}).items():
        if key not in Recipe.model_fields:
            METHODS[method].sections()[key]
        tree[key] = {**tree.get(key, {}), **one} if isinstance(one, dict) else one
    with patch("gatewise.runs.recipe.find_spec", return_value=True):  # whether bitsandbytes is here is not the question
        return checked(tree)


def launched(method: str, strategy: str, given: Mapping[str, Any] | None = None) -> None:
    """What is checked before a recipe is trained under a launcher's strategy."""
    recipe = recipe_of(method, "causal", given)
    part = METHODS[method](recipe)
    shared_by = SHARED_BY.get(strategy)
    deepspeed = shared_by == "DeepSpeed"
    check_sharing(recipe, part, shared_by)
    if method == "adalora" and deepspeed:
        with patch.dict(os.environ, {"ACCELERATE_USE_DEEPSPEED": "true"}):
            part.config(None, None)  # type: ignore[arg-type]
    if strategy == "zero3" and (why := _NOT_WITH_STAGE_3.get(WRITES[method]["peft_type"])):
        raise GatewiseError(why)
    if deepspeed and method in ("milora", "spt"):
        raise GatewiseError(f"{'with data.held_out' if method == 'milora' else 'its search'}: {two_levels_refused()}")


def two_levels_refused() -> str:
    """What a training in two levels says under DeepSpeed."""
    args = SimpleNamespace(mixed_precision="no")
    sharded = {"is_deepspeed_enabled": True, "is_fsdp_enabled": False, "is_fsdp_xla_enabled": False}
    try:
        BilevelMixin._check_run(SimpleNamespace(optimizer=None, args=args, **sharded))  # type: ignore[arg-type]
    except GatewiseError as error:
        return str(error)
    raise AssertionError("two levels train under DeepSpeed: the page has to say so")


def served(config: Mapping[str, Any], engine: Callable[[Path], object]) -> None:
    """Asks an engine for an adapter with this configuration."""
    weights = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{one}.weight": torch.ones(2, 2) for one in "AB"}
    if config.get("use_dora"):
        weights["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(2)
    with TemporaryDirectory() as folder:
        place = Path(folder) / "adapter"
        place.mkdir()
        rest = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "init_lora_weights": True}
        whole = {**rest, "base_model_name_or_path": "a-model", **config}
        (place / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
        save_file(weights, place / "adapter_model.safetensors")
        engine(place)


def in_vllm(folder: Path) -> None:
    """Whether vLLM takes an adapter, which the catalogue has looked at before."""
    kind = kind_of(folder)
    if kind == "alone" and json.loads((folder / "adapter_config.json").read_text())["peft_type"] != "LORA":
        raise GatewiseError("no engine but gatewise's own runs soft prompts that are made from the text")
    if serving_settings(read_lora(folder), "llama")["vllm"] is None:
        raise _not_in_vllm(folder)


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands_page,
    "recipes.md": recipes_page,
    "python.md": python_page,
    "trees.md": trees_page,
    "fits.md": fits_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
