"""What of the published trees can be said in the words of their texts: by a check of phrases, and by pointing. No model, seconds.

A phrase stands in its text by whole words and doses (`gatewise_mdt.spans.find`), or its letters alone do, as a part of something
else. A triple has a place where pointing could learn it (`pointed_at`). Of what it would learn a tree is made again: the share of
triples that are in it, and of trees that are the same, as `gatewise mdt evaluate` counts them. A tree that loses a node loses all.

    python mdt/benchmarks/mdt_phrases.py --data-dir DATA      # DATA/text2mdt/en_train.json, ...; writes results/mdt_phrases.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from gatewise_mdt.evaluation.metrics import evaluate
from gatewise_mdt.pointing.targets import pointed_at, tree_of
from gatewise_mdt.pointing.task import read_records
from gatewise_mdt.pointing.units import Units
from gatewise_mdt.relations import Language
from gatewise_mdt.spans import find, part_of

from gatewise.files import write_json

LANGUAGES: tuple[Language, ...] = ("en", "zh")
RESULTS = Path(__file__).parent / "results" / "mdt_phrases.json"


def of_file(path: Path, language: Language) -> dict[str, Any]:
    """Counts and shares of a file of trees."""
    records = read_records(str(path))
    phrases, stand, triples, left_out, parts, said = 0, 0, 0, 0, [], []
    for record in records:
        for phrase in sorted({phrase for triple in record.tree.triples for phrase in (triple.subject, triple.object)}):
            phrases += 1
            if find(record.text, phrase):
                stand += 1
            elif (words := part_of(record.text, phrase)) is not None:
                parts.append([phrase, words])
        units = Units.of(record.text)
        pointed = pointed_at(record, units)
        said.append(tree_of(pointed, units, language))
        triples += sum(len(node.triples) for node in record.tree.nodes)
        left_out += pointed.left_out
    found = evaluate([record.tree for record in records], said)
    return {
        "trees": len(records), "phrases": phrases, "phrases in text": stand, "parts of something else": parts,
        "triples": triples, "triples without a place": left_out, "triples in trees by pointing": round(found.triplet_recall, 4),
        "tree accuracy by pointing": round(found.tree_acc, 4),
    }  # fmt: skip


def main() -> None:
    """Counts, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    made = {
        f"{language}_{part}": of_file(options.data_dir / "text2mdt" / f"{language}_{part}.json", language)
        for language in LANGUAGES
        for part in ("train", "dev")
    }
    for name, one in made.items():
        print(name, json.dumps(one, ensure_ascii=False))
    print(sum(one["phrases"] for one in made.values()), "phrases")
    write_json(options.out, made)


if __name__ == "__main__":
    main()
