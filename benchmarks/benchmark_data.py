"""The tasks of the benchmarks: their rows, prompts and, for Text2MDT, a tree written as lines of text."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gatewise.losses import labelled_logits
from gatewise.tasks import PadCollator, Records, Template, load_records

TEMPLATES = {
    "sst2": "Review: {text}\nSentiment:",
    "mr": "Review: {text}\nSentiment:",
    "subj": "Sentence: {text}\nThis is:",
    "rte": "Text: {premise}\nClaim: {hypothesis}\nDoes the claim follow?",
    "trec": "Question: {text}\nType of answer:",
    "text2mdt": "Guideline: {source}\nDecision tree:\n",
}


def load_task(task: str, data_dir: Path) -> tuple[Records, Records, Template]:
    """Training rows, dev rows and the template of a task in the data folder."""
    template = Template(TEMPLATES[task])
    if task == "text2mdt":
        return _trees(data_dir / task / "en_train.json"), _trees(data_dir / task / "en_dev.json"), template
    train = load_records(data_dir / task / "train.jsonl")
    return train, load_records(data_dir / task / "dev.jsonl", labels=train.labels), template


def shuffled(records: Records, seed: int, limit: int | None = None) -> Records:
    """The rows (or the first ``limit`` of them) in an order drawn from the seed."""
    rows = list(records.rows)
    random.Random(seed).shuffle(rows)
    return replace(records, rows=rows[:limit])


def teacher_forced(model: Any, features: list[dict[str, list[int]]], collate: PadCollator) -> dict[str, float]:
    """Share of the answers' tokens that are the most likely next one after the right ones before, and their mean loss (nats)."""
    right, loss, count = 0, 0.0, 0
    rows = sorted(features, key=lambda row: len(row["input_ids"]))
    model.eval()
    for start in range(0, len(rows), 16):
        batch = collate(rows[start : start + 16])
        labels = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
        with torch.no_grad():
            logits = labelled_logits(model, batch, labels != -100).float()
        gold = labels[labels != -100]
        right += int((logits.argmax(-1) == gold).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, gold, reduction="sum"))
        count += len(gold)
    return {"token_accuracy": right / count, "loss": loss / count, "n": count}


def _trees(path: Path) -> Records:
    rows: list[dict[str, Any]] = []
    for item in json.loads(path.read_text(encoding="utf-8")):
        rows.append({"source": item["text"].strip(), "target": "\n".join(map(_node, item["tree"]))})
    return Records("generation", rows, None, str(path))


def _node(node: dict[str, Any]) -> str:
    """A node in pre-order as one line: its role, how its triples are joined, and the triples."""
    joined = "" if node["logical_rel"] == "null" else f" {node['logical_rel']}"
    triples = "; ".join(" | ".join(part.strip() for part in triple) for triple in node["triples"])
    return f"{node['role']}{joined}: {triples}".rstrip(": ")
