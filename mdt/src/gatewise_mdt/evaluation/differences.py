"""What two trees of one passage say differently, the most dangerous first: by what would be done if each were followed.

| kind            | what differs                                                                                          |
|-----------------|-------------------------------------------------------------------------------------------------------|
| contrary orders | given and prohibited, recommended and no longer, start and stop, more and less, for the same patients |
| other dose      | number, unit, limit, frequency, route, amount ("low-dose"), or the drug that a dose is of              |
| other condition | number, unit, limit, negation, population, degree, finding; yes and no, and / or, where a decision hangs |
| missing         | a condition, a decision or a part of one is in one tree only                                           |
| wording         | what is left, as far as the words can be read                                                          |

Conditions are paired first, by their words, else by their place. Two decisions then have the same place where the answers to all
paired conditions above them are the same. Triples of one place are compared before those that stand elsewhere. What phrases say is
read by the rules of :mod:`gatewise_mdt.checking`: rules of thumb, in English and Chinese. In doubt a difference is of the more
dangerous kind; what two phrases mean that share no words, no rule knows.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from gatewise_mdt.checking.content import contents
from gatewise_mdt.checking.marks import (
    ABOVE,
    BELOW,
    DAILY,
    DIGITS,
    DURING,
    HAN,
    HAN_DIGITS,
    LIMIT,
    ROUTE,
    SPELT,
    Marks,
    Number,
    Span,
    marks_of,
    value,
)
from gatewise_mdt.checking.numbers import DRUG_STEM
from gatewise_mdt.checking.prohibitions import NOT
from gatewise_mdt.evaluation.mistakes import alike, best_pairs
from gatewise_mdt.formats.orders import is_negated
from gatewise_mdt.relations import AVOIDS, DOSE, GIVES
from gatewise_mdt.tree import DecisionTree, Node, Triple
from gatewise_mdt.wholes import fold

KINDS = ("contrary orders", "other dose", "other condition", "missing", "wording")
WHAT = (
    *("given / not given", "more / less"),
    *("number", "unit", "limit", "frequency", "route", "amount", "drug"),
    *("degree", "negation", "population", "finding", "and / or", "together or apart", "yes and no", "where it holds"),
    *("condition", "decision", "a part"),
    *("relation", "order"),
)
"""Of contrary orders, of doses (the first three also of thresholds), of conditions, of what is missing, of words."""


class Difference(NamedTuple):
    """One thing that two trees say differently.

    Attributes:
        kind: one of :data:`KINDS`.
        what: one of :data:`WHAT`; empty where it is the words.
        a, b: what each tree says; empty where it says nothing.
        nodes: where, in pre-order from 0; None for a tree that says nothing.
    """

    kind: str
    what: str
    a: str
    b: str
    nodes: tuple[int | None, int | None]


def differences(a: DecisionTree, b: DecisionTree) -> list[Difference]:
    """What two trees say differently, the most dangerous first; nothing exactly where they are the same.

    The order of triples in a node, case, spaces and the language of relations do not count ("10 MU" and "10 mU" are not the same).
    """
    if _identity(a) == _identity(b):
        return []
    pairs = _paired_conditions(a, b)
    found = [*_of_conditions(a, b, pairs), *_of_decisions(a, b, pairs)]
    found = found or [Difference("wording", "order", a.nodes[0].words, b.nodes[0].words, (0, 0))]
    return sorted(dict.fromkeys(found), key=lambda one: KINDS.index(one.kind))


_Key = tuple[Hashable, ...]


def _key(triple: Triple) -> _Key:
    """What makes two triples the same: also for the measures, which leave case out and nothing else."""
    return (*triple.key, triple.subject.lower(), triple.object.lower())


def _triples(node: Node) -> dict[_Key, Triple]:
    return {_key(triple): triple for triple in node.triples}


def _identity(tree: DecisionTree) -> list[tuple[str, str, frozenset[_Key]]]:
    return [(node.role, node.logical_rel if node.triples else "null", frozenset(_triples(node))) for node in tree.nodes]


# ---- what a phrase says ----


class Said(NamedTuple):
    """What a phrase says that makes another dose or another condition of it.

    Attributes:
        numbers: (amount, unit), in mg and days where they are weights and times.
        sides: "below" and "above" without a number.
        way: "more" or "less" of what is done.
        negated: how many negations, limits apart.
        words: those that say something of their own; of Chinese the signs.
    """

    numbers: frozenset[tuple[str, str]]
    limits: tuple[str, ...]
    sides: tuple[bool, bool]
    often: frozenset[str]
    routes: frozenset[str]
    people: frozenset[str]
    degrees: frozenset[str]
    way: str
    negated: int
    words: frozenset[str]


def _one_time(found: re.Match[str]) -> str:
    """Reads "for a week" as "for one week"; but "5 mg in a day" and "3 attacks in a year" are rates."""
    count, counted, when, period = found.groups("")
    is_rate = count and when.lower() == "in" and (period.lower() == "day" or not _DOSED.fullmatch(counted))
    return f"{count}a" if is_rate else f"{count}{when} one"


@lru_cache(maxsize=4096)
def said(phrase: str) -> Said:
    """Reads a phrase."""
    marks = marks_of(_A_TIME.sub(_one_time, _AND_ABOVE.sub("or ", phrase)))
    text = marks.text
    often = {span: rate(text[span.begin : span.end]) for span, _ in marks.frequencies}
    daily = [Span(*match.span()) for match in DAILY.finditer(text)]
    often |= {span: rate(text[span.begin : span.end]) for span in daily if not any(map(span.overlaps, often))}
    limits = [Span(*match.span()) for match in LIMIT.finditer(text)]
    numbers = [one for one in marks.numbers if not any(map(one.span.overlaps, often))]
    amounts = {amount for one in numbers for amount in _amounts(text, one)}
    known = [one.span for one in numbers]
    rest = _without(text, limits)
    digits = [Span(*match.span()) for match in re.finditer(DIGITS, text)]  # "type 2" and the like
    names = {(value(text[one.begin : one.end]), "") for one in digits if not any(map(one.overlaps, [*known, *often]))}
    return Said(
        frozenset(amounts | names),
        tuple(sorted(_limit(text, one) for one in limits)),
        (BELOW.search(rest) is not None, ABOVE.search(rest) is not None),
        frozenset(one for rates in often.values() for one in rates),
        frozenset(_named(_ROUTES, match[0], match[0]) for match in ROUTE.finditer(text)),
        frozenset(name for name, pattern in _PEOPLE.items() if re.search(pattern, text)),
        frozenset(_named(_DEGREES, match[0], match[0]) for match in _DEGREE.finditer(text)),
        "more" if _MORE.search(text) else "less" if _LESS.search(text) else "",
        sum(not any(map(Span(*match.span()).overlaps, limits)) for match in (*NOT.finditer(text), *_UNABLE.finditer(text))),
        frozenset(_words(marks)),
    )


_A_TIME = re.compile(rf"(\d ?([^\d\s]*) )?\b({'|'.join(DURING)}) an?(?= (day|week|month|year|hour)\b)", re.IGNORECASE)
_DOSED = re.compile(r"(?:[mkµμ]?g|mcg|micro\w*|m?l|i?u|units?|mmol)(?:/\S+)?|%", re.IGNORECASE)
_OR_MORE = re.compile(  # but not of "any of the following"
    r"(?:(?:(?<=[级岁])|(?<=[轻中重\div一二三四五]度)|(?<=[\divabc一二三四五]期))[及或和](?=以[上下内])"
    r"|[及或和](?=以[上下内](?!任|各|几|之一|情况|条件|情形|标准|因素|症状|疾病|表现|检查|[一二两三四五六七八九十\d]+[项种条个])))"
)
_UNABLE = re.compile(r"\b(?:unable|inability)\b|\bfail(?:s|ed|ing|ure)? to\b")
_AND_ABOVE = re.compile(r"\band (?=(?:above|below|over|under|more|less|older|younger|higher|lower)\b(?! than))", re.IGNORECASE)


def _words(marks: Marks) -> Iterator[str]:
    patterns = (LIMIT, ROUTE, DAILY, _POLARITY, re.compile(DIGITS))
    known = [Span(*match.span()) for pattern in patterns for match in pattern.finditer(marks.text)]
    rest = _without(marks.text, [*known, *(one.span for one in marks.numbers), *(span for span, _ in marks.frequencies)])
    for span, _ in contents(rest, Span(0, len(rest))):
        word = rest[span.begin : span.end]
        yield from word if re.match(f"[{HAN}]", word) else [word.rstrip("s")]


def _without(text: str, spans: Sequence[Span]) -> str:
    return "".join(" " if any(one.begin <= at < one.end for one in spans) else sign for at, sign in enumerate(text))


def _named(names: dict[str, str], word: str, other: str) -> str:
    return next((name for name, pattern in names.items() if re.search(pattern, word)), other)


_ROUTES = {
    "intravenous": r"intraven|^i\.?v|静",
    "intramuscular": r"intramusc|^i\.?m|肌",
    "subcutaneous": r"subcut|^s\.?c|皮下",
    "oral": r"oral|mouth|^p\.?o|口服",
    "inhaled": "inhal|nebul|吸入",
}
_PEOPLE = {
    "adults": r"\badults?\b|成年|成人",
    "children": r"\b(?:child|children|paediatric|pediatric)\b|儿童|小儿|患儿|小孩",
    "infants": r"\b(?:infants?|bab(?:y|ies)|neonat\w+|newborns?)\b|婴|新生儿",
    "adolescents": r"\b(?:adolescents?|teenagers?)\b|青少年",
    "old people": r"\b(?:elderly|older)\b(?! than)|老年|老人",
    "young people": r"\byoung\b|青年|年轻",
    "pregnant": r"\bpregnan|妊娠|孕妇|怀孕",
    "breastfeeding": r"\b(?:breast-?feeding|lactati)|哺乳",
    "women": r"\b(?:wom[ae]n|females?|girls?)\b|女",
    "men": r"\b(?:m[ae]n|males?|boys?)\b|男",
}
_DEGREE = re.compile(
    r"\b(?:mild|moderate|severe|acute|chronic|high|low|elevated|raised|increased|reduced|decreased|higher|lower|early|late|left|right"
    r"|stable|unstable|large|small|partial|complete|first|second|third|full|half|long|short|before|after|during|until|caution\w*)\b"
    r"|[轻中重]度|慎|重症|急性|慢性|亚急性|[升增偏]高|[降减偏]低|早期|晚期|[左右]侧?|(?<!不)稳定|高危|低危|中危|大剂量|小剂量|高剂量|低剂量|半量|全量|(?<!以)[前后内外上下]"
)
_DEGREES = {
    "high": "^(?:high|elevated|raised|increased)|^[升增偏]高|^[大高]剂",
    "low": "^(?:low|reduced|decreased)|^[降减偏]低|^[小低]剂",
}
_AMOUNT = re.compile("high|low|large|small|full|half|量")
_MORE = re.compile(
    r"\b(?:increas\w+|rais(?:e|ed|ing)|doubl\w+|(?<!de-)escalat\w+|intensif\w+|(?:step\w*|titrat\w+)[ -]up|up-?titrat\w+)\b"
    "|加[量倍强]|增[加大量]|上调|升级|升阶梯"
)
_LESS = re.compile(
    r"\b(?:reduc\w+|decreas\w+|lower(?:ed|ing)?|halv\w+|taper\w*|de-?escalat\w+|(?:step\w*|titrat\w+)[ -]down|down-?titrat\w+)\b"
    "|减[量少半]|降低|下调|降级|降阶梯"
)
_POLARITY = re.compile(
    r"\b(?:stop(?:ped|ping)?|discontinu\w+|withh[eo]ld\w*|withdr[ae]w\w*|ceas\w+|avoid\w*|prohibit\w*|resum\w+|restart\w*|begin\w*"
    r"|longer|contra-?indicat\w+|against)\b|停[止用药服]?|禁[止用忌]?|避免|开始|继续|恢复"
)


def _limit(text: str, words: Span) -> str:
    """Which of < ≤ > ≥ the words of a limit say."""
    word = text[max(0, words.begin - 1) : words.end] if text[max(0, words.begin - 1)] == "不" else text[words.begin : words.end]
    equal = text[words.end : words.end + 12].lstrip().startswith("or equal") or re.search("=|等于|equal|^or |以[上下内]", word)
    turned = re.search(r"\b(?:no|not|never)\b|不", word) and not re.search("不足", word)
    if re.search(
        "<|≤|below|under|less|fewer|lower|younger|smaller|shorter|earlier|[小低少]于|不足|以[下内]|最[大高多]|max|most|至多|上限|极量",
        word,
    ):
        sign = "<"
    else:
        sign = "<" if re.search("up to|within|restrict|limit", word) else ">"
    if re.search("max|最[大高多]|最[小低少]|min|most|least|至[少多]|上限|极量|up to|within|restrict|limit|≤|≥", word):
        equal = True
        sign = ">" if re.search("min|least|至少|最[小低少]|≥", word) else sign
    if turned:
        return {"<": "≥", ">": "≤"}[sign]
    return {"<": "≤", ">": "≥"}[sign] if equal else sign


_UNITS: dict[str, tuple[str, Fraction | int]] = {  # what a unit is in one that is common to its kind
    "mg": ("mg", 1), "milligram": ("mg", 1), "毫克": ("mg", 1), "g": ("mg", 1000), "gram": ("mg", 1000), "克": ("mg", 1000),
    "μg": ("mg", Fraction(1, 1000)), "microgram": ("mg", Fraction(1, 1000)), "微克": ("mg", Fraction(1, 1000)), "毫升": ("ml", 1),
    "升": ("l", 1), "unit": ("u", 1), "单位": ("u", 1), "国际单位": ("iu", 1), "片": ("tablet", 1), "粒": ("capsule", 1),
    "滴": ("drop", 1), "喷": ("puff", 1), "揿": ("puff", 1), "hour": ("hour", 1), "h": ("hour", 1), "小时": ("hour", 1),
    "day": ("day", 1), "d": ("day", 1), "天": ("day", 1), "日": ("day", 1), "week": ("day", 7), "w": ("day", 7), "wk": ("day", 7),
    "周": ("day", 7), "星期": ("day", 7), "month": ("month", 1), "月": ("month", 1), "year": ("year", 1), "年": ("year", 1),
    "岁": ("year", 1), "minute": ("minute", 1), "min": ("minute", 1), "分钟": ("minute", 1), "course": ("course", 1),
    "疗程": ("course", 1), "cycle": ("cycle", 1), "周期": ("cycle", 1),
}  # fmt: skip
_OTHER_UNIT = re.compile(r" ?(?:%|°c?|mmhg|kpa|kg|cm|mm|bpm)(?![a-z])|(?: ?/ ?(?:l|dl|ml|h|min|hpf)(?![a-z]))")
_TENS = {"万": 10**4, "million": 10**6}


def _amounts(text: str, number: Number) -> Iterator[tuple[str, str]]:
    """(amount, unit) of each number of a range."""
    last = number.digits[-1].end
    unit = text[last : max(number.end, last)].strip(" -").removeprefix("个")
    times = next((times for name, times in _TENS.items() if unit.startswith(name)), 1)
    unit = re.sub("^(?:万|million) ?", "", unit)
    known, factor = _UNITS.get(unit, _UNITS.get(unit.rstrip("s"), (unit.rstrip("s"), 1)))
    more = _OTHER_UNIT.match(text, number.end)
    per = "/kg" if number.per_weight else more[0].replace(" ", "") if more else ""
    for span in number.digits:
        amount = Fraction(value(text[span.begin : span.end])) if re.fullmatch(r"[\d.]+", value(text[span.begin : span.end])) else 0
        yield str(amount * factor * times), known + per


_NAMES: dict[str, Fraction | int] = {
    "qd": 1, "bd": 2, "bds": 2, "bid": 2, "tid": 3, "tds": 3, "qid": 4, "qds": 4, "qod": Fraction(1, 2),
}  # fmt: skip
_HOURS = {
    "hour|小时|(?<![a-z])h$": 1, "fortnight": 336, "week|周|星期": 168, "month|月": 720, "year|年": 8760,
    "day|dai|d$|日|天|night|晚|晨|morning|evening": 24,
}  # fmt: skip
_ONE = rf"{DIGITS}|{SPELT}|{HAN_DIGITS}"
_FIXED = {"once": "1", "twice": "2", "thrice": "3", "other": "2", "second": "2", "alternate": "2", "隔": "2", "third": "3"}
_TIMES = re.compile(rf"(once|twice|thrice|(?:{_ONE}))(?: ?(?:to|or|-|~|至|到|或) ?({_ONE}|twice|thrice))? ?(?:(?<=ce)|times?|x|次)")


def rate(words: str) -> frozenset[str]:
    """How often a day something is done, a number for each end of a range; the words themselves where that cannot be told."""
    plain = re.sub(r"[. ]", "", words)
    if plain in _NAMES:
        return frozenset({str(Fraction(_NAMES[plain]))})
    hours = next((hours for pattern, hours in _HOURS.items() if re.search(pattern, words.strip())), 0)
    counted = _TIMES.search(words)
    counts = [_value(one) for one in counted.groups() if one] if counted else [Fraction(1)]
    rest = words[: counted.start()] + words[counted.end() :] if counted else words
    every = [_value(one) for one in re.findall(rf"{_ONE}|other|second|alternate|third|隔(?![\d一二两三四五六七八九十])", rest)] or [
        Fraction(1)
    ]
    if (
        not hours
        or not all([*counts, *every])
        or re.search("divided|bi|prn|needed|required|必要|睡前|bedtime|nocte|at night", words)
    ):
        return frozenset({plain})
    return frozenset(str(count * 24 / (one * hours)) for count in counts for one in every)


def _value(word: str) -> Fraction:
    plain = value(_FIXED.get(word, word))
    return Fraction(plain) if re.fullmatch(r"[\d.]+", plain) else Fraction(0)


# ---- two triples ----


class _Compared(NamedTuple):
    kind: str
    what: str
    likeness: float


@lru_cache(maxsize=4096)
def _likeness(one: str, other: str) -> float:
    """From 1 for the same phrase to 0 for two that have nothing to do with each other."""
    a, b = fold(one).text.strip(), fold(other).text.strip()
    if a == b:
        return 1.0
    words, others = said(one).words, said(other).words
    both = words & others
    share = len(both) / len(words | others) if words | others else 0.5
    return 0.99 * max(alike(a, b), share if 2 * share >= 1 or (both and both in (words, others)) else 0.0)


@lru_cache(maxsize=16384)
def _compared(one: Triple, other: Triple, is_condition: bool) -> _Compared | None:
    """How two triples that are not the same differ; None if they have nothing to do with each other."""
    like, subjects = _likeness(one.object, other.object), _likeness(one.subject, other.subject)
    doses = [triple.key[1] == DOSE for triple in (one, other)]
    if all(doses) and subjects:
        like = max(like, 0.05)  # whatever the doses are
    if all(doses) and not subjects and like < 1:
        return None
    if not like or (any(doses) and not all(doses) and not is_condition):
        return None
    return _Compared(*_kind(one, other, is_condition, all(doses)), like + subjects)


def _kind(one: Triple, other: Triple, is_condition: bool, doses: bool) -> tuple[str, str]:
    a, b = said(one.object), said(other.object)
    replaced = bool(a.words - b.words and b.words - a.words)
    # What is said more of one thing ("in the morning", "at night") does not make another thing of it.
    shared = [word for word in a.words | b.words if word in a.words & b.words or _MORE.search(word) or _LESS.search(word)]
    if not is_condition and (not replaced or 2 * len(shared) >= min(len(a.words), len(b.words))):
        if forbids(one) != forbids(other) or (a.negated != b.negated and a.words == b.words and not doses):
            return "contrary orders", "given / not given"
        if {a.way, b.way} == {"more", "less"}:
            return "contrary orders", "more / less"
    drugs = (said(one.subject), said(other.subject)) if doses else None
    facts = _other_facts(a, b) or (drugs and _other_facts(*drugs))
    if facts:
        return ("other condition" if is_condition else "other dose"), facts
    if drugs and drugs[0].words != drugs[1].words:
        return "other dose", "drug"
    if a.degrees != b.degrees:
        amount = not is_condition and any(_AMOUNT.search(one) for one in a.degrees ^ b.degrees)
        return ("other dose", "amount") if amount else ("other condition", "degree")
    stopped = is_condition and is_negated(one.object, stopped=True) != is_negated(other.object, stopped=True)
    if stopped or (a.negated != b.negated and (is_condition or doses)):
        return "other condition", "negation"
    if a.people != b.people or (not doses and _are_other_people(one.subject, other.subject)):
        return "other condition", "population"
    drug = not is_condition and {one.key[1], other.key[1]} <= {GIVES[0], AVOIDS}  # "insulin" is not "insulin glargine"
    more = _has_more(one.object, other.object) or _has_more(other.object, one.object)
    if replaced or more or (drug and a.words != b.words):
        return ("other condition", "finding") if is_condition else ("missing", "a part")
    ours, theirs = _joins(one.object), _joins(other.object)
    if ours and theirs and not ours & theirs:
        return ("other condition" if is_condition else "missing"), "and / or"
    return "wording", "" if one.key[1] == other.key[1] else "relation"


def _joins(phrase: str) -> set[str]:
    """What joins the parts of a phrase; "60 and above" and 60岁及以上 join nothing, but 高血压或以下任一项 does."""
    text = _OR_MORE.sub("", fold(phrase).text)
    text = _without(text, [Span(*match.span()) for match in LIMIT.finditer(text)])
    return {name for name, pattern in _JOINS.items() if pattern.search(text)}


_JOINS = {"or": re.compile(r"\bor\b|或"), "and": re.compile(r"\b(?:and|plus)\b|[和与及且]")}


def _other_facts(a: Said, b: Said) -> str:
    """What of a dose or a threshold differs; empty for nothing."""
    if a.numbers != b.numbers:
        return "unit" if {amount for amount, _ in a.numbers} == {amount for amount, _ in b.numbers} else "number"
    others: dict[str, tuple[object, object]] = {
        "limit": ((a.limits, a.sides), (b.limits, b.sides)),
        "frequency": (a.often, b.often),
        "route": (a.routes, b.routes),
    }
    return next((name for name, (one, other) in others.items() if one != other), "")


def _are_other_people(one: str, other: str) -> bool:
    a, b = said(one), said(other)
    return bool(_other_facts(a, b) or (a.words - b.words and b.words - a.words)) or (
        (a.people, a.degrees, a.negated) != (b.people, b.degrees, b.negated)
    )


_LINK = re.compile(r"\b(?:and|or|with|without|plus|if|unless|during|after|before|who|when)\b|[和或及且伴并、,;]|合并")


def _has_more(one: str, other: str) -> bool:
    """Whether the one says a drug, or a whole part joined by "and" or the like, that the other has not."""
    more = said(one).words - said(other).words
    text, plain = fold(one).text, fold(other).text
    return bool(more) and (
        len(_LINK.findall(text)) > len(_LINK.findall(plain)) or any(match[0] not in plain for match in DRUG_STEM.finditer(text))
    )


def forbids(triple: Triple) -> bool:
    """Whether a triple of a decision says that something is not to be done, or ended."""
    return triple.key[1] == AVOIDS or is_negated(triple.object, stopped=True)


# ---- conditions ----


def _paired_conditions(a: DecisionTree, b: DecisionTree) -> dict[int, int]:
    """Which condition of B is which of A."""
    ours, theirs = ([i for i, node in enumerate(tree.nodes) if node.is_condition] for tree in (a, b))
    ranked = (
        (-like, [*a.paths[i].values()] != [*b.paths[j].values()], abs(i - j), i, j)
        for i in ours
        for j in theirs
        if (like := _likeness_of_nodes(a.nodes[i], b.nodes[j]))
    )
    pairs = {i: j for *_, i, j in best_pairs(ranked)}
    taken = set(pairs.values())
    free = {_above(b, j): j for j in theirs if j not in taken}
    for i in ours:
        over = _above(a, i)
        if i not in pairs and (over is None or over[0] in pairs):
            place = (pairs[over[0]], over[1]) if over else None
            if place in free:
                pairs[i] = free.pop(place)
    return pairs


def _above(tree: DecisionTree, node: int) -> tuple[int, bool] | None:
    """The condition right above a node, and whether it holds there."""
    return next(reversed(tree.paths[node].items()), None)


def _likeness_of_nodes(one: Node, other: Node) -> float:
    ours, theirs = _triples(one), _triples(other)
    likes = [
        1.0
        if key in theirs
        else max((0.45 * c.likeness for t in theirs.values() if (c := _compared(triple, t, True))), default=0.0)
        for key, triple in ours.items()
    ]
    return sum(likes) / max(len(ours), len(theirs))


def _of_conditions(a: DecisionTree, b: DecisionTree, pairs: dict[int, int]) -> Iterator[Difference]:
    left: tuple[list[tuple[int, Triple]], list[tuple[int, Triple]]] = ([], [])
    for i, j in pairs.items():
        one, other = a.nodes[i], b.nodes[j]
        ours, theirs = (
            {key: t for key, t in _triples(x).items() if key not in _triples(y)} for x, y in ((one, other), (other, one))
        )
        candidates = [
            (-c.likeness, key, other_key, c)
            for key, t in ours.items()
            for other_key, u in theirs.items()
            if (c := _compared(t, u, True))
        ]
        for _, key, other_key, c in sorted(candidates, key=lambda row: (row[3].kind != "wording", row[0])):
            if key in ours and other_key in theirs:
                yield Difference(c.kind, c.what, str(ours.pop(key)), str(theirs.pop(other_key)), (i, j))
        if _joined_otherwise(one, other):
            yield Difference("other condition", "and / or", one.words, other.words, (i, j))
        if ours and theirs:
            yield Difference("other condition", "finding", _listed(ours.values()), _listed(theirs.values()), (i, j))
            continue
        left[0].extend((i, triple) for triple in ours.values())
        left[1].extend((j, triple) for triple in theirs.values())
    for side, (tree, known) in enumerate(((a, set(pairs)), (b, set(pairs.values())))):
        alone = [i for i, node in enumerate(tree.nodes) if node.is_condition and i not in known]
        left[side].extend((i, triple) for i in alone for triple in _triples(tree.nodes[i]).values())
    for i, triple in left[0]:
        found = next((row for row in left[1] if _key(row[1]) == _key(triple)), None)
        if found is None:
            yield Difference("missing", "condition", str(triple), "", (i, None))
        else:
            left[1].remove(found)
            yield Difference("other condition", "together or apart", a.nodes[i].words, b.nodes[found[0]].words, (i, found[0]))
    for j, triple in left[1]:
        yield Difference("missing", "condition", "", str(triple), (None, j))


def _joined_otherwise(one: Node, other: Node) -> bool:
    return {one.logical_rel, other.logical_rel} == {"and", "or"}


def _listed(triples: Iterable[Triple]) -> str:
    return "; ".join(map(str, triples))


# ---- decisions ----


class _Decided(NamedTuple):
    """A triple of a decision, with the answers to paired conditions (by their nodes in A) that lead to it."""

    node: int
    triple: Triple
    answers: dict[int, str]


def _decided(tree: DecisionTree, names: dict[int, int]) -> list[_Decided]:
    return [
        _Decided(i, triple, {names[at]: "yes" if side else "no" for at, side in tree.paths[i].items() if at in names})
        for i, node in enumerate(tree.nodes)
        if not node.is_condition
        for triple in _triples(node).values()
    ]


def _of_decisions(a: DecisionTree, b: DecisionTree, pairs: dict[int, int]) -> Iterator[Difference]:
    ours = _decided(a, {i: i for i in pairs})
    theirs = _decided(b, {j: i for i, j in pairs.items()})
    ranked: list[tuple[int, float, int, int, int, _Compared | None]] = []
    for i, one in enumerate(ours):
        for j, other in enumerate(theirs):
            here, near = one.answers == other.answers, abs(one.node - other.node)
            if _key(one.triple) == _key(other.triple):
                ranked.append((0 if here else 3, 0.0, near, i, j, None))
            elif compared := _compared(one.triple, other.triple, False):
                rank = {"wording": 1, "contrary orders": 2, "other dose": 2}.get(compared.kind, 4)
                ranked.append((rank if here else 5, -compared.likeness, near, i, j, compared))
    matched: dict[int, int] = {}
    moved: dict[tuple[int, str, str], list[tuple[_Decided, _Decided]]] = defaultdict(list)
    leaves = set()
    for *_, i, j, compared in sorted(ranked, key=lambda row: row[:5]):
        if i in matched or j in matched.values():
            continue
        matched[i] = j
        one, other = ours[i], theirs[j]
        leaves.add((one.node, other.node))
        if compared:
            yield Difference(compared.kind, compared.what, str(one.triple), str(other.triple), (one.node, other.node))
        for condition in {**one.answers, **other.answers}:
            ways = one.answers.get(condition, ""), other.answers.get(condition, "")
            if ways[0] != ways[1]:
                moved[condition, *ways].append((one, other))
    for (condition, *answers), decisions in moved.items():
        what = "yes and no" if all(answers) else "where it holds"
        words = a.nodes[condition].words, b.nodes[pairs[condition]].words
        said_by = [
            f"{words[side]} > {answers[side]}: {told}" if answers[side] else told
            for side, told in enumerate(_listed(dict.fromkeys(both[side].triple for both in decisions)) for side in (0, 1))
        ]
        yield Difference("other condition", what, said_by[0], said_by[1], (condition, pairs[condition]))
    for i, one in enumerate(ours):
        if i not in matched:
            yield Difference("missing", "decision", str(one.triple), "", (one.node, None))
    for j, other in enumerate(theirs):
        if j not in matched.values():
            yield Difference("missing", "decision", "", str(other.triple), (None, other.node))
    for i, j in sorted(leaves):
        if _joined_otherwise(a.nodes[i], b.nodes[j]):
            yield Difference("missing", "and / or", a.nodes[i].words, b.nodes[j].words, (i, j))
