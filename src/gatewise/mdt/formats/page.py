"""Trees as one HTML page that needs no network: the text on the left, the tree on the right, each marking the other."""

import html
from collections.abc import Sequence
from itertools import pairwise

from gatewise.mdt.formats.page_parts import ARTICLE, PAGE, SCRIPT, STYLE
from gatewise.mdt.formats.svg import main_subject, svg_of
from gatewise.mdt.formats.words import Words, words_for
from gatewise.mdt.records import TreeRecord
from gatewise.mdt.spans import locate_tree
from gatewise.mdt.tree import DecisionTree


def page_of(records: Sequence[TreeRecord]) -> str:
    """A page with one section a record. Everything that comes from the records is escaped."""
    words = words_for(records[0].tree.language)
    title = words.title if len(records) > 1 else f"{words.title}: {_name(records[0])}"
    links = "".join(
        f'<li value="{record.number}"><a href="#record-{i + 1}">{html.escape(_name(record))}</a></li>'
        for i, record in enumerate(records)
    )
    several = f"<nav><details><summary>{words.records} ({len(records)})</summary><ol>{links}</ol></details></nav>"
    return PAGE.format(
        language="zh-Hans" if words.language == "zh" else "en",
        title=html.escape(title),
        style=STYLE,
        script=SCRIPT,
        notice=html.escape(words.notice),
        hint=html.escape(words.hint),
        records=several if len(records) > 1 else "",
        articles="".join(_article(record, i, named=len(records) > 1) for i, record in enumerate(records)),
    )


def _article(record: TreeRecord, i: int, named: bool) -> str:
    words = words_for(record.tree.language)
    prefix = f"record-{i + 1}"
    mark = record.text.find("@")
    pieces = _marked(record, words.language)
    population = "".join(piece for start, piece in pieces if start < mark)
    passage = "".join(piece for start, piece in pieces if start > mark)
    about = f"<h3>{words.population}</h3><p>{population.strip()}</p>" if mark >= 0 else ""
    text = f"{about}<h3>{words.passage}</h3><p>{passage.strip()}</p>" if record.text.strip() else ""
    note = record.more.get("note")
    return ARTICLE.format(
        prefix=prefix,
        heading=f"<h2>{record.number}. {html.escape(_name(record))}</h2>\n" if named else "",
        text=text,
        note=f'<p class="note">{html.escape(note)}</p>' if isinstance(note, str) else "",
        warnings=_warnings(record, words),
        tree=words.tree,
        svg=svg_of(record.tree, record.text, focusable=True, prefix=f"{prefix}-"),
        as_outline=words.as_outline,
        outline=html.escape(record.tree.to_outline()),
    )


def _warnings(record: TreeRecord, words: Words) -> str:
    """The warnings of the extraction over the tree, so that one that was cut short cannot pass for a whole one."""
    if not record.warnings:
        return ""
    items = "".join(f"<li>{html.escape(warning)}</li>" for warning in record.warnings)
    return f'<section class="warnings"><h3>{html.escape(words.warnings)}</h3><ul>{items}</ul></section>\n'


def _name(record: TreeRecord) -> str:
    return record.population or main_subject(record.tree) or words_for(record.tree.language).title


def _marked(record: TreeRecord, language: str) -> list[tuple[int, str]]:
    """The text in pieces, (start, HTML): plain ones, and those that a node rests on."""
    made = []
    for start, piece, names in pieces_of(record.text, record.tree):
        shown = html.escape(piece)
        if names:
            nodes = ", ".join(dict.fromkeys(str(int(name.split(".")[0]) + 1) for name in names))
            label = f"节点 {nodes}" if language == "zh" else f"node {nodes}"
            shown = f'<mark tabindex="0" data-of="{" ".join(names)}" title="{label}">{shown}</mark>'
        made.append((start, shown))
    return made


def pieces_of(text: str, tree: DecisionTree) -> list[tuple[int, str, list[str]]]:
    """The text in pieces, (start, piece, names of the triples that rest on it as "node.triple"), without the population's "@"."""
    rests: list[tuple[int, int, str]] = []
    for i, row in enumerate(locate_tree(text, tree)):
        for j, spans in enumerate(row):
            rests += [(span.start, span.end, f"{i}.{j}") for span in spans if span is not None]
    mark = text.find("@")
    cuts = {0, len(text), *(edge for start, end, _ in rests for edge in (start, end))}
    cuts |= {mark, mark + 1} if mark >= 0 else set()
    pieces = []
    for start, end in pairwise(sorted(cuts)):
        if start == mark:
            continue
        names = dict.fromkeys(name for begin, stop, name in rests if begin <= start and end <= stop)
        pieces.append((start, text[start:end], list(names) if text[start:end].strip() else []))
    return pieces
