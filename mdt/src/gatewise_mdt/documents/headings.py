"""What tells headings from sentences, and populations from doses, in a text that marks neither."""

import re
from collections.abc import Sequence
from dataclasses import replace

from gatewise_mdt.documents.document import Block, sections
from gatewise_mdt.documents.language import has_han, is_chinese

SENTENCE_END = re.compile(r"[.!?。！？:：;；][\"'”’)）\]]*$")
_LONGEST, _LONGEST_QUESTION = 80, 120  # characters of a heading
_LABEL_END = re.compile(r"[:：]\s*$")
_QUESTION_END = re.compile(r"[?？][\"'”’)）]*$")
_ENDS_INSIDE = re.compile(r"[.!?;]\s|[。！？；].")
_CHINESE_NUMBER = "[一二三四五六七八九十百]+"
_CHINESE_NUMBERS = rf"{_CHINESE_NUMBER}、\s*|[（(]{_CHINESE_NUMBER}[）)]\s*|第(?:{_CHINESE_NUMBER}|\d+)[章节篇部]分?\s*"
# "2 Treatment" has a number; "6 months to 5 years", "24 Hours after surgery" and "2 型糖尿病" begin with what they are about.
_HAN_TIMES = "岁|小时|年(?!龄)|个(?=半?月)"
_TIMES = rf"[\sa-z]|(?i:days?|weeks?|months?|years?|hours?|minutes?)\b|月(?!经)|周(?!围|期性)|天(?!疱)|日(?![常间])|{_HAN_TIMES}"
# "4 类风湿关节炎" has a number.
_COUNTED = rf"{_TIMES}|型|期(?![前待])|线(?!粒)|类(?!风湿|固醇|癌)|个(?!体)|级(?!联)|度(?![洛他])|次(?!要)|种(?!植)|名(?!词)"
# "3.2" counts hours, months and years alone: "3.2 个体化治疗" has a number.
_NUMBER = re.compile(
    rf"^(?:(\d+(?:\.\d+)*)(?:\.\s+|(?<=\.\d\d)\s+(?![\sa-z]|{_HAN_TIMES})|(?<=\.\d)\s+(?!{_TIMES})|\s+(?!{_COUNTED})|[、．]\s*)|{_CHINESE_NUMBERS})"
)
ITEM_NUMBER = re.compile(r"(?:[(（]?(\d{1,2}|[a-z])(?:[.)]\s+|[、）]\s*)|([①-⑳])\s*)(?=\S)")
"""Before an item: "2. ", "b) ", "（1）", "①"."""
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_PEOPLE = re.compile(
    r"\b(?:patients?|people|adults?|child(?:ren)?|infants?|neonates?|newborns?|adolescents?|wom[ae]n|m[ae]n|persons?|pregnan\w+"
    r"|elderly|individuals)\b|患者|病人|人群|儿童|成人|成年|孕妇|妇女|老年|婴儿|新生儿|青少年",
    re.IGNORECASE,
)
_GENERAL = re.compile(
    r"(?:(?:the|our|national|clinical|local|house|hospital|ward|trust|practice)\s+)*(?:guidelines?|handbook|protocols?|policy|policies)"
    r"(?:\s+\d+)?|(?:introduction|background|treatment|management|therapy|diagnosis|summary"
    r"|recommendations?|methods|results|discussion|conclusions?|references|overview|drugs?|medication|dosage|follow-up"
    r"|monitoring|prevention|assessment|implementation|appendix(?:\s+\w+)?|scope|purpose|aims?|key\s+points|definitions?|contents"
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
_NO_ORDER = re.compile(
    r"(?:if|unless|when|whenever|otherwise|then|else|only|no|not|never|do|don['’]t|stop|avoid|omit|discontinue|withhold|withdraw"
    r"|exclude|remove|restrict|suspend|cease|defer|limit|hold|delay|taper|reduce)\b",
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
    r"\d\s*(?:(?:mg|mcg|[µμ]g|ug|g|kg|(?:milli|micro|nano)?grams?|ml|l|iu|units?|mmol|tablets?|puffs?|drops?)\b|%|毫克|微克|克|毫升|片|单位)",
    re.IGNORECASE,
)
# "< 30 kg", "30-59 %" and "K 3.5 mmol/L" are of patients, and no doses.
_OF_PATIENTS = re.compile(
    r"(?:(?:[<>≤≥=]+|\b(?:below|above|over|under|up to|(?:less|more) than|at least)|低于|高于|大于|小于)\s*)?"
    r"(?:\d+(?:\.\d+)?\s*(?:-|–|—|to|and|至|~|～)\s*)?\d+(?:\.\d+)?\s*"
    r"(?:kg\b|公斤|千克|%|[munµμ]?(?:mol|g|IU|U)\s*/\s*d?l\b)",
    re.IGNORECASE,
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
    return bool(re.match(r"(?:\d+\s+)?[A-Z\u4e00-\u9fff]", unnumbered(line)))


def gives_dose(text: str) -> bool:
    """Whether a text has a dose in it, such as "5 mg"; a patient's weight or a laboratory value ("< 30 kg") is none."""
    return bool(_DOSE.search(_OF_PATIENTS.sub(" ", text)))


def tells_what_to_do(text: str) -> bool:
    """Whether a text begins as an instruction or a condition does: "Do not …", "If …"."""
    said = unnumbered(text)
    return bool(_IMPERATIVE.match(said) or (has_han(said) and _CHINESE_TELLING.match(said)))


def is_order(text: str) -> bool:
    """Whether a text begins by saying what is to be done: "Give one of these:", but not "If …:", "Avoid:" or "In pregnancy:"."""
    said = unnumbered(text)
    return bool(_IMPERATIVE.match(said)) and not _NO_ORDER.match(said)


def reads_as_sentence(text: str) -> bool:
    """Whether a short text says what to do or what is so, or gives a dose, so that leaving it out would lose something.

    In doubt it does: a heading taken for a paragraph still stands before its text.
    """
    said = unnumbered(text)
    if _DOSE.search(said):
        return True
    if has_han(said):
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
        or _GENERAL.fullmatch(unnumbered(line))
        or _PEOPLE.search(line)
        or (len(line) <= _FEW_HAN if has_han(line) else len(words) <= _FEW_WORDS)
        or all(word[0].isupper() for word in words if len(word) > 3)
    )


def stands_alone_as_heading(line: str) -> bool:
    """Whether a line between empty ones is a heading: also a question, and a name with a colon ("Renal failure:")."""
    if is_heading(line):
        return True
    if _QUESTION_END.search(line):
        said = unnumbered(line)
        return len(line) <= _LONGEST_QUESTION and bool(re.match(r"[A-Z\u4e00-\u9fff]", said)) and not _ENDS_INSIDE.search(said)
    return bool(_LABEL_END.search(line)) and is_heading(_LABEL_END.sub("", line))


def is_general(heading: str) -> bool:
    """Whether a heading is of the kind that every guideline has: "Treatment"."""
    return bool(_GENERAL.fullmatch(_bare(heading)))


def is_label(text: str) -> bool:
    """Whether a text that is set off in bold or in a larger size is a heading, not a sentence in bold."""
    if len(text) > _LONGEST_QUESTION or not any(map(str.isalpha, text)) or gives_dose(text) or is_caption(text):
        return False
    if re.match(r"[a-z]+\b", unnumbered(text)):  # the rest of something
        return False
    if _QUESTION_END.search(text) or _LABEL_END.search(text):
        return not _ENDS_INSIDE.search(unnumbered(text))
    # A sentence without a full stop, as "NSAIDs are contraindicated".
    is_sentence = reads_as_sentence(text) and not _PEOPLE.search(text) and len(_WORD.findall(text)) > 3
    return not (SENTENCE_END.search(text) or tells_what_to_do(text) or is_sentence)


def is_caption(text: str) -> bool:
    """Whether a text names a table, a picture or a box by its number."""
    return bool(re.match(r"(?:table|figure|fig\.|box|algorithm|chart)\s*[A-Z]?\d+|[表图]\s*\d+", text, re.IGNORECASE))


def with_levels(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of plain text with the levels of their headings, which come as 1.

    Numbers tell them ("1.2 Treatment" is 2); a heading that another follows at the very beginning is the title, above all others. A
    question is below the heading before it, and a name with a colon below both. Where there is no paragraph at all, the headings
    were none.
    """
    if all(block.level for block in blocks):
        return [replace(block, level=0) for block in blocks]
    titled = _begins_with_title(blocks)
    made = []
    plain = asked = 0
    for place, block in enumerate(blocks):
        if not block.level:
            made.append(block)
            continue
        level = number_depth(block.text) or 1
        level += int(titled and place > 0)
        numbered = _NUMBER.match(block.text)
        if not numbered and _QUESTION_END.search(block.text):
            level = asked = plain + 1
        elif not numbered and _LABEL_END.search(block.text):
            level = max(plain, asked) + 1
        else:
            plain, asked = level, 0
        made.append(replace(block, level=level))
    return made


def _begins_with_title(blocks: Sequence[Block]) -> bool:
    """Whether the first heading is above all others. One that names people is not if another does: "Adults", then "Children"."""
    if len(blocks) < 2 or not (blocks[0].level and blocks[1].level) or _NUMBER.match(blocks[0].text):
        return False
    if _QUESTION_END.search(blocks[1].text) or _LABEL_END.search(blocks[1].text):
        return False
    return not (_names_people(blocks[0].text) and any(block.level and _names_people(block.text) for block in blocks[1:]))


def number_depth(text: str) -> int:
    """How deep the number of a heading is, "1.2" or "（一）" 2; 0 without one."""
    number = _NUMBER.match(text)
    if number is None:
        return 0
    if number[1]:
        return 1 + number[1].count(".")
    return 2 if text[0] in "（(" or "节" in number[0] else 1


def is_instruction_alone(above: Sequence[Block], held: Sequence[Block]) -> bool:
    """Whether a section is a heading alone that reads as a sentence, which then is a passage of its own."""
    return bool(above) and not held and reads_as_sentence(above[-1].text) and not _QUESTION_END.search(above[-1].text)


def headings_without_text(blocks: Sequence[Block]) -> list[Block]:
    """The headings that come with no passage: nothing stands under them, and they are no sentences themselves."""
    used: set[int] = set()
    for above, held in sections(blocks):
        if held or is_instruction_alone(above, held):
            used |= {id(one) for one in above}
    return [block for block in blocks if block.level and id(block) not in used]


def population_of(headings: Sequence[str]) -> tuple[str, list[str]]:
    """Whom a passage under headings is about, and the other headings, which then have to stand in the passage.

    The headings that name people are its population, the outermost first. Without one it is the outermost heading that is not of
    the kind that every guideline has, often the title with a disease. A question is no population, nor is an instruction.
    """
    named = [heading for heading in headings if _names_people(heading)]
    if not named:
        named = [one for one in headings if not _QUESTION_END.search(one) and not _GENERAL.fullmatch(_bare(one))][:1]
    others = [heading for heading in headings if heading not in named]
    said: list[str] = []
    for heading in map(_bare, named):  # "Adults" goes into "Adults with renal failure"
        said = [*(one for one in said if one.lower() not in heading.lower()), heading]
    return ("，" if is_chinese("".join(said)) else ", ").join(said), others


def lead_of(headings: Sequence[str]) -> str:
    """Headings as the beginning of the text under them: "Renal failure: ", "What if it fails? "."""
    said = ""
    for heading in headings:
        text, chinese = unnumbered(heading), is_chinese(heading)
        if re.search(r"[.!?。！？]$", text):
            said += text if text[-1] in "。！？" else f"{text} "
        elif text:
            said += _LABEL_END.sub("", text).rstrip() + ("：" if chinese else ": ")
    return said


def _names_people(heading: str) -> bool:
    # "Pregnancy" is a condition; pregnant women are people.
    said = re.sub(r"pregnanc\w+", "", heading, flags=re.IGNORECASE)
    return bool(_PEOPLE.search(said)) and not _QUESTION_END.search(heading) and not _IMPERATIVE.match(unnumbered(heading))


def _bare(heading: str) -> str:
    return _LABEL_END.sub("", unnumbered(heading)).strip()


def number_of(line: str) -> str | None:
    """The number before a heading or an item, such as "2.1"; empty for a Chinese one, None without one."""
    number = _NUMBER.match(line)
    return None if number is None else number[1] or ""


def counted(number: re.Match[str]) -> int:
    """Which of its list an item is, by its number."""
    said, circled = number[1], number[2]
    if circled:
        return ord(circled) - ord("①") + 1
    return int(said) if said.isdigit() else ord(said) - ord("a") + 1


def style_of(item: str) -> str:
    """What the number or bullet of an item looks like: "1.", "（1）", "•"."""
    number = ITEM_NUMBER.match(item)
    return re.sub(r"\d+", "1", re.sub("[①-⑳]", "①", re.sub(r"\b[a-z]\b", "a", number[0].strip()))) if number else item[0]


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
