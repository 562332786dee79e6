"""What of the published trees can be said in the words of their texts: by a check of phrases, and by pointing. No model, seconds.

A phrase stands in its text by whole words and doses (`gatewise_mdt.spans.find`), or its letters alone do, as a part of something
else. A triple has a place where pointing could learn it (`pointed_at`). Of what it would learn a tree is made again: the share of
triples that are in it, and of trees that are the same, as `gatewise mdt evaluate` counts them. A tree that loses a node loses all.

Do the annotators cut alike? A phrase of one passage is looked for in the others of its language. Where a phrase of theirs is these
very words, it was cut alike; where it is more or fewer of them, and the words of both stand here too, otherwise. Other places say
nothing. A phrase counts once, with the share of its places that are cut otherwise; of those cut alike, the relation is compared.
What only one of the two has is counted by kind: articles alone, words with a bracket, other words, or nothing (one phrase or two).

    python mdt/benchmarks/mdt_phrases.py --data-dir DATA      # DATA/text2mdt/en_train.json, ...; writes results/mdt_phrases.json
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
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
ARTICLES, BRACKETS = {"a", "an", "the"}, set("()[]（）【】〔〕")


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


def cut_alike(paths: Sequence[Path]) -> dict[str, Any]:
    """How often the same words are another phrase in another passage, and how often the same phrase has another relation."""
    records = [record for path in paths for record in read_records(str(path))]
    units = [Units.of(record.text) for record in records]
    found = [pointed_at(record, one).mentions for record, one in zip(records, units, strict=True)]
    words = [[one.phrase(i, i + 1).casefold() for i in range(len(one))] for one in units]
    places = defaultdict(list)
    for passage, its in enumerate(words):
        for i, word in enumerate(its):
            places[word].append((passage, i))
    cut, related, by = [], [], Counter[str]()
    for passage, mentions in enumerate(found):
        for mention in mentions:
            phrase, alike, otherwise, same = words[passage][mention.begin : mention.end], 0, 0, []
            for other, begin in places[phrase[0]]:
                end = begin + len(phrase)
                theirs = [one for one in found[other] if one.begin < end and begin < one.end]
                if other == passage or words[other][begin:end] != phrase or not theirs:
                    continue
                if (theirs[0].begin, theirs[0].end) == (begin, end):
                    alike += 1
                    same.append(theirs[0].kind == mention.kind)
                    continue
                # All words of both phrases, which must stand around this one, too.
                first, last = min(begin, theirs[0].begin), max(end, theirs[-1].end)
                here = mention.begin - (begin - first)
                if here >= 0 and words[passage][here : here + last - first] == words[other][first:last]:
                    otherwise += 1
                    ours, its = set(range(begin, end)), {i for one in theirs for i in range(one.begin, one.end)}
                    differ = {words[other][i] for i in ours ^ its}
                    what = "articles" if differ <= ARTICLES else "brackets" if differ & BRACKETS else "other words"
                    by[what if differ else "one or two"] += 1
            if alike + otherwise:
                cut.append(otherwise / (alike + otherwise))
            if same:
                related.append(fmean(same))
    return {
        "phrases": sum(map(len, found)), "with their words in a phrase elsewhere": len(cut),
        "cut otherwise": round(fmean(cut), 4), "places cut otherwise, by": by, "another kind": round(1 - fmean(related), 4),
    }  # fmt: skip


def main() -> None:
    """Counts, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    files = {
        language: {part: options.data_dir / "text2mdt" / f"{language}_{part}.json" for part in ("train", "dev")}
        for language in LANGUAGES
    }
    made = {f"{language}_{part}": of_file(path, language) for language, parts in files.items() for part, path in parts.items()}
    for name, one in made.items():
        print(name, json.dumps(one, ensure_ascii=False))
    print(sum(one["phrases"] for one in made.values()), "phrases")
    alike = {f"{language}, cut alike": cut_alike([*parts.values()]) for language, parts in files.items()}
    print(json.dumps(alike))
    write_json(options.out, made | alike)


if __name__ == "__main__":
    main()
