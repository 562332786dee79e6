"""Private names of libraries: each is there as it was read, none is used that is not listed, and none is listed in vain."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import tiny_base
from torch import nn

import gatewise
from gatewise.internals.library_attributes import attention_implementation, set_model_name
from gatewise.internals.private_names import PRIVATE_NAMES

SOURCE = Path(gatewise.__file__).parent
PRIVATE = re.compile(r"_[a-z]\w*(?<!__)")
LIBRARIES = {"torch", "peft", "transformers", "accelerate", "deepspeed", "vllm"}
NAMES = PRIVATE_NAMES
LISTED = {one.name for one in NAMES}
TABLE = "internals/private_names.py"
BY_VERSION = "serving/vllm_plugin/hooks.py"  # it changes nothing in a vLLM of another version than it was tried with
ATTRIBUTES = {"getattr", "setattr", "hasattr", "delattr"}
# Python's own: the end of a process, the enum that our methods join, named tuples, and streams.
OF_PYTHON = {
    "_exit",
    "_asdict",
    "_fields",
    "_replace",
    "_name_",
    "_value_",
    "_sort_order_",
    "_member_names_",
    "_member_map_",
    "_value2member_map_",
}
# Attributes that gatewise itself puts on objects of others.
ON_OTHERS = {"_gatewise_request", "_gatewise"}


@pytest.mark.parametrize("one", NAMES, ids=lambda one: f"{one.owner.partition(':')[2]}.{one.name}")
def test_the_library_has_it_as_it_was_read(one):
    module, _, owner_name = one.owner.partition(":")
    pytest.importorskip(module.partition(".")[0])
    home = import_module(module)
    owner = getattr(home, owner_name) if owner_name else home
    if one.parameters is not None:
        parameters = [name for name in inspect.signature(getattr(owner, one.name)).parameters if name != "self"]
        assert tuple(parameters[: len(one.parameters)]) == one.parameters, f"{one.files or 'internals'} rely on it: {one.why}"
    elif not hasattr(owner, one.name) and one.name not in getattr(owner, "__annotations__", {}):
        # Attributes of objects are not to be seen on the class, but where it sets them.
        assert re.search(rf"\.{one.name}\b", inspect.getsource(owner)), f"{one.files or 'internals'} rely on it: {one.why}"


def parsed() -> dict[str, ast.Module]:
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def uses(tree: ast.Module) -> set[str]:
    """Private names that a file asks objects for, imports or defines, and listed ones that it has as text."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in LISTED:
            found.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ATTRIBUTES:
            found |= {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        elif isinstance(node, ast.ClassDef):
            found |= {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
            found |= {
                one.targets[0].id for one in node.body if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name)
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            found |= {alias.name for alias in node.names} | set((node.module or "").split("."))
    return {name for name in found if PRIVATE.fullmatch(name)}


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Private names that gatewise itself gives to functions, classes, variables and attributes of ``self``."""
    own: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
                own.add(node.attr)
    return own


def test_what_is_written_into_an_object_of_a_library_is_not_gatewises_own():
    tree = ast.parse(
        "def f(self, arguments):\n    self._mine = 1\n    arguments._n_gpu = 1\n    arguments.__dict__['_setup_devices'] = 1"
    )
    assert own_names({"x.py": tree}) == {"f", "_mine"}
    assert uses(tree) == {"_mine", "_n_gpu", "_setup_devices"}


def test_no_other_private_name_is_used():
    """Names of libraries outside of internals stand in the table, with their file; all others are gatewise's own."""
    trees = parsed()
    own = own_names(trees)
    for file, tree in trees.items():
        if file in (TABLE, BY_VERSION):
            continue
        found = uses(tree)
        unknown = sorted(found - own - LISTED - OF_PYTHON - ON_OTHERS)
        assert not unknown, f"{file} uses {', '.join(unknown)}, which is neither gatewise's nor listed in private_names.py"
        if not file.startswith("internals/"):
            allowed = {one.name for one in NAMES if file in one.files}
            outside = sorted((found & LISTED) - allowed)
            assert not outside, f"{file} uses {', '.join(outside)} of a library: move it to internals, or list the file"


def test_nothing_is_listed_in_vain():
    trees = parsed()
    for one in NAMES:
        for file in one.files:
            assert one.name in uses(trees[file]), f"{file} does not use {one.name} any more"
        if not one.files:
            inside = [tree for file, tree in trees.items() if file.startswith("internals/") and file != TABLE]
            assert any(one.name in uses(tree) for tree in inside), f"{one.name} is not used any more"


def test_private_methods_that_subclasses_override_are_listed():
    """Also where the name of gatewise's method is in no file of the library: looked up in the classes themselves."""
    listed = {(one.name, file) for one in NAMES for file in one.files}
    seen = 0
    for file in parsed():
        if file.endswith("__main__.py") or not (file.startswith(("routed", "prompts", "bilevel", "serving", "runs", "allocation"))):
            continue
        try:
            module = import_module(f"gatewise.{file.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}")
        except ModuleNotFoundError as error:
            if error.name not in ("lm_eval", "vllm"):
                raise
            continue  # for an environment of its own
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            theirs = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            for name in vars(kind):
                if PRIVATE.fullmatch(name) and not name.startswith("_abc") and any(name in vars(base) for base in theirs):
                    seen += 1
                    assert (name, file) in listed, f"{kind.__name__} in {file} overrides {name} of a library: list it"
    assert seen > 10


# ---- what is relied on beyond a name ----


def test_peft_puts_a_hook_with_the_names_on_every_layer():
    """``fast_lora`` reads them from the hook as it is registered."""
    model = get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"])).eval()
    layer, seen = next(module for module in model.modules() if isinstance(module, LoraLayer)), []
    layer.__dict__["register_forward_pre_hook"] = lambda hook, **settings: (
        seen.append((hook.keywords["adapter_names"], settings)) or nn.Module.register_forward_pre_hook(layer, hook, **settings)
    )
    with model.base_model._enable_peft_forward_hooks(adapter_names=["default", "__base__"]):
        assert seen == [(["default", "__base__"], {"with_kwargs": True})]


def test_attributes_of_models():
    model = tiny_base("llama")
    set_model_name(model, "somebody/a-model")
    assert (model.name_or_path, model.config._name_or_path) == ("somebody/a-model", "somebody/a-model")
    assert attention_implementation(model) in ("sdpa", "eager")
