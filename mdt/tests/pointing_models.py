"""Tiny pointing models, and recipes and adapters of them on disk, for the tests of pointing."""

import json
from pathlib import Path
from typing import Any

import torch
from gatewise_mdt import DecisionTree
from gatewise_mdt.pointing.heads import HeadSettings
from gatewise_mdt.pointing.model import PointingModel
from gatewise_mdt.records import TreeRecord
from mdt_trees import TEXT, gout, node, triple
from tiny_run import SIZES, byte_tokenizer, write_base
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

POSITIONS = 512
GOUT = TreeRecord(TEXT, DecisionTree.from_preorder(gout()), 1)
"""Nodes joined by "and" and "or", a subject that is another phrase, an empty leaf."""


def _record(number: int, text: str, *nodes: dict[str, Any]) -> TreeRecord:
    return TreeRecord(text, DecisionTree.from_preorder(list(nodes)), number)


def _of(population: str) -> Any:
    return lambda phrase, relation="clinical manifestation", subject=population: triple(phrase, relation, subject)


_COUGH, _BURN, _NOBODY = _of("children with cough"), _of("burns"), _of("the ward")
RECORDS = [
    GOUT,
    _record(
        2,
        "children with cough@If there is fever, give amoxicillin; if not, honey will do.",
        node("C", _COUGH("fever")),
        node("D", _COUGH("amoxicillin", "drug therapy")),
        node("D", _COUGH("honey", "therapeutic schedule")),
    ),
    _record(
        3,
        "burns@Cool it with water. If blisters or pain persist, see a surgeon, unless the skin is closed: then use a dressing.",
        node("C", _BURN("blisters"), _BURN("pain persist"), joined="or"),
        node("C", _BURN("skin is closed", "basic condition")),
        node("D", _BURN("dressing", "therapeutic schedule")),
        node("D", _BURN("see a surgeon", "therapeutic schedule")),
        node("D", _BURN("Cool it with water", "therapeutic schedule")),
    ),
    _record(4, "the ward@Wash your hands.", node("D", _NOBODY("Wash your hands", "therapeutic schedule"))),
]
"""Four short passages; the last is a decision alone."""


def encoder(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random two-layer model without a head, for the tokenizer of bytes."""
    sizes = SIZES | {"vocab_size": len(byte_tokenizer()), "max_position_embeddings": POSITIONS, "pad_token_id": 0} | changes
    made = LlamaModel(LlamaConfig(**sizes)) if family == "llama" else BertModel(BertConfig(**sizes))
    return made.eval()


def pointing_model(family: str = "llama", **settings: Any) -> PointingModel:
    """A random one without dropout, whose heads say something about everything."""
    torch.manual_seed(0)
    model = PointingModel(encoder(family), HeadSettings(**({"hidden": 16, "width": 16, "longest": 8, "dropout": 0.0} | settings)))
    return model.eval()


def write_trees(path: Path, records: list[TreeRecord]) -> Path:
    path.write_text(json.dumps([record.to_json() for record in records]), encoding="utf-8")
    return path


def write_pointing(folder: Path, method: str = "lora", family: str = "llama", **changes: Any) -> Path:
    """A recipe of a few steps with everything it names beside it; ``changes`` replace whole sections."""
    if not (folder / family).exists():
        write_base(folder / family, family, max_position_embeddings=POSITIONS)
        write_trees(folder / "train.json", RECORDS * 2)
        write_trees(folder / "dev.json", RECORDS)
    tree: dict[str, Any] = {
        "method": method,
        "task": "text2mdt",
        "model": family,
        "dtype": "float32",
        "data": {"train": "train.json", "dev": "dev.json", "held_out": 2},
        "pointing": {"swapped": 0, "width": 16, "longest": 8, "dropout": 0.1},
        "peft": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "save_every": 2},
    }
    if method in ("alora", "pi-lora"):
        tree["allocation"] = {"rounds": 1, "first_round": 2, "recover": 1}
    if method == "adalora":
        tree["adalora"] = {"init_r": 3, "tinit": 1, "tfinal": 1}
    if method == "milora":
        tree["routing"] = {"top_k": 2, "activation_every": 2, "activation_learning_rate": 0.01}
    if method == "spt":
        del tree["peft"]
        tree["prompts"] = {"num_prompt_tokens": 3, "bottleneck": 4}
        tree["search"] = {"keep": 1, "max_steps": 2, "consistency": 0}
    path = folder / f"{method}-{family}.yaml"
    path.write_text(json.dumps({key: value for key, value in (tree | changes).items() if value is not None}), encoding="utf-8")
    return path
