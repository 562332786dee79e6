"""The JSON schema of recipes, by which an editor completes and checks them while they are written.

It is that of the very models that read a recipe: which sections there are depends on its method and its task.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from gatewise.parts import DEFAULT_TASK, METHODS, TASKS, Part, Section
from gatewise.runs.recipe import Recipe, recipe_class


def recipe_schema(method: str | None = None, task: str | None = None) -> dict[str, Any]:
    """JSON schema (draft 7) of recipes with this method and this task, or with any that is installed.

    Raises:
        GatewiseError: a method or a task that there is not.
    """
    recipe_class(method or "lora", task or DEFAULT_TASK)
    tables: dict[str, dict[str, type[Part]]] = {
        "method": {name: METHODS[name] for name in sorted(METHODS) if method in (None, name)},
        "task": {name: TASKS[name] for name in sorted(TASKS) if task in (None, name)},
    }
    common: dict[str, Any] = {name: one.annotation for name, one in Recipe.model_fields.items() if _is_section(one.annotation)}
    kinds: set[Any] = {kind for table in tables.values() for part in table.values() for kind in part.sections().values()}
    models: list[Any] = [Recipe, *sorted({*kinds, *common.values()}, key=lambda kind: kind.__qualname__)]
    refs, made = models_json_schema([(one, "validation") for one in models], ref_template="#/definitions/{model}")
    definitions = _plain(made["$defs"])
    own = definitions.pop("Recipe")
    sections = {name: {"$ref": refs[kind, "validation"]["$ref"]} for name, kind in common.items()}
    properties = {name: one if name in own["required"] else _or_null(one) for name, one in (own["properties"] | sections).items()}
    conditions = []
    for key, table in tables.items():
        first_lines = (f"{name}: {inspect.getdoc(part).splitlines()[0]}" for name, part in table.items())  # type: ignore[union-attr]
        values = [*table] if key in own["required"] else [*table, None]
        properties[key] = {"enum": values, "description": "\n".join(first_lines)}
        names = sorted({name for part in table.values() for name in part.sections()})
        properties |= dict.fromkeys(names, True)
        for value, part in table.items():
            own_sections = part.sections()
            allowed: dict[str, Any] = dict.fromkeys(names, False)
            for name, kind in own_sections.items():
                one = {"$ref": refs[kind, "validation"]["$ref"]}
                allowed[name] = one if name in own["required"] else _or_null(one)
            # A recipe without the key is of the default task.
            is_default = value == DEFAULT_TASK
            found = {
                "properties": {key: {"enum": [value, None] if is_default else [value]}},
                **({} if is_default else {"required": [key]}),
            }
            conditions.append({"if": found, "then": {"properties": allowed}})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of gatewise",
        "description": own["description"],
        "type": "object",
        "properties": properties,
        "required": own["required"],
        "additionalProperties": False,
        "allOf": conditions,
        "definitions": definitions,
    }


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _or_null(one: Mapping[str, Any]) -> dict[str, Any]:
    """What stands there without a value, or a section without keys, has its default."""
    null = {"type": "null"}
    return dict(one) if null in one.get("anyOf", ()) else {"anyOf": [dict(one), null]}


def _plain(value: Any) -> Any:
    """Without titles, which repeat the names of keys, and without what says nothing and not every pydantic writes."""
    if isinstance(value, dict):
        return {
            key: _plain(one)
            for key, one in value.items()
            if not (key == "title" and isinstance(one, str)) and not (key == "additionalProperties" and one is True)
        }
    return [_plain(one) for one in value] if isinstance(value, list) else value
