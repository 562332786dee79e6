"""What reading tears apart: random documents of each format with known rows and conditions, as the tests make them. No model.

A fact is a sentence, or a row of a table with what stands over it. It is torn if no passage says all of its words with none of
another fact's between them. Where each passage that has a part of it says that it should be compared with the document, it is
"torn, noted", else "torn". "kept, noted" says how many of those that are read well are doubted.

    python mdt/benchmarks/reading.py                      # 540 documents a format; writes results/reading.json
    python mdt/benchmarks/reading.py --only pdf --show    # and which facts are torn
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random

from gatewise.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reading_corpus import LISTS, SHAPES, Fact, Part, Prose, Table, content, content_with_lists, count, facts_of, torn
from reading_markup import docx_of, html_of, markdown_of, text_of
from reading_pdf import LAYOUTS, LINES, pdf_of
from reading_words import CHINESE, ENGLISH

RESULTS = Path(__file__).parent / "results" / "reading.json"
Made = tuple[str, bytes, str, list[Fact]]
"""A variant's name, a document, its suffix, and its facts."""


def pdfs(documents: int, seed: int) -> Iterator[Made]:
    """Each kind of lines in each layout, in turn, with a table of each shape in turn, or two; a third is Chinese."""
    variants = list(product(LINES, LAYOUTS))
    for number in range(documents):
        random = Random(seed + number)
        lines, layout = variants[number % len(variants)]
        shape = SHAPES[number // len(variants) % len(SHAPES)]
        shapes = [shape] if random.random() < 0.6 else [shape, random.choice(SHAPES)]
        parts = content(random, shapes, random.choice((ENGLISH, ENGLISH, CHINESE)))
        yield f"{lines}, {layout}", pdf_of(parts, random, lines, layout), ".pdf", facts_of(parts)


def marked(write: Callable[[list[Part], Random], bytes], suffix: str) -> Callable[[int, int], Iterator[Made]]:
    """Documents of a format that marks lists and tables: a table of each shape and a list of each kind, in turn, on some two."""

    def documents(count: int, seed: int) -> Iterator[Made]:
        for number in range(count):
            random = Random(seed + number)
            shape, kind = SHAPES[number % len(SHAPES)], LISTS[number // len(SHAPES) % len(LISTS)]
            lists = [kind] if random.random() < 0.6 else [kind, random.choice([other for other in LISTS if other != "steps"])]
            parts = content_with_lists(random, [shape], lists)
            if suffix == ".txt":
                parts = [Prose(tuple(ENGLISH.fillers[:1])) if isinstance(part, Table) else part for part in parts]
            yield f"{kind} list", write(parts, random), suffix, facts_of(parts)

    return documents


FORMATS: dict[str, Callable[[int, int], Iterator[Made]]] = {
    "pdf": pdfs,
    "docx": marked(docx_of, ".docx"),
    "md": marked(markdown_of, ".md"),
    "html": marked(html_of, ".html"),
    "txt": marked(text_of, ".txt"),
}


def main() -> None:
    """Counts, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=540, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FORMATS, help="one format alone")
    parser.add_argument("--show", action="store_true", help="print the facts that are torn without a note")
    parser.add_argument("--keep", type=Path, help="a folder for the documents with such facts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.only and options.out.exists() else {}
    for name in [options.only] if options.only else FORMATS:
        counts: dict[str, Counter[str]] = {}
        for number, (variant, file, suffix, facts) in enumerate(FORMATS[name](options.documents, options.seed)):
            counted = count(file, suffix, facts)
            counts.setdefault(variant, Counter()).update({"documents": 1, **counted})
            if counted["torn"] and options.show:
                print(
                    f"  {name} {number}, {variant}:", *(" | ".join(one.pieces) for one in torn(file, suffix, facts)), sep="\n    "
                )
            if counted["torn"] and options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{number}{suffix}").write_bytes(file)
        keys = ("documents", "facts", "torn", "torn, noted", "kept, noted")
        found[name] = {variant: {key: counted[key] for key in keys} for variant, counted in counts.items()}
        found[name]["all"] = {key: sum(counted[key] for counted in counts.values()) for key in keys}
        for variant, one in found[name].items():
            print(f"{name}, {variant}: " + ", ".join(f"{value} {key}" for key, value in one.items()))
    write_json(options.out, found)


if __name__ == "__main__":
    main()
