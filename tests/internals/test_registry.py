"""PEFT's registry with our methods in it, in whichever order the two are imported. Each case in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, mapping
from peft.utils.peft_types import PeftType
from tiny_models import random_adapter, tiny_base
from transformers import LlamaForCausalLM

import gatewise
from gatewise.internals.registry import REQUIRES, add_peft_method, peft_type, register_with_peft
from gatewise.routed import RoutedLoraConfig, RoutedLoraModel

# Runs what each line of its input asks for: code in forks of a process that has imported only what takes long.
IN_FORKS = """
import gc, json, os, sys, traceback
for line in sys.stdin:
    brought, codes = json.loads(line)
    exec(brought)
    gc.freeze()  # its pages stay shared
    for code in codes:
        child = os.fork()
        if child:
            print('-- failed' if os.waitpid(child, 0)[1] else '-- end', flush=True)
            continue
        try:
            exec(code, {})
            sys.stdout.flush()
        except BaseException:
            print(code, traceback.format_exc(), sep=chr(10), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
"""
LIBRARIES = """
import accelerate, datasets, matplotlib, sacrebleu, scipy.optimize, torch, torch._inductor.compile_fx, torch.distributed.tensor
assert not {"gatewise", "peft", "transformers"} & set(sys.modules)
"""
MORE_LIBRARIES = """
import transformers.modeling_utils
from importlib import import_module
from importlib.util import find_spec
for name in ("bitsandbytes", "deepspeed", "torchao"):
    if find_spec(name):
        import_module(name)
assert not {"gatewise", "peft", "transformers.trainer_utils"} & set(sys.modules)
"""


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def in_forks():
    """in_forks(brought, codes) -> the words that each code prints in a process that has imported what was brought so far, and so
    neither gatewise nor PEFT."""
    if not hasattr(os, "fork"):
        yield lambda _, codes: [python(code).split() for code in codes]
        return
    with subprocess.Popen([sys.executable, "-c", IN_FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def words(code):
            found = []
            while not (line := process.stdout.readline()).startswith("--"):
                assert line, "the process has ended"
                found += line.split()
            assert line == "-- end\n", code
            return found

        def run(brought, codes):
            print(json.dumps([brought, list(codes)]), file=process.stdin, flush=True)
            return [words(code) for code in codes]

        yield run


def test_import_alone_brings_neither_peft_nor_torch():
    out = python("import sys, gatewise; print('peft' in sys.modules, 'torch' in sys.modules, 'transformers' in sys.modules)")
    assert out.split() == ["False"] * 3


ORDERS = {
    "gatewise first": "import gatewise; from peft import PeftModel",
    "peft first": "from peft import PeftModel; import gatewise",
    # Others ask whether PEFT is there without importing it.
    "asked for": "import gatewise, importlib.util; importlib.util.find_spec('peft'); from peft import PeftModel",
    "transformers between": "import gatewise.errors; from transformers import AutoModelForCausalLM; from peft import PeftModel",
    "routed first": "from gatewise.routed import RoutedLoraConfig; from peft import PeftModel",
}


OTHERS = {
    "without gatewise": "from peft.utils.peft_types import PeftType; print('ROUTED_LORA' in PeftType.__members__)",
    "unregistered": """
import sys, warnings, gatewise
sys.modules['gatewise.routed'] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import peft
print(peft.LoraConfig.__name__, any('could not add its methods' in str(one.message) for one in caught))
""",
    "names": "import gatewise, peft, sys; print(*(name for name in sys.modules if name.partition('.')[0] == 'gatewise'))",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a model, an adapter of it, and ids to read."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = random_adapter(get_peft_model(tiny_base("llama"), RoutedLoraConfig(r=3, task_type="CAUSAL_LM"))).eval()
    torch.save(torch.randint(1, 60, (3, 9)), folder / "ids.pt")
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def printed(adapter, in_forks):
    """What fresh processes print: those of ``ORDERS``, which then load an adapter, and those of ``OTHERS``.

    Where it does not matter, what takes long in Transformers is there before.
    """
    load = f"""
import sys, torch
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained({str(adapter / "base")!r})
model = PeftModel.from_pretrained(base, {str(adapter / "adapter")!r})
logits = model(input_ids=torch.load({str(adapter / "ids.pt")!r})).logits
print(type(model.peft_config['default']).__name__, float(logits.double().sum()))
assert not any(type(finder).__module__.startswith('gatewise') for finder in sys.meta_path)
"""
    orders = {order: imports + load for order, imports in ORDERS.items()}
    first = {"transformers between": orders.pop("transformers between"), **OTHERS}
    found = in_forks(LIBRARIES, first.values()) + in_forks(MORE_LIBRARIES, orders.values())
    return dict(zip([*first, *orders], found, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_a_saved_adapter_loads_in_a_fresh_process(adapter, printed, order):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(adapter / "base"), adapter / "adapter")
    with torch.no_grad():
        expected = float(model(input_ids=torch.load(adapter / "ids.pt")).logits.double().sum())
    kind, found = printed[order][-2:]  # behind what DeepSpeed has to say
    assert kind == "RoutedLoraConfig"
    assert float(found) == pytest.approx(expected, rel=1e-4)


ORDER = """
import warnings
from importlib import import_module
warnings.simplefilter("error")
for name in {!r}.split():
    import_module(name)
known = import_module("peft").mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get("ROUTED_LORA")
assert known is not None, "PEFT does not know ROUTED_LORA"
assert known is import_module("gatewise").RoutedLoraConfig
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_whatever_is_imported_first_peft_knows_our_methods(printed, in_forks):
    """With warnings as errors: a method that cannot be added is a warning only.

    PEFT's import brings some of our modules. If one of these is imported first, PEFT may ask for it half done; one in the rooms of
    the methods brings its room first. Of the modules that PEFT's import does not bring, one is like another.
    """
    brought = printed["names"]
    assert {"gatewise.errors", "gatewise.routed.model", "gatewise.prompts.model"} <= set(brought)
    ours = [name for name in brought if not name.startswith(("gatewise.routed.", "gatewise.prompts."))]
    assert {"gatewise", "gatewise.losses", "gatewise.routed", "gatewise.prompts"} <= set(ours)
    # These import PEFT before they are complete themselves.
    others = ["transformers.trainer_utils", "transformers.trainer", "transformers.training_args", "accelerate"]
    if find_spec("trl"):
        others += ["trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"]
    orders = [*ours, *(f"gatewise {name}" for name in others), "gatewise.allocation", "gatewise.models gatewise.tasks"]
    in_forks("", [ORDER.format(order) for order in orders])


def test_peft_without_gatewise_stays_as_it_is(printed):
    assert printed["without gatewise"] == ["False"]


def test_a_gatewise_that_cannot_register_leaves_peft_usable(printed):
    assert printed["unregistered"] == ["LoraConfig", "True"]


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


def test_dir_names_the_public_api() -> None:

    shown = {name for name in dir(gatewise) if not name.startswith("_")}
    assert shown == set(gatewise.__all__)
    assert all(getattr(gatewise, name) is not None for name in shown)


def test_a_saved_adapter_says_what_to_import_and_one_from_before_that_loads(tmp_path):
    """Without gatewise PEFT says no more than ``KeyError: 'ROUTED_LORA'``."""
    RoutedLoraConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["requires"] == REQUIRES
    path.write_text(json.dumps({key: value for key, value in saved.items() if key != "requires"}))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.requires) == (4, REQUIRES)
