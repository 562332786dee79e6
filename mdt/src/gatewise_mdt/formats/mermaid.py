"""A decision tree as a Mermaid flow chart, for Markdown pages and wikis that draw it."""

import re
from collections.abc import Mapping

from gatewise_mdt.formats.origin import confidence_of, origin_of
from gatewise_mdt.formats.svg import kind_of, label_of, main_subject
from gatewise_mdt.formats.words import Words, words_for
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import absent_triples
from gatewise_mdt.tree import Node, Triple

# What Mermaid or the HTML it makes would take for its own; written as the entity codes that Mermaid knows.
_CODES = str.maketrans({character: f"#{ord(character)};" for character in '#"<>&;`\\*_~[]{}|()@%:'})
# Some builds read labels as Markdown, and put "Unsupported markdown: list" in place of one with a line such as "1. Treatment".
_MARKDOWN = re.compile(r"^(\s*\d*)([.+=-])(?=[\s=-]|$)")
# Line breaks of every kind would end the node's line; other control characters have no place in a chart.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_STYLES = {
    "condition": "fill:#e8f0fb,stroke:#2f6db5,color:#18222d",
    "decision": "fill:#e6f4ea,stroke:#2d7d46,color:#18222d",
    "nothing": "fill:#f5f6f7,stroke:#7c8894,color:#55636f,stroke-dasharray:5 4",
    "notice": "fill:#fff4e5,stroke:#9a4b00,color:#9a4b00",
}


def mermaid_of(record: TreeRecord) -> str:
    """The chart's source: a node a line, then the edges, then the looks. The notice is a box of its own, with headings and
    warnings; where the tree comes from is said in comments, which are not drawn."""
    tree, words, main = record.tree, words_for(record.tree.language), main_subject(record.tree)
    missing = absent_triples(record.text, tree) if record.text.strip() else ()
    absent = {triple: words.why_absent(record.text, triple) for triple in missing}
    lines = ["flowchart TD", *(f"  %% {_comment(phrase)}" for phrase in origin_of(record))]
    about = "".join(f"<br/>{_escaped(one)}" for one in (" › ".join(record.headings), main) if one)
    warned = f"<br/>{_escaped(words.warnings)}" if record.warnings else ""
    warned += "".join(f"<br/>! {_escaped(warning)}" for warning in record.warnings)
    sure = [words.sure(one) for one in confidence_of(record)] or [""] * len(tree.nodes)
    warned += f"<br/>{_escaped(words.confidence_means)}" if any(sure) else ""
    lines.append(f'  notice["{_escaped(words.notice)}{about}{warned}"]:::notice')
    for i, node in enumerate(tree.nodes):
        opened, closed = ('("', '")') if node.is_condition else ('["', '"]')
        beside = f"<br/><i>{_escaped(sure[i])}</i>" if sure[i] else ""
        lines.append(f"  n{i + 1}{opened}{_label(node, main, words, absent)}{beside}{closed}:::{kind_of(node)}")
    for i, both in enumerate(tree.children):
        if both is not None:
            lines += [f"  n{i + 1} -->|{words.yes}| n{both[0] + 1}", f"  n{i + 1} -.->|{words.no}| n{both[1] + 1}"]
    lines += [f"  classDef {name} {style}" for name, style in _STYLES.items()]
    return "\n".join(lines) + "\n"


def _label(node: Node, main: str, words: Words, absent: Mapping[Triple, str]) -> str:
    if node.is_empty:
        return _escaped(words.nothing)
    join = f"<br/><i>{words.joins.get(node.logical_rel, '')}</i><br/>"
    triples = join.join(
        f"{_escaped(label_of(triple, main))}: <b>{_escaped(triple.object)}</b>"
        + (f"<br/>({_escaped(absent[triple])})" if triple in absent else "")
        for triple in node.triples
    )
    return f"{words.head(node)}<br/>{triples}"


def _comment(text: str) -> str:
    """What is left out when the chart is drawn, unless it holds a directive, "%%{…}%%"."""
    return re.sub("[%{}]", lambda found: f"#{ord(found[0])};", _CONTROL.sub(" ", text))


def _escaped(text: str) -> str:
    """A text that begins a line of a label or stands within one."""
    return _MARKDOWN.sub(lambda found: f"{found[1]}#{ord(found[2])};", _CONTROL.sub(" ", text).translate(_CODES))
