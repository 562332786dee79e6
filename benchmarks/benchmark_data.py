"""The tasks of the benchmarks: their rows, prompts and, for Text2MDT, a tree written as lines of text."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatewise.tasks import Records, Template, load_records

TEMPLATES = {
    "sst2": "Review: {text}\nSentiment:",
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
