"""PEFT's registry with our methods in it, in whichever order the two are imported. Each case in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, mapping
from peft.utils.peft_types import PeftType
from tiny_models import random_adapter, tiny_base

import gatewise
from gatewise.internals.registry import add_peft_method, peft_type, register_with_peft
from gatewise.routed import RoutedLoraConfig, RoutedLoraModel


def python(*lines, arguments=()):
    done = subprocess.run([sys.executable, "-c", "\n".join(lines), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_alone_brings_neither_peft_nor_torch():
    out = python("import sys, gatewise", "print('peft' in sys.modules, 'torch' in sys.modules, 'transformers' in sys.modules)")
    assert out == ["False"] * 3


@pytest.mark.parametrize(
    "imports",
    [
        ["import gatewise", "from peft import PeftModel"],
        ["from peft import PeftModel", "import gatewise"],
        # Others ask whether PEFT is there without importing it.
        ["import gatewise, importlib.util", "importlib.util.find_spec('peft')", "from peft import PeftModel"],
        ["import gatewise.errors", "from transformers import AutoModelForCausalLM", "from peft import PeftModel"],
        ["from gatewise.routed import RoutedLoraConfig", "from peft import PeftModel"],
    ],
    ids=["gatewise first", "peft first", "asked for", "transformers between", "routed first"],
)
def test_a_saved_adapter_loads_in_a_fresh_process(batch, tmp_path, imports):
    model = random_adapter(get_peft_model(tiny_base("llama"), RoutedLoraConfig(r=3, task_type="CAUSAL_LM"))).eval()
    ids = batch()["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    plain.save_pretrained(tmp_path / "base")
    out = python(
        *imports,
        "import sys, torch",
        "from transformers import LlamaForCausalLM",
        f"base = LlamaForCausalLM.from_pretrained({str(tmp_path / 'base')!r})",
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r})",
        f"logits = model(input_ids=torch.load({str(tmp_path / 'ids.pt')!r})).logits",
        "print(type(model.peft_config['default']).__name__, float(logits.double().sum()))",
        "assert not any(type(finder).__module__.startswith('gatewise') for finder in sys.meta_path)",
    )
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        expected = float(again(input_ids=ids).logits.double().sum())
    assert out[0] == "RoutedLoraConfig"
    assert float(out[1]) == pytest.approx(expected, rel=1e-4)


# Processes that have imported neither gatewise nor PEFT: forks of one that has imported only what takes long.
IN_FORKS = """
import os, sys, traceback, warnings
from importlib import import_module
from importlib.util import find_spec
import accelerate, datasets, matplotlib, sacrebleu, torch, transformers.modeling_utils
for name in ("bitsandbytes", "deepspeed", "torchao"):
    if find_spec(name):
        import_module(name)
assert not {"gatewise", "peft", "transformers.trainer_utils"} & set(sys.modules)
failed = 0
for order in sys.argv[1:]:
    child = os.fork()
    if child:
        failed += os.waitpid(child, 0)[1] != 0
        continue
    try:
        warnings.simplefilter("error")
        for name in order.split():
            import_module(name)
        known = import_module("peft").mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get("ROUTED_LORA")
        assert known is not None, "PEFT does not know ROUTED_LORA"
        assert known is import_module("gatewise").RoutedLoraConfig
    except BaseException:
        print(order, traceback.format_exc(), sep=chr(10), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
sys.exit(failed > 0)
"""


def modules_of_gatewise():
    """The names of all its modules, the packages among them; none is imported."""
    root = Path(gatewise.__file__).parent
    parts = [path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")]
    return sorted(".".join(names[:-1] if names[-1] == "__init__" else names) for names in parts)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_whatever_is_imported_first_peft_knows_our_methods():
    """With warnings as errors: a method that cannot be added is a warning only.

    PEFT's import brings some of our modules. If one of these is imported first, PEFT may ask for it half done. Of the others one is
    like another: a package of each room is tried.
    """
    brought = python("import gatewise, peft, sys", "print(*(name for name in sys.modules if name.partition('.')[0] == 'gatewise'))")
    assert {"gatewise.errors", "gatewise.routed.model", "gatewise.prompts.model"} <= set(brought)
    ours = [name for name in modules_of_gatewise() if name in brought or find_spec(name).submodule_search_locations]
    assert {"gatewise", "gatewise.losses", "gatewise.routed", "gatewise.tasks", "gatewise.allocation"} <= set(ours)
    # These import PEFT before they are complete themselves.
    others = ["transformers.trainer_utils", "transformers.trainer", "transformers.training_args", "accelerate"]
    if find_spec("trl"):
        others += ["trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"]
    python(IN_FORKS, arguments=[*ours, *(f"gatewise {name}" for name in others), "gatewise.models gatewise.tasks"])


def test_peft_without_gatewise_stays_as_it_is():
    out = python("from peft.utils.peft_types import PeftType", "print('ROUTED_LORA' in PeftType.__members__)")
    assert out == ["False"]


def test_a_gatewise_that_cannot_register_leaves_peft_usable():
    out = python(
        "import sys, warnings, gatewise",
        "sys.modules['gatewise.routed'] = None",
        "with warnings.catch_warnings(record=True) as caught:",
        "    warnings.simplefilter('always')",
        "    import peft",
        "print(peft.LoraConfig.__name__, any('could not add its methods' in str(one.message) for one in caught))",
    )
    assert out == ["LoraConfig", "True"]


def test_the_enum_member_is_like_the_others():
    member = PeftType.ROUTED_LORA
    assert member is PeftType("ROUTED_LORA") is PeftType["ROUTED_LORA"] is peft_type("ROUTED_LORA")
    assert member == "ROUTED_LORA"
    assert hash(member) == hash("ROUTED_LORA")
    assert (member.name, member.value) == ("ROUTED_LORA", "ROUTED_LORA")
    assert member in list(PeftType)
    assert isinstance(member, PeftType)
    assert list(PeftType).count(member) == 1
    with pytest.raises(ValueError, match="NO_SUCH"):
        PeftType("NO_SUCH")


def test_registering_again_changes_nothing():
    before = len(PeftType), dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING), dict(mapping.PEFT_TYPE_TO_PREFIX_MAPPING)
    add_peft_method("ROUTED_LORA", RoutedLoraConfig, RoutedLoraModel, prefix="lora_")
    register_with_peft()
    assert (len(PeftType), mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_PREFIX_MAPPING) == before


def test_a_later_peft_with_a_method_of_that_name(monkeypatch):
    class Theirs:
        pass

    for table in ("CONFIG", "TUNER"):
        monkeypatch.setitem(getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING"), PeftType.ROUTED_LORA, Theirs)
    with pytest.warns(UserWarning, match=r"has a method ROUTED_LORA of its own \(.*Theirs\)"):
        add_peft_method("ROUTED_LORA", RoutedLoraConfig, RoutedLoraModel, prefix="lora_")
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["ROUTED_LORA"] is RoutedLoraConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["ROUTED_LORA"] is RoutedLoraModel


def test_dir_names_the_public_api() -> None:
    import gatewise

    shown = {name for name in dir(gatewise) if not name.startswith("_")}
    assert shown == set(gatewise.__all__)
    assert all(getattr(gatewise, name) is not None for name in shown)
