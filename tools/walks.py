"""How much of gatewise does somebody open who follows one thing through it? Four walks, traced on tiny random models.

    rank     from LoraConfig to the saved adapter: two layers, RankAllocation's default score, one round in four steps of a Trainer
    prompt   two routed prompts and one token after them: prompt pass and one step of generate(), in a model of one layer
    recipe   from a recipe in YAML to its run folder: method alora, two rounds in eight steps, read and trained by the library
    command  the same through `gatewise train`: command line, progress, and the tables at the end

What is counted, of the files under SRC/gatewise alone:

    functions       distinct ones that were called, by file and qualified name: methods, properties, nested functions, lambdas and
                    generators too. A comprehension or generator expression is part of the function it stands in
    comprehensions  the distinct ones that ran; functions and comprehensions together are the frames that Python 3.11 shows a tracer
                    (from 3.12 on it shows only the generator expressions)
    files           those that the functions lie in
    changes         of file: how often a function that is called lies in another file than the one called before it, in whatever
                    thread. Returning is no call, nor is going on in a generator that was left at a yield
    a layer         changes of file in a model of two layers less those in a model of one

Bodies of modules and classes are not counted, nor what is called while a module of gatewise is being imported, nor what is
generated, such as the __init__ of a dataclass. Models, data and the public names are ready before a walk begins. Each walk has a
process of its own, so that none finds what another left in a cache. All is seeded, but which modules the routers keep and which
ranks are pruned decides some of the changes: compare them between checkouts, not between machines.

    python tools/walks.py [--src OTHER_CHECKOUT/src] [--json FILE]    # a table; a minute on one core
    python tools/walks.py --list rank                                 # the walk itself, to be followed in an editor
"""

import argparse
import inspect
import io
import json
import os
import random
import sys
import tempfile
import threading
import tomllib
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

OWN = Path(__file__).resolve().parents[1] / "src"
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")

# Where the walk `recipe` goes in, in the modules' order of age: all that has to follow when they move. The other walks go in
# by the names that the README gives, and by the command of pyproject.toml.
RECIPE_READER = (
    ("gatewise.runs.recipe", "load_recipe"),
    ("gatewise.runs.recipe_file", "load_recipe"),
)
RECIPE_RUNNER = (("gatewise.runs.run", "train"),)


class Trace:
    """A context manager that follows the calls of Python functions whose code lies in one folder.

    Attributes:
        functions: file -> qualified name -> first line, both in the order in which they were entered first.
        comprehensions: (file, qualified name) of every comprehension that ran.
        changes: of file, from one call to the next.
    """

    def __init__(self, folder: Path) -> None:
        self.functions: dict[str, dict[str, int]] = {}
        self.comprehensions: set[tuple[str, str]] = set()
        self.changes = 0
        self._root = f"{folder.resolve()}{os.sep}"
        self._last: str | None = None
        self._importing = 0
        self._starts: dict[CodeType, int] = {}

    def __enter__(self) -> "Trace":
        self._before = sys.getprofile(), threading.getprofile()
        threading.setprofile(self._follow)
        sys.setprofile(self._follow)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before[0])
        threading.setprofile(self._before[1])

    def counts(self) -> dict[str, Any]:
        """The numbers, and how many functions each file has part with."""
        files = {file: len(names) for file, names in self.functions.items()}
        return {
            "functions": sum(files.values()),
            "comprehensions": len(self.comprehensions),
            "files": len(files),
            "changes": self.changes,
            "functions_by_file": files,
        }

    def _follow(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._root):
            return
        if code.co_name == "<module>":
            self._importing += 1 if event == "call" else -1
        elif event == "call" and not self._importing and code.co_flags & inspect.CO_OPTIMIZED:  # bodies of classes are not
            self._enter(code, frame.f_lasti)

    def _enter(self, code: CodeType, instruction: int) -> None:
        # A generator that goes on is shown as a call too, but at an instruction behind the one it began with.
        if self._starts.setdefault(code, instruction) != instruction:
            return
        file = code.co_filename.removeprefix(self._root).replace(os.sep, "/")
        if code.co_name in COMPREHENSIONS:
            self.comprehensions.add((file, code.co_qualname))
            return
        self.functions.setdefault(file, {}).setdefault(code.co_qualname, code.co_firstlineno)
        self.changes += self._last not in (None, file)
        self._last = file


# The walks. Each makes what it needs in an empty folder and returns the function to trace.

Walk = Callable[[], object]


def rank_walk(folder: Path, src: Path) -> Walk:
    """From ``LoraConfig`` to the saved adapter."""
    import gatewise

    RankAllocation, ConstantBudget = gatewise.RankAllocation, getattr(gatewise, "ConstantBudget", None)  # older ones have none
    base, ids = tiny_llama(layers=2), drawn_tokens(rows=16)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    batch = {name: torch.stack([row[name] for row in rows[:4]]) for name in rows[0]}
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": []}

    def walk() -> None:
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        schedule = {"schedule": ConstantBudget(rounds=1, first_round=2)} if ConstantBudget else {"rounds": 1, "first_round": 2}
        allocation = RankAllocation(validation_batch=batch, **schedule)
        arguments = TrainingArguments(str(folder / "trainer"), use_cpu=True, disable_tqdm=True, **settings)
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[allocation]).train()
        model.save_pretrained(str(folder / "adapter"))
        assert len(allocation.history) == 1

    return walk


def prompt_walk(folder: Path, src: Path, layers: int = 1) -> Walk:
    """Two routed prompts, without padding, to the second new token: the first comes of the prompt pass, the second of one step."""
    from gatewise import RoutedLoraConfig

    model = get_peft_model(tiny_llama(layers), RoutedLoraConfig(r=4, top_k=3, task_type="CAUSAL_LM")).eval()
    # By name, so that the routers choose alike in whatever order a checkout makes its parameters.
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=draw)
    ids = drawn_tokens(rows=2)
    settings: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def recipe_walk(folder: Path, src: Path) -> Walk:
    """From YAML to the run folder, through the two functions that ``gatewise train`` calls."""
    load_recipe, train = first_home(RECIPE_READER), first_home(RECIPE_RUNNER)
    recipe = write_recipe(folder)
    return lambda: train(load_recipe(recipe, ()), folder / "run")


def command_walk(folder: Path, src: Path) -> Walk:
    """From ``gatewise train recipe.yaml`` to its last line."""
    scripts = tomllib.loads((src.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["gatewise"].partition(":")
    main = getattr(import_module(module), function)
    recipe = write_recipe(folder)

    def walk() -> None:
        given, sys.argv = sys.argv, ["gatewise", "train", str(recipe), "--output", str(folder / "run")]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"`gatewise train` ended with exit code {ended.code}") from ended
        finally:
            sys.argv = given

    return walk


WALKS: dict[str, Callable[[Path, Path], Walk]] = {
    "rank": rank_walk,
    "prompt": prompt_walk,
    "recipe": recipe_walk,
    "command": command_walk,
}
TWO_LAYERS = "prompt, two layers"


def first_home(places: tuple[tuple[str, str], ...]) -> Any:
    """A function from the first of the modules that this checkout has."""
    for module, name in places:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                raise
    raise LookupError(f"none of {', '.join(module for module, _ in places)} is there: add where {places[0][1]} lies now")


# What the walks are made of.


def tiny_llama(layers: int, vocabulary: int = 60) -> LlamaForCausalLM:
    """A random Llama."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=96, pad_token_id=0, **sizes)
    )


def drawn_tokens(rows: int) -> torch.Tensor:
    """Six tokens a row, none of them padding or special."""
    return torch.randint(3, 60, (rows, 6), generator=torch.Generator().manual_seed(1))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_recipe(folder: Path) -> Path:
    """A recipe of method alora, with its base model and its labelled rows beside it."""
    tokenizer = byte_tokenizer()
    tiny_llama(layers=2, vocabulary=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)
    for name, count in (("train", 26), ("dev", 10)):
        labels = [draw.choice(("good", "bad")) for _ in range(count)]
        rows = [
            {"text": f"{number} {'nice' if label == 'good' else 'poor'}", "label": label} for number, label in enumerate(labels)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    recipe = {
        "method": "alora",
        "model": "base",
        "data": {"train": "train.jsonl", "dev": "dev.jsonl", "held_out": 6, "max_length": 64},
        "peft": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1},
        "allocation": {"rounds": 2, "first_round": 3, "recover": 3},
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "log_every": 2, "save_every": 2},
    }
    path = folder / "alora.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


# The script.


def traced(name: str, src: Path) -> Trace:
    """One walk, in a folder that is gone afterwards; what it prints is shown only if it fails."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same walk on every machine
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    sys.path.insert(0, str(src))
    found = Path(str(import_module("gatewise").__file__)).resolve().parent
    if found != src / "gatewise":
        raise RuntimeError(f"gatewise was imported from {found}, not from {src}: run this where nothing has imported it before")
    make = partial(prompt_walk, layers=2) if name == TWO_LAYERS else WALKS[name]
    printed = io.StringIO()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                walk = make(Path(folder), src)
                with Trace(src / "gatewise") as trace:
                    walk()
        except BaseException:
            print(printed.getvalue(), file=sys.stderr)
            raise
    return trace


def counts_of(name: str, src: Path) -> dict[str, Any]:
    """The numbers of one walk."""
    return traced(name, src).counts()


def table(counted: dict[str, dict[str, Any]]) -> str:
    """The numbers as text, one line a walk."""
    columns = ("functions", "comprehensions", "files", "changes", "a layer")
    lines = [f"{'walk':8}" + "".join(f"{name:>16}" for name in columns)]
    lines += [f"{walk:8}" + "".join(f"{counts.get(name, ''):>16}" for name in columns) for walk, counts in counted.items()]
    return "\n".join(lines)


def listing(trace: Trace) -> str:
    """The walk, file by file, with the first line of every function; files and functions in the order first entered."""
    lines = []
    for file, functions in trace.functions.items():
        lines += [f"{file}  ({len(functions)})", *(f"{line:6}  {name}" for name, line in functions.items())]
    return "\n".join(lines)


def main() -> None:
    """Walks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, default=OWN, help="the folder in which gatewise lies; by default that of this checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--list", choices=WALKS, metavar="WALK", help=f"print one walk instead: {', '.join(WALKS)}")
    options = parser.parse_args()
    src = options.src.resolve()
    if not (src / "gatewise" / "__init__.py").is_file():
        parser.error(f"--src is {options.src}, in which there is no gatewise: give the src folder of a checkout")
    if options.list:
        print(listing(traced(options.list, src)))
        return
    names = [*WALKS, TWO_LAYERS]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        counted = dict(zip(names, fresh.map(partial(counts_of, src=src), names), strict=True))
    counted["prompt"]["a layer"] = counted.pop(TWO_LAYERS)["changes"] - counted["prompt"]["changes"]
    print(table(counted))
    if options.json:
        options.json.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
