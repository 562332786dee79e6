"""What the views say besides the tree itself, in English and Chinese."""

import math
from types import SimpleNamespace

from gatewise_mdt.records import DOUBTFUL
from gatewise_mdt.relations import Language
from gatewise_mdt.spans import find, part_of
from gatewise_mdt.tree import Node, Triple


class Words(SimpleNamespace):
    """The words of one language, by the names that they have in the tables below.

    Besides texts these are ``language``, ``heads``, the head of a node by its role and logical_rel, ``joins``, the word between two
    triples, and ``origin``, the phrases of :mod:`gatewise_mdt.formats.origin`.
    """

    def head(self, node: Node) -> str:
        """What stands over the triples of a node."""
        return self.heads[node.role, node.logical_rel]

    def sure(self, confidence: float | None) -> str:
        """How likely a node is right: "confidence 41%, doubtful"; empty where that is not known."""
        if confidence is None:
            return ""
        said = self.confidence.format(percent=percent(confidence))
        return f"{said}{self.comma}{self.doubtful}" if confidence < DOUBTFUL else said

    def part(self, phrase: str, whole: str) -> str:
        """That a phrase stands in the text only as part of other words: "'20 mg' stands ... only as part of '10-20 mg'"."""
        return self.only_part.format(phrase=phrase, whole=whole if len(whole) <= 80 else f"{whole[:79]}…")

    def why_absent(self, text: str, triple: Triple) -> str:
        """Why subject or object of a triple do not count as standing in a text; empty where both do."""
        lost = [phrase for phrase in (triple.subject, triple.object) if not find(text, phrase)]
        wholes = [part_of(text, phrase) for phrase in lost]
        said = [self.absent if whole is None else self.part(phrase, whole) for phrase, whole in zip(lost, wholes, strict=True)]
        return self.comma.join(dict.fromkeys(said))


_ENGLISH = Words(
    language="en",
    title="Decision tree",
    about="Boxes that name no subject are about",
    population="Population",
    headings="Headings",
    notes="Notes on the reading",
    passage="Passage",
    tree="Tree",
    yes="yes",
    no="no",
    nothing="No recommendation",
    absent="not in the text",
    only_part="'{phrase}' stands in the text only as part of '{whole}'",
    notice="Needs review by a clinician. Not medical advice.",
    warnings="Warnings of the extraction: the tree may be incomplete or wrong",
    as_outline="The tree as text",
    hint="Point at a box, or go to it with the Tab key, to see its phrases in the text; or the other way round.",
    records="Records",
    comma=", ",
    confidence="confidence {percent}%",
    doubtful="doubtful",
    confidence_means="Confidence is how likely the model's node is right, as measured on dev passages; below 50% it is doubtful.",
    heads={
        ("C", "null"): "If",
        ("C", "and"): "If all of these",
        ("C", "or"): "If any of these",
        ("D", "null"): "Then",
        ("D", "and"): "Then all of these",
        ("D", "or"): "Then any of these",
    },
    joins={"and": "and", "or": "or"},
    semicolon="; ",
    stop=".",
    colon=": ",
    record="Record {number}",
    patient="A patient ({who})",
    anybody="A patient",
    any="whatever else is true",
    fact_not="not: {fact}",
    same={True: "The same patient, but with: {fact}.", False: "The same patient, but not: {fact}."},
    avoid="do not use",
    expected="Expected: {what} (node {node}).",
    nobody="No patient comes to node {node} ({what}): the conditions on the way to it contradict each other.",
    origin={
        "approved": "approved",
        "approved_by": "approved by {by}",
        "corrected": "corrected",
        "corrected_by": "corrected by {by}",
        "read": "who read another version of the document (SHA-256 {sha256})",
        "comment": ': "{comment}"',
        "from": "from {source}",
        "characters": "characters {start} to {end} of its text",
        "drafted": "drafted by {model}",
        "on": "{adapter} on {base}",
        "version": " with gatewise {version}",
    },
)
_CHINESE = Words(
    language="zh",
    title="诊疗决策树",
    about="未写明主体的内容均针对",
    population="适用人群",
    headings="标题",
    notes="读取说明",
    passage="原文",
    tree="决策树",
    yes="是",
    no="否",
    nothing="无推荐",
    absent="原文中未找到",
    only_part="“{phrase}”在原文中只作为“{whole}”的一部分出现",
    notice="须经临床医生审核，不构成医疗建议。 Needs review by a clinician.",
    warnings="提取过程有警告，决策树可能不完整或有误",
    as_outline="文本形式的决策树",
    hint="指向一个方框，或用 Tab 键选中它，即可在原文中看到对应词语；反之亦然。",
    records="记录",
    comma="，",
    confidence="置信度 {percent}%",
    doubtful="存疑",
    confidence_means="置信度表示模型给出的节点正确的可能性，由开发集段落测得；低于 50% 标为存疑。",
    heads={
        ("C", "null"): "如果",
        ("C", "and"): "如果同时满足",
        ("C", "or"): "如果满足任一",
        ("D", "null"): "则",
        ("D", "and"): "则全部采用",
        ("D", "or"): "则任选其一",
    },
    joins={"and": "且", "or": "或"},
    semicolon="；",
    stop="。",
    colon="：",
    record="记录 {number}",
    patient="患者（{who}）",
    anybody="患者",
    any="无论其他情况如何",
    fact_not="不符合：{fact}",
    same={True: "其他相同，但符合：{fact}。", False: "其他相同，但不符合：{fact}。"},
    avoid="不得使用",
    expected="预期：{what}（节点 {node}）。",
    nobody="没有患者会到达节点 {node}（{what}）：途中的条件互相矛盾。",
    origin={
        "approved": "已批准",
        "approved_by": "由 {by} 批准",
        "corrected": "已修改",
        "corrected_by": "由 {by} 修改",
        "read": "审核时所读为文件的另一版本（SHA-256 {sha256}）",
        "comment": "：“{comment}”",
        "from": "来自 {source}",
        "characters": "文本第 {start} 至 {end} 个字符",
        "drafted": "由 {model} 起草",
        "on": "{adapter}（基于 {base}）",
        "version": "，gatewise {version}",
    },
)


def percent(confidence: float) -> int:
    """A confidence in whole percent, never more than it is: 0.499 is 49 and not the 50 from which on a node is not doubtful."""
    return math.floor(round(100 * confidence, 6))


def words_for(language: Language) -> Words:
    """The words of a language."""
    return _CHINESE if language == "zh" else _ENGLISH
