"""The model card of an adapter, ``README.md`` in its folder: what the hub reads at its head, and what a reader wants to know.

PEFT writes a form there that nobody fills in. What the adapter's own files say (its base, its kind, how a prompt is written, how it
is loaded) is written here for any adapter; data, method and metrics come from whoever made it.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gatewise import __version__
from gatewise.adapters.files import read_config, read_lora, read_note
from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.models.embedded import EMBEDDED, hub_name
from gatewise.parts import TASKS
from gatewise.serving.engines import serving_settings

CARD_FILE = "README.md"
PICTURES = ("ranks.png", "layers.png", "routing.png")
_LOADING = "## How to load it\n\n"
_FORM = "[More Information Needed]"
_KINDS = {
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "ROUTED_LORA": "routed LoRA (MiLoRA)", "SELECTIVE_PROMPT": "selective prompts (SPT)",
    "PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning",
}  # fmt: skip
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OWN = ("ROUTED_LORA", "SELECTIVE_PROMPT")  # types of PEFT's that gatewise adds


def write_card(
    folder: str | Path,
    name: str,
    *,
    sections: Mapping[str, str] | None = None,
    results: Sequence[EvalResult] = (),
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Path:
    """Writes the card of an adapter over the one that is there.

    Args:
        folder: of the adapter; the pictures of ``PICTURES`` that lie in it are shown.
        name: what to call it.
        sections: heading -> text, for what no file of the adapter says.
        results: metrics, for the head of the card.
        datasets: those of the hub that it was trained on.

    Raises:
        GatewiseError: the folder is no adapter.
    """
    folder = Path(folder)
    config, note = read_config(folder), read_note(folder)
    (base, on_hub), kind = _base_of(config), str(config.get("peft_type"))
    task = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}.get(str(config.get("task_type")))
    head = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        pipeline_tag=task,
        datasets=list(datasets) or None,
        tags=sorted({*([f"base_model:adapter:{base}"] if on_hub else []), kind.lower(), "gatewise", "transformers", *tags}),
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    link = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`"
    told = [f"# {name}", f"An adapter ({_KINDS.get(kind, kind)}) for {link}, made with gatewise {__version__}."]
    if quantised := note.get("base_quantised"):
        told.append(
            f"It was trained on `{note['base']}`, the same model with its weights quantised to {quantised}: on the hub's weights "
            "its answers may differ a little."
        )
    if in_what := note.get("quantization"):
        told.append(f"The base model's weights were loaded in {in_what} while it was trained.")
    told += [f"## {heading}\n\n{text}" for heading, text in (sections or {}).items()]
    told += [f"![{Path(one).stem}]({one})" for one in PICTURES if (folder / one).is_file()]
    told += [f"## How a prompt is written\n\n{_prompt(note, task)}", f"{_LOADING}{_usage(folder, name)}"]
    with whole_file(folder / CARD_FILE) as part:
        part.write_text(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(told) + "\n", encoding="utf-8")
    return folder / CARD_FILE


def carry_card(source: str | Path, folder: str | Path, heading: str, text: str) -> None:
    """Gives an adapter that was made from another one the card of that one, with what was done to it at the end.

    Where that has none that is filled in, a card is written. Metrics stay those of the other one, under their heading.

    Args:
        source, folder: of the adapter that there was, and of the one that was made.
    """
    source, folder = Path(source), Path(folder)
    resolved = source.resolve()
    name = resolved.parent.name if resolved.name == "adapter" else resolved.name
    if resolved.parent.name == "snapshots":  # in the hub's cache: models--somebody--name/snapshots/commit
        name = resolved.parent.parent.name.rpartition("--")[2]
    try:
        card = ModelCard((source / CARD_FILE).read_text(encoding="utf-8"))
    except Exception:  # there is none, or it is damaged: YAML has errors of its own
        card = None
    if card is None or _FORM in card.text:
        write_card(folder, name, sections={heading: text})
        return
    card.data["eval_results"] = None  # which the adapter may not have any more
    for picture in filter(lambda one: (source / one).is_file(), PICTURES):
        shutil.copyfile(source / picture, folder / picture)
    before, loading, after = str(card).partition(_LOADING)
    _, more, after = after.partition("\n## ")  # what somebody wrote behind it
    told = f"{before.rstrip()}\n\n## {heading}\n\n{text}\n{more}{after}".rstrip() + "\n"
    with whole_file(folder / CARD_FILE) as part:  # engines may need other settings for it
        part.write_text(told + (f"\n{_LOADING}{_usage(folder, name)}\n" if loading else ""), encoding="utf-8")


def _prompt(note: Mapping[str, Any], task: str | None) -> str:
    """How the run that made the adapter wrote its prompts."""
    labels, words = note.get("labels") or [], note.get("label_words") or {}
    if task == "text-classification":
        return f"The text itself is classified. The classes, in order: {', '.join(f'`{one}`' for one in labels) or 'not noted'}."
    answers = f"\n\nThe answer is one of: {', '.join(f'`{words.get(one, one)}`' for one in labels)}." if labels else ""
    if note.get("chat_template"):
        return f"As messages, by the chat template that is noted in `gatewise.json` (`chat_template`).{answers}"
    if note.get("template"):
        return f"With the text of a row in place of its field:\n\n{fenced(note['template'])}{answers}"
    return "Nothing is noted of it."


def _base_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """The base model's id on the hub, or its folder without the way there; and whether it is an id."""
    base = hub_name(str(config.get("base_model_name_or_path") or ""))
    on_hub = _ID.fullmatch(base) is not None and not Path(base).exists()
    return (base if on_hub else Path(base).name), on_hub


def _usage(folder: Path, name: str) -> str:
    """How PEFT, gatewise and vLLM load the adapter."""
    config, note = read_config(folder), read_note(folder)
    base, _ = _base_of(config)
    task = str(note.get("task"))
    if task in TASKS and TASKS[task].elsewhere:
        return f"This adapter {TASKS[task].elsewhere}."
    is_classifier, classes = config.get("task_type") == "SEQ_CLS", len(note.get("labels") or ())
    auto = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    loaded = f'{auto}.from_pretrained("{base}"{f", num_labels={classes}" if is_classifier and classes else ""})'
    lines = ["import gatewise  # knows this type of adapter"] if config.get("peft_type") in _OWN else []
    lines += [
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained({loaded}, "ADAPTER")  # this folder, or its name on the hub',
    ]
    known = note.get("base") if note.get("base") in EMBEDDED else base
    told = [fenced("\n".join(lines), "python"), "With gatewise:"]
    commands = ["gatewise eval ADAPTER --data rows.jsonl"]
    commands += [] if is_classifier else [f"gatewise serve {known} --adapters {name}=ADAPTER"]
    told.append(fenced("\n".join(commands)))
    try:
        vllm = None if is_classifier else serving_settings(read_lora(folder), None)["vllm"]
    except GatewiseError:  # it is not of LoRA's kind
        vllm = None
    if vllm:
        arguments = vllm["arguments"][: vllm["arguments"].index("--lora-target-modules")]
        extra = ", with gatewise installed beside it" if config.get("peft_type") in _OWN else ""
        told += [f"With vLLM{extra}:", fenced(f"vllm serve {base} {' '.join(arguments)} --lora-modules {name}=ADAPTER")]
    return "\n\n".join(told)


def fenced(text: str, language: str = "") -> str:
    """A block of text as it is, whatever stands in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def table_of(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))
