"""What tells headings from sentences, and populations from doses, in a text that marks neither."""

import re
from collections.abc import Sequence
from dataclasses import replace

from gatewise.mdt.documents.document import Block, sections

SENTENCE_END = re.compile(r"[.!?。！？:：;；][\"'”’)）\]]*$")
_LONGEST = 80  # characters of a heading
_NUMBER = re.compile(r"^(?:(\d+(?:\.\d+)*)\.?\s+|[一二三四五六七八九十]+、\s*)")
_HAN = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_PEOPLE = re.compile(
    r"\b(?:patients?|people|adults?|child(?:ren)?|infants?|neonates?|newborns?|adolescents?|wom[ae]n|m[ae]n|persons?|pregnan\w+"
    r"|elderly|individuals)\b|患者|病人|人群|儿童|成人|成年|孕妇|妇女|老年|婴儿|新生儿|青少年",
    re.IGNORECASE,
)
_GENERAL = re.compile(
    r"(?:\d+(?:\.\d+)*\.?\s*|[一二三四五六七八九十]+、\s*)?(?:introduction|background|treatment|management|therapy|diagnosis|summary"
    r"|recommendations?|methods|results|discussion|conclusions?|references|overview|contents|drugs?|medication|dosage|follow-up"
    r"|治疗|诊断|概述|前言|引言|背景|推荐意见|建议|方法|结果|讨论|结论|参考文献|目录|用药|药物治疗|随访)",
    re.IGNORECASE,
)
# Of these the second group may begin a heading too, as in "Use of steroids" or "Review and follow-up".
_IMPERATIVE = re.compile(
    r"(?:give|do|don['’]t|stop|avoid|offer|consider|check|measure|refer|prescribe|administer|begin|continue|discontinue|withhold"
    r"|withdraw|reduce|add|replace|assess|ensure|advise|inform|ask|tell|take|keep|omit|never|no|not|if|unless|when|whenever"
    r"|otherwise|then|else|perform|obtain|admit|call|seek|exclude|confirm|select|choose|titrate|taper|double|halve|provide|apply"
    r"|inject|infuse|insert|remove|observe|intubate|ventilate|restrict|maintain|initiate|resume|restart|suspend|cease|defer|allow"
    r"|encourage|counsel|discuss|vaccinate|immuni[sz]e|aspirate|anticoagulate|rehydrate|arrange|elevate"
    r"|immobili[sz]e|examine|investigate|identify|determine|calculate|explain|educate|optimi[sz]e|substitute|contact|notify"
    r"|rest\s+(?:the|until)|only\s+(?:if|when|in|for|give|use)"
    r"|(?:use|start|change|review|test|screen|monitor|increase|order|treat|switch|repeat|record|wait|transfer|delay|request|limit"
    r"|hold|drain|supplement|correct|follow|discharge|return)(?!\s+(?:of|in|and|for|up)\b)\s+\S+)\b",
    re.IGNORECASE,
)
_TELLING = re.compile(
    r"\b(?:should|must|may|can|cannot|could|will|would|shall|needs?|not|never|contraindicated|recommended|avoid(?:ed)?|daily|once"
    r"|twice|three\s+times|every\s+(?:day|other|\d+)|as\s+needed)\b",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|do|does|receives?|requires?|gives?|given|takes?|stops?|preferred|indicated)\b",
    re.IGNORECASE,
)
_RELATIVE = re.compile(r"\b(?:who|whom|whose|that|which)\b.*", re.IGNORECASE)
_DOSE = re.compile(
    r"\d\s*(?:(?:mg|mcg|[µμ]g|ug|g|kg|ml|l|iu|units?|mmol|tablets?|puffs?|drops?)\b|%|毫克|微克|克|毫升|片|单位)", re.IGNORECASE
)
_COMPARISON = re.compile(r"[<>≤≥=]\s*\d")
_CHINESE_TELLING = re.compile(
    r"首选|禁用|禁忌(?![证症])|慎用|停用|避免|给予|服用|口服|注射(?!剂)|不宜|不应|不可|不能|不得|不要|不用|不予|(?<![适反效相对响])应(?![用激答])"
    r"|必须|可选|可用|可给|可以|可予|可行|需(?!求)|须|如果|若|(?<![适便])宜|勿|推荐(?!意见|等级|强度)|建议(?!$|[与和书])|考虑|加用|换用|改用"
    r"|联用|减量|加量|每[日天晚周]"
)
_MOST_WORDS, _MOST_HAN = 10, 30
_FEW_WORDS, _FEW_HAN = 6, 20


def stands_like_heading(line: str) -> bool:
    """Whether a line of plain text has the shape of a heading: short, no full stop, no item of a list."""
    if len(line) > _LONGEST or SENTENCE_END.search(line) or "@" in line or "，" in line or "。" in line:
        return False
    return bool(re.match(r"[A-Z\u4e00-\u9fff]", unnumbered(line)))


def reads_as_sentence(text: str) -> bool:
    """Whether a short text says what to do or what is so, or gives a dose, so that leaving it out would lose something.

    In doubt it does: a heading taken for a paragraph still stands before its text.
    """
    said = unnumbered(text)
    if _DOSE.search(said):
        return True
    if _HAN.search(said):
        return bool(_CHINESE_TELLING.search(said)) or len(said) > _MOST_HAN
    if _IMPERATIVE.match(said) or _TELLING.search(said) or len(_WORD.findall(said)) > _MOST_WORDS:
        return True
    if _PEOPLE.search(said):  # "adults who have gout" are people, "adults have gout" says something
        return bool(_VERB.search(_RELATIVE.sub("", said)))
    return bool(_VERB.search(said) or _COMPARISON.search(said))


def is_heading(line: str) -> bool:
    """Whether a line of plain text is a heading: it has the shape, is no sentence, and is numbered, in capitals or short."""
    if not stands_like_heading(line) or reads_as_sentence(line):
        return False
    words = _WORD.findall(line)
    return bool(
        _NUMBER.match(line)
        or _GENERAL.fullmatch(line)
        or _PEOPLE.search(line)
        or (len(line) <= _FEW_HAN if _HAN.search(line) else len(words) <= _FEW_WORDS)
        or all(word[0].isupper() for word in words if len(word) > 3)
    )


def with_levels(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of plain text with the levels of their headings, which come as 1.

    Numbers tell them ("1.2 Treatment" is 2); a heading that another follows at the very beginning is the title, above all others.
    Where there is no paragraph at all, the headings were none.
    """
    if all(block.level for block in blocks):
        return [replace(block, level=0) for block in blocks]
    titled = len(blocks) > 1 and bool(blocks[0].level and blocks[1].level) and not _NUMBER.match(blocks[0].text)
    made = []
    for place, block in enumerate(blocks):
        number = _NUMBER.match(block.text)
        depth = 1 + (number[1].count(".") if number and number[1] else 0)
        made.append(replace(block, level=depth + int(titled and place > 0)) if block.level else block)
    return made


def is_said_by_heading(above: Sequence[Block], held: Sequence[Block]) -> bool:
    """Whether a section is a heading alone that reads as a sentence, which then is a passage of its own."""
    return bool(above) and not held and reads_as_sentence(above[-1].text)


def without_text(blocks: Sequence[Block]) -> list[Block]:
    """The headings that come with no passage: nothing stands under them, and they are no sentences themselves."""
    used: set[int] = set()
    for above, held in sections(blocks):
        if held or is_said_by_heading(above, held):
            used |= {id(one) for one in above}
    return [block for block in blocks if block.level and id(block) not in used]


def population_of(headings: Sequence[str]) -> str:
    """The nearest heading that names people, else the nearest that is not of the kind that every guideline has."""
    for heading in reversed(headings):
        if _PEOPLE.search(heading):
            return unnumbered(heading)
    return next((unnumbered(heading) for heading in reversed(headings) if not _GENERAL.fullmatch(heading.strip())), "")


def number_of(line: str) -> str | None:
    """The number before a heading or an item, such as "2.1"; empty for a Chinese one, None without one."""
    number = _NUMBER.match(line)
    return None if number is None else number[1] or ""


def unnumbered(heading: str) -> str:
    """A heading without its number."""
    return _NUMBER.sub("", heading).strip()


def population_mark(text: str) -> int:
    """Where the "@" stands that parts a population from its passage; -1 without one.

    That of an address is none, nor that of a dose ("10 mg @ night"). White space may stand around it as in the published English
    trees, where a population or a disease stands before it and a sentence begins after it.
    """
    at = text.find("@")
    if at <= 0:
        return -1
    before, after = text[max(0, at - 300) : at], text[at + 1 : at + 100]
    spaced = before[-1].isspace() or after[:1].isspace()
    if not spaced and re.match(r"(?:[a-z\d-]+\.)+[a-z]{2,}\b", after, re.IGNORECASE | re.ASCII):
        return -1
    if re.search(_DOSE.pattern + r"\s*$", before, re.IGNORECASE) or _IMPERATIVE.match(before.strip()):
        return -1
    names = _PEOPLE.search(before) or not (any(map(str.isdigit, before)) or reads_as_sentence(before))
    if spaced and not (names and re.match(r"\s*[\W_]*(?:[A-Z\d]|[^\x00-\x7f])", after)):
        return -1
    return at
