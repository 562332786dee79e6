"""Conditions and recommendations of the text of which no triple has anything, and trees and leaves that are empty."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from gatewise_mdt.checking.cover import Cover
from gatewise_mdt.checking.finding import Finding, quoted
from gatewise_mdt.checking.marks import HAN, Marks, Span, set_of
from gatewise_mdt.checking.numbers import DRUG_STEM
from gatewise_mdt.relations import AVOIDS, GIVES
from gatewise_mdt.wholes import fold


def empty_trees(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """No decision says anything, and the text advises something."""
    if marks.recommends and all(node.is_empty or node.is_condition for node in cover.tree.nodes):
        yield Finding(Span(0, len(marks.text)), 0, "The tree recommends nothing, and the text does.")


def empty_leaves(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A condition that leads to nothing where it holds."""
    nodes, children = cover.tree.nodes, cover.tree.children
    if all(node.is_empty or node.is_condition for node in nodes) or not marks.recommends:
        return
    for number, both in enumerate(children):
        if both is None:
            continue
        yes = both[0]
        if nodes[yes].is_empty and not nodes[yes].is_condition:
            place = next((one for triple in cover.held if triple.node == number for one in triple.objects), None)
            if place is None or not marks.is_exception(place.begin):
                held = nodes[number].triples[0].object
                yield Finding(place, yes, f"Where {quoted(held)} holds, the tree recommends nothing.", held)


def lost_otherwise(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """The text says what is to be done otherwise, and nothing of that is in the tree."""
    for span in marks.otherwise:
        sentence = marks.sentence_at(span.begin)
        rest = Span(span.end, sentence.end)
        if not cover.touches(rest):
            yield Finding(Span(span.begin, sentence.end), None, "No triple has anything of {words}.")


_STATE = re.compile(
    r"pregnan|breast-?feed|lactation|(?<![a-z])(?:acute|severe)|emergenc|exacerbat|allerg|妊娠|孕|哺乳|急性|重症|过敏"
)


def lost_headings(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A heading that names a state, which is a condition of all below it, and of which no triple has a word."""
    said = fold(" ".join(phrase for triple in cover.tree.triples for phrase in (triple.subject, triple.object))).text
    for heading in marks.named_above:
        words = [marks.text[a:b] for (a, b), _ in contents(marks.text, heading)]
        named = _STATE.search(marks.text, *heading) and not any(map(heading.overlaps, marks.conditions))
        if named and not any(word in said for word in words):
            yield Finding(heading, None, "No triple has anything of the heading {words}, a condition of all below it.")


# ---- words that no triple has ----

# How sure it is that a stretch of one, two, three, or four and more words was lost: of a condition or another part of a sentence,
# with nothing else in this part or with words that a triple has. Measured as in gatewise_mdt.checking.rules.
_SURE = {
    ("condition", True): (0.36, 0.7, 0.76, 0.9),
    ("condition", False): (0.08, 0.19, 0.35, 0.44),
    ("other", True): (0.44, 0.56, 0.6, 0.62),
    ("other", False): (0.1, 0.2, 0.27, 0.42),
}
_HARDLY = 0.15
_PURPOSES = 0.05
_DRUGS = 0.5


class Stretch(NamedTuple):
    """Words that say something and that no triple has.

    Attributes:
        size: how many words; of Chinese, half as many as there are signs.
        is_whole: nothing else stands in this part of the sentence, as commas and "and" part it.
        is_purpose: what something is done for ("to relieve pain").
        is_background: of a sentence that advises nothing, and of which no triple has anything; or of a heading, but
            for its conditions, and where it may name the drug of a dose, as no triple does.
        is_drug: a word in it is built like the name of a drug, or it stands before a dose.
        is_restriction: of a sentence with "only if".
    """

    span: Span
    size: int
    is_whole: bool
    is_condition: bool
    is_purpose: bool
    is_background: bool
    is_drug: bool
    is_restriction: bool

    @property
    def sure(self) -> float:
        row = _SURE["condition" if self.is_condition else "other", self.is_whole]
        sure = _PURPOSES if self.is_purpose or self.is_background else row[min(self.size, len(row)) - 1]
        if (self.is_drug and not self.is_condition) or (self.is_restriction and self.is_condition):
            return max(sure, _DRUGS)
        return sure


def lost_conditions(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A part of a condition that no triple has."""
    for one in uncovered(cover):
        if one.is_condition and one.sure > _HARDLY:
            yield Finding(one.span, None, "No triple has this condition: {words}.", sure=one.sure)


def lost_recommendations(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A part of a sentence, outside its conditions, that no triple has."""
    for one in uncovered(cover):
        if not one.is_condition and one.sure > _HARDLY:
            yield Finding(one.span, None, "No triple has this: {words}.", sure=one.sure)


def lost_words(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """What else no triple has: single words of phrases, what something is done for, and sentences that advise nothing."""
    for one in uncovered(cover):
        if one.sure <= _HARDLY:
            yield Finding(one.span, None, "No triple has {words}.", sure=one.sure)
    for number in marks.numbers:
        if number.kind != "dose" and cover.is_background(number.begin):
            yield Finding(number.span, None, "No triple has {words}.", sure=_PURPOSES)


_GLUE = set_of(
    """
    a an and or the of to in on at by for from with without as that this these those which who whose whom it its is are was were
    be been being has have had having do does did can could may might must should shall will would if when where while than then
    age aged ages
    there their they them we he she not no nor but however also both either each any all some such other others another same more
    most less least very well further e.g i.e eg etc via per into onto upon within after before during until unless otherwise
    instead because due through between among under over above below up down out about against patient patients people person
    persons individual individuals case cases subject subjects adult recommend recommended recommends recommendation
    recommendations suggest suggested suggests advise advised advisable consider considered consideration considering indicate
    indicated preferred prefer preferable first choice option options appropriate treatment treatments treat treated treating
    therapy therapies therapeutic use used using usage administer administered administration administering give given giving
    receive received receiving perform performed performing undergo undergoing undergone apply applied choose chosen select
    selected selection start started initiate initiated initial initially add added addition additional effective effectively
    effect effects benefit beneficial help helpful needed need required require necessary feasible possible important able
    available reasonable standard common commonly usual usually generally general routine routinely often once only especially
    particularly mainly mostly following follow followed according based depending including include includes included example
    etc. order achieve reduce improve prevent control relieve maintain dose doses dosage dosages daily day days week weeks month
    months year years time times hour hours symptom symptoms sign signs combination combined combine along accompanied accompany
    occur occurs occurred occurring suitable disease diseases experience experiences experienced experiencing present presents
    presenting presence medication medications medicine medicines drug drugs agent agents measure measures supplement supplements
    supplemented supplementation take taken taking avoid avoided avoiding stop stopped offer offered provide provided suffer
    suffering condition conditions type types approach method methods regimen warranted candidate candidates majority intervals
    event possibility strategy strategies like still first-line second-line long-term short-term whenever rather involve involving
    resulting result results evidence guideline guidelines function period beginning course underlying certain various different
    specific current currently recent recently new remain remains become becomes continue continued show shows showing employed
    adjusted adjust one two three principle role study studies known called named quality low high means way ways management
    intervention interventions care clinical medical level levels number even much many few prescribe prescribed increase
    increased alternative alternatives contraindicated prohibited forbidden step steps mmhg kg cm mm m2 mg ml min bpm mmol mol
    kcal dl
    """
)
"""English words that say nothing of their own in a guideline."""
# Signs of the list after it that are parts of other words here.
_HAN_WORDS = (
    "发作|正常|异常|失常|中度|中重度|中性|中枢|中毒|中期|中段|卒中|术中|术后|术前|产后|餐后|餐前|前列|前壁|下肢|下降|下腔|皮下|后遗|后腹|无效|不良"
    "|不全|不足|时间|对乙酰|行为|功能|能量|智能|未成年|无症状|多发|多巴|多囊|多形|合并症|并发症|出现率|有创|无创|有氧|给氧|月经|服药|日光|外科|外伤|体外"
    "|颅外|成年|老年|青年|少年|除颤|剔除|切除|清除|剂型|因子|病因|原因|从而|至少|被动|先天|先兆|后天|再生|再发|再次|再灌注|而且|同期|同侧|中心|中央"
)
_HAN_GLUE = re.compile(
    f"(?P<word>{_HAN_WORDS})|"
    "患者|病人|患儿|病例|对于|对|应该|应当|应|可以|可|宜|需要|需|必须|推荐|建议|首选|选用|选择|采用|采取|使用|应用|给予|予以|予|进行|行|治疗|用药|用于|药物"
    "|方案|方法|以及|及时|及|和|或者|或|与|同时|并且|并|且|的|了|者|时|后|前|中|下|为|是|有|无|未|不|如果|如|若|当|则|其|其他|其它|等|均|都|也|还|而|但|即|于|在"
    "|由|从|向|至|到|以|因|故|该|此|这|那|可能|考虑|情况|一般|通常|常规|常|多|较|更|最|效果|有效|有利|使|能|将|被|把|让|出现|发生|存在|伴有|伴|合并|患有|具有"
    "|目前|首先|其次|然后|必要|注意|适用|适合|适当|尽量|尽可能|尽早|积极|严格|视|根据|按|依|通过|避免|禁用|禁忌|忌用|慎用|不宜|停用|否则|反之|除|外|只|仅|再|又|先|加用|加|改用|改|联合"
    "|用|做|给|服|口服|静脉|注射|剂量|每日|每天|每周|每次|每|次|日|天|周|月|年|岁|小时"
)


_PARTS = re.compile(r"[,，、;；:：()（）\[\]]|(?<![a-z])(?:and|or|and/or)(?![a-z])|或者?|以?及|并且|(?<![饱总])和|合并|伴")
_BEFORE_DOSE = re.compile(r"[ (,:]{0,3}")
_PURPOSE = re.compile(
    r"(?<![a-z])(?:(?:in order )?to (?:relieve|reduce|prevent|control|correct|lower|achieve|improve|assist|ensure|avoid|maintain"
    r"|alleviate|increase|promote|clarify|decrease|minimi[sz]e|help|facilitate|protect|restore|treat|cure|slow|provide|enhance"
    r"|eliminate|manage)|aiming (?:at|to)|for the purpose of"
    r"|(?:which|that) (?:can|may) (?:reduce|improve|lead|cause))(?![a-z])[^,;.]*"
    r"|(?:以|可|能|从而|有助于|有利于|用以|为了)(?:便|求|期|达到)?(?:减轻|减少|改善|促进|预防|控制|降低|延长|防止|缓解|提高|抑制|维持"
    r"|保护|避免|加速|增加|增强|消除|恢复|明确|挽救|干扰|阻断)[^。,;]*"
)


@lru_cache(maxsize=1)  # for the three rules above, each of which takes a part of them
def uncovered(cover: Cover) -> tuple[Stretch, ...]:
    """The stretches of content that no triple has."""
    return tuple(_uncovered(cover.marks, cover))


def _uncovered(marks: Marks, cover: Cover) -> Iterator[Stretch]:
    text = marks.text
    skipped = [number.span for number in marks.numbers]  # which have rules of their own
    skipped += [limit.words for limit in marks.limits]  # the same
    skipped += [name for name in marks.repeated_names if not any(map(name.overlaps, marks.conditions))]
    doses = [number.begin for number in marks.numbers if number.kind == "dose"]
    purposes = [Span(*match.span()) for match in _PURPOSE.finditer(text)]

    def alike(span: Span) -> tuple[Span, ...]:
        """Where a word stands: of a heading, it is enough that a triple has it from the text below."""
        return (span, *cover.places(text[span.begin : span.end])) if marks.is_named_above(span.begin) else (span,)

    has_drug = not doses or any(one.relation in (*GIVES, AVOIDS) for one in cover.held)
    for clause in marks.clauses:
        background = cover.is_background(clause.begin)
        ends = [*(match.span() for match in _PARTS.finditer(text, *clause)), (clause.end, clause.end)]
        begin = clause.begin
        for end, after in ends:
            words = [one for one in contents(text, Span(begin, end)) if not any(map(one[0].overlaps, skipped))]
            lost = [(span, weight) for span, weight in words if not any(map(cover.touches, alike(span)))]
            implied = any(Span(begin, end).holds(one.span) for one in cover.implied)
            for run in _runs(words, lost):
                span = Span(run[0][0].begin, run[-1][0].end)
                size = sum(weight for _, weight in run)
                purpose = any(one.begin <= span.begin < one.end for one in purposes)
                is_drug = any(at >= span.end and _BEFORE_DOSE.fullmatch(text, span.end, at) for at in doses)
                is_drug |= DRUG_STEM.search(text, *span) is not None
                condition, restricted = marks.in_condition(span.begin), marks.is_restricted(span.begin)
                aside = background or (has_drug and not condition and marks.is_named_above(span.begin))
                if not (implied and condition):
                    yield Stretch(span, size, len(run) == len(words), condition, purpose, aside, is_drug, restricted)
            begin = after


def _runs(words: list[tuple[Span, int]], lost: list[tuple[Span, int]]) -> Iterator[list[tuple[Span, int]]]:
    """Words that follow each other."""
    run: list[tuple[Span, int]] = []
    for one in words:
        if one in lost:
            run.append(one)
        elif run:
            yield run
            run = []
    if run:
        yield run


def contents(text: str, clause: Span) -> Iterator[tuple[Span, int]]:
    """The words that say something, with their weights."""
    for match in re.compile(rf"[{HAN}]+|[^\W{HAN}_](?:[^\s{HAN},;:()，；：、。（）]*[^\W{HAN}_])?").finditer(text, *clause):
        if re.match(rf"[{HAN}]", match[0]):
            at = match.start()
            for glue in [*(one for one in _HAN_GLUE.finditer(text, *match.span()) if not one["word"]), None]:
                end = glue.start() if glue else match.end()
                if end - at >= 2:
                    yield Span(at, end), (end - at + 1) // 2
                at = glue.end() if glue else end
        elif match[0] not in _GLUE and not match[0].isdigit() and not match[0].endswith("ly"):
            yield Span(*match.span()), 1
