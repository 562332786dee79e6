"""The marks of a passage: its numbers with their units, limits, frequencies, what it forbids, and where it speaks of conditions.

They are rules of thumb in English and Chinese, and no reading. All positions are of the folded text
(:func:`gatewise_mdt.wholes.fold`), in which case, widths and kinds of dashes are one.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from gatewise_mdt.wholes import Folded, any_of, fold

HAN = "\u3400-\u9fff"
_WORD = "[a-z0-9]"  # what an English word is made of, in folded text


def set_of(words: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(words.split())


def _words(*patterns: str) -> str:
    """English words or phrases that stand alone."""
    return rf"(?<!{_WORD})(?:{'|'.join(patterns)})(?!{_WORD})"


class Span(NamedTuple):
    """Characters of the folded text."""

    begin: int
    end: int

    def overlaps(self, other: "Span") -> bool:
        return self.begin < other.end and other.begin < self.end

    def holds(self, other: "Span") -> bool:
        return self.begin <= other.begin and other.end <= self.end


# ---- numbers ----

DIGITS = r"(?:[1-9]\d{0,2}(?: \d00)+(?!\d)|\d+)(?:[.,·]\d+)*"  # "2 000" is one number
_COUNTS = "one two three four five six seven eight nine ten eleven twelve"
SPELT = any_of(_COUNTS)
HAN_DIGITS = "[一二两三四五六七八九十半]"
_DOSE_UNIT = (
    any_of(
        "mg g μg ng kg milligram milligrams microgram micrograms gram grams iu miu u ku ᴍu l ml dl meq mmol μmol mol unit units"
        " drop drops puff puffs tablet tablets capsule capsules sachet sachets ampoule ampoules vial vials spray sprays"
    )
    + rf"(?!{_WORD})"
)
_HAN_DOSE_UNIT = "万?" + any_of("毫克 微克 克 毫升 升 单位 国际单位 片 粒 丸 滴 支 瓶 袋 喷 揿 u iu")
_UNIT = rf"(?: ?(?:million |万)?{_DOSE_UNIT}| ?{_HAN_DOSE_UNIT})"
# Not the digits of names ("Th2", "5-HT", "COVID-19", "type 2", "step 3"), of lists ("1)", "2、") and of references ("[3]").
_NUMBER = re.compile(
    rf"(?<![a-z0-9.α-ω^])(?<![a-z]-)(?!(?<=\[)[\d, -]+\])(?<![\[\d],)(?<!type )(?<!step )(?<!table )(?<!figure )"
    rf"(?<!\(level )(?<!\(grade ){DIGITS}"
    rf"(?:(?:{_UNIT}|万)?(?: ?[-~/×] ?| (?:to|or|and|x) | ?[至到或和] ?){DIGITS})*"
    rf"(?!\d|[a-z]*-(?!(?:mg|g|μg|ml|kg|units?|days?|weeks?|months?|years?|hours?|minutes?|h|d)(?![a-z]))[a-z{HAN}]|[α-ω]|型)"
)
_LISTED = re.compile(r"[)、]|\. ?(?=[a-z])")  # behind the number of an item
_SPELT_NUMBER = re.compile(
    rf"(?<![a-z-])({SPELT}(?: (?:to|or) {SPELT})?) (?:(?:days?|weeks?|months?|years?|hours?|cycles?|courses?|doses?)(?!{_WORD})"
    rf"|(?P<dose>{_DOSE_UNIT}))|(?<!第)(?<!{HAN_DIGITS})(?P<han>{HAN_DIGITS}) ?(?P<piece>[片粒滴喷揿])"
)
_VALUES = {word: str(at) for at, word in enumerate(_COUNTS.split(), start=1)}
_VALUES |= {sign: str(at) for at, sign in enumerate("一二三四五六七八九十", start=1)} | {"两": "2", "半": "0.5"}
_TAIL = re.compile(_UNIT)
_TIME = re.compile(
    rf"[ -]?(?:{any_of('day days week weeks month months year years hour hours h d w wk min minutes cycle cycles course courses')}"
    rf"(?!{_WORD})|个?(?:疗程|周期|小时|星期|月|年|岁|周|天|日|分钟))"
)
_PER_WEIGHT = re.compile(
    rf"(?:{_UNIT})? ?(?P<per>[(\[]? ?(?:/ ?\(?(?:kg|m2)"
    rf"|(?:per|for each|for every|each) (?:kg|kilo|kilogram|body weight|m2|square metre)"
    rf"|每 ?(?:千克|公斤|kg|平方米|m2)(?:体重)?|·?kg\^?-1)(?!{_WORD}))"
)


_WEIGHT_BEFORE = re.compile(r"(?P<per>每 ?(?:千克|公斤|kg)(?:体重)?) ?$")
Kind = Literal["dose", "time", "number"]


class Number(NamedTuple):
    """A number or a range in the text.

    Attributes:
        kind: with a unit that drugs are measured in, of time, or another one.
        end: behind the unit.
        digits: where each of its numbers stands.
        per_weight: where it says "per kg", if it does.
    """

    begin: int
    end: int
    kind: Kind
    digits: tuple[Span, ...]
    per_weight: Span | None

    @property
    def span(self) -> Span:
        return Span(self.begin, self.end)


def numbers_of(text: str) -> list[Number]:
    """The numbers of a folded text."""
    found = []
    for match in _NUMBER.finditer(text):
        if _is_of_list(text, *match.span()):
            continue
        digits = tuple(Span(*one.span()) for one in re.compile(DIGITS).finditer(text, *match.span()))
        dose, time = _TAIL.match(text, match.end()), _TIME.match(text, match.end())
        per = _PER_WEIGHT.match(text, match.end()) or _WEIGHT_BEFORE.search(text, max(0, match.start() - 10), match.start())
        kind: Kind = "dose" if dose else "time" if time else "number"
        end = dose.end() if dose else time.end() if time else match.end()
        found.append(Number(match.start(), end, kind, digits, Span(*per.span("per")) if per else None))
    for match in _SPELT_NUMBER.finditer(text):  # "seven days"
        said = Span(*match.span(1) if match[1] else match.span("han"))
        found.append(Number(*match.span(), "dose" if match["dose"] or match["piece"] else "time", (said,), None))
    return sorted(found)


def _is_of_list(text: str, begin: int, end: int) -> bool:
    """Whether a number is that of an item: "1) Give", "2、", "3. Stop", but not the 3 of "at least 3. Give" and "(score 3)"."""
    if end - begin > 2 or not _LISTED.match(text, end):
        return False
    if text[end] == ")" and text.count("(", 0, begin) <= text.count(")", 0, begin):
        return True
    before = text[:begin].rstrip()
    return not before or before[-1] in ".;:。!?("


def value(digits: str) -> str:
    """A number to compare: "1,000" is "1000", "0.50" is "0.5", "two" and 两 are "2"."""
    if digits in _VALUES:
        return _VALUES[digits]
    plain = re.sub(r"[, ](?=\d{3}(?!\d))", "", digits).replace("·", ".").replace(",", ".")
    return (plain.rstrip("0").rstrip(".") if "." in plain else plain).lstrip("0") or "0"


def quantities(text: str) -> set[tuple[str, str]]:
    """The (value, unit) of a folded text, the unit also of the first numbers of a range; "" for none that doses have."""
    found = set()
    for number in numbers_of(text):
        unit = "".join(text[number.digits[-1].end : number.end].split()) if number.kind == "dose" else ""
        found |= {(value(text[span.begin : span.end]), unit) for span in number.digits}
    return found


# ---- limits and frequencies ----

LIMIT = re.compile(
    r"[<>≤≥]=?|"
    + _words(
        "max(?:imum|imal|imally)?",
        "min(?:imum|imal)",
        "at (?:least|most)",
        "(?:no|not) (?:more|less|fewer|greater|higher|longer|later|earlier) than",
        "(?:not|never) (?:to )?(?:be )?exceed(?:ed|ing)?",
        "up to|(?:limit|restrict)(?:ed)? to",
        "(?:more|less|fewer|greater|higher|lower|longer|older|younger|larger|smaller) than(?: or equal to)?",
        "exceed(?:s|ing|ed)?",
        "above|below|under|over|within",
        "(?:or|and) (?:over|under|above|below|older|younger|up(?! to))(?! than)",
        "or (?:more|less|fewer|higher|lower|greater|longer|shorter|later)(?! than)",
    )
    + r"|不[得应宜可]?超过|超过|最[大高多低小少](?:日|单次|每日)?(?:剂?量)?|至[少多]|[大小高低多少]于(?:等于)?|以[上下内]|上限"
    r"|不少于|不多于|不足|[未不]满|极量"
)
BELOW = re.compile(r"<|≤|below|under|less|fewer|lower|younger|smaller|[小低少]于|不足|以下")
ABOVE = re.compile(r">|≥|above|over|more|greater|higher|older|larger|exceed|[大高多]于|(?<!不)超过|以上")
_BEFORE_NUMBER = re.compile(  # between a limit and its number: "maximum daily dose of bisoprolol for these patients is 5 mg"
    r"[^.;。,<>≤≥\d]{0,60}"
)
_CLOSE = re.compile(  # "above a threshold of 65", and not "above should receive 5 mg"
    r"(?: ?(?:the|an?|age|of|about|around|approximately|first|next|last|level|threshold|period|total|daily|single|dose|target"
    r"|baseline|score)(?![a-z]))* ?[(\[]?"
)
_LOOSE = re.compile(r"above|below|under|over|within|(?!no).*than|以.")  # "no more than" is said of nothing but a number
_AFTER_NUMBER = re.compile(r"(?:[ -]?[^\d\W]{1,12}){0,2}[ (\[]{0,2}")

_PERIOD = "(?:day|week|month|year|night|hour|fortnight|morning|evening)"
_TIMES = rf"(?:once|twice|thrice|(?:{DIGITS}|{SPELT})(?:(?: to | or |-)(?:{DIGITS}|{SPELT}))? (?:times?|x))"
_FREQUENCY = re.compile(
    _words(
        rf"{_TIMES}(?: (?:or|to) {_TIMES})?"
        rf"(?: ?/ ?{_PERIOD}| (?:an?|per|each|every|in (?:a|one)) {_PERIOD}| (?:dai|week|month|year)ly)",
        rf"every (?:other|second|third|alternate|(?:{DIGITS}|{SPELT})(?:(?: to | or | ?- ?)(?:{DIGITS}|{SPELT}))?)"
        rf" ?(?:{_PERIOD}|h)s?",
        rf"(?:on )?alternate {_PERIOD}s?|every {_PERIOD}",
        rf"(?:{DIGITS}|{SPELT})[- ]?hourly|in (?:{DIGITS}|{SPELT})(?:(?: to | or |-)(?:{DIGITS}|{SPELT}))? divided doses",
        "(?:bi)?weekly|monthly|fortnightly|nightly|once only|only once",
        r"q ?d|b\.?i?\.?d|t\.?i\.?d|q\.?i\.?d|q\.?o\.?d|q ?\d+ ?(?:h|d|w)",
    )
    + rf"|(?<=[gul\d])(?:qd|bid|tid|qid|qod|q\d+h)(?!{_WORD})"
    + rf"|(?:每[日天周月年晚晨]|[一1]日|隔[日天]|\d+ ?[日天]|日)(?:口服|服用?|给药?|静[滴注])? ?(?:{DIGITS}|{HAN_DIGITS})"
    rf"(?: ?[-~至到或] ?(?:{DIGITS}|{HAN_DIGITS}))? ?次"
    rf"|(?:{DIGITS}|{HAN_DIGITS})(?: ?[-~至到或] ?(?:{DIGITS}|{HAN_DIGITS}))? ?次 ?(?:/|每) ?(?:d(?!{_WORD})|[日天周月年]|小时)"
    rf"|[每隔] ?(?:{DIGITS}|{HAN_DIGITS})(?: ?[-~至到或] ?(?:{DIGITS}|{HAN_DIGITS}))? ?"
    r"(?:个?(?:小时|月|星期|疗程)|[日天周年]|h|d)"
    rf"|(?:{DIGITS}|{HAN_DIGITS})个?[周月天日年](?:{DIGITS}|{HAN_DIGITS})次"
    rf"|隔[日天周]|每[周月年晚](?![一二三四五六])"
)
# Before "a week", which then is how long or when.
DURING = (
    "for", "in", "within", "after", "lasting", "than", "over", "under", "above", "below", "exceeding", "least", "half",
)  # fmt: skip
DAILY = re.compile(  # counts only beside a dose
    _words(
        "daily",
        r"(?:per|each|every) (?:day|week|month|year|hour|minute)",
        "".join(rf"(?<!{word} )" for word in DURING) + r"an? (?:day|week|month|year|hour(?! (?:before|after)))",
        "(?<= in )a day",
        r"/ ?(?:d(?:ay)?|w(?:ee)?k|h(?:r|our)?|(?<!ml /)(?<!ml / )min(?:ute)?)",
        "yearly|annually|at (?:night|bedtime)|nocte|tds|qds|od|bds|stat|prn|as (?:needed|required)|when required",
    )
    + rf"|(?<=[a-z{HAN}\d])/ ?(?:d(?:ay)?|h(?:r|our)?|w(?:ee)?k|(?<!ml/)(?<!ml/ )min)(?!{_WORD})"  # not of an eGFR
    + r"|(?:每|[一1])[日天]|/[日天次]|每小时|每分钟?|睡前|必要时"
)


ROUTE = re.compile(
    _words(
        "(?:intravenous|intramuscular|subcutaneous|intrathecal|sublingual|oral|rectal|topical)(?:ly)?",
        "by mouth|inhaled|nebuli[sz]ed",
        "i\\.?v\\.?|i\\.?m\\.?|s\\.?c\\.?|p\\.?o\\.?",
    )
    + "|静脉(?:滴注|注射|推注|输注|点滴)|静[滴注推]|肌[内肉]?注射?|皮下注射|鞘内注射|舌下含服|口服|吸入|外用|直肠给药"
)
_BESIDE = re.compile(  # "5 mg in a day", but not "5 mg and a visit in a day"
    rf"(?! .*[a-z] in $)(?:[a-z{HAN} ()/·]|\d(?!\d*[a-z])){{0,24}}"
)
_HAN_BESIDE = re.compile(rf"[{HAN}]{{0,4}}")


class Prohibition(NamedTuple):
    """Words that forbid, what they are about, and where else a drug may stand that they are about."""

    cue: Span
    scope: Span
    wide: Span


class Limit(NamedTuple):
    """Words or a sign that make a number a limit, and the number."""

    words: Span
    number: Number


# ---- sentences, what is forbidden, conditions ----

_NAME = re.compile(r"[\s(]*([^:.;。]{1,60}): ?(?=\S)")
_INNER_NAME = re.compile(r": ?([^:.;。]{1,60})(?=: ?\S)")
_SENTENCE_END = re.compile(r"[。；！？;!?\n]|(?<!e\.g)(?<!i\.e)(?<!vs)\.(?=\s|$)")
_COMMA = re.compile(r"(?<=,)(?!\d)")
_CONTRAST = re.compile(
    _words("but", "however", "instead", "otherwise", "unless", "except", "whereas", "although")
    + "|但是?|除非|否则|然而|而(?=应|可|[^且])"
)
_ADVERB = (
    r"(?:(?:be|been|routinely|generally|usually|currently|normally|always|any|longer|strongly|further|therefore|also"
    r"|yet|necessarily|the|first|preferred|a|an|in general|typically|considered|primarily|as) ){0,4}"
)
_NOT = r"(?:not|never|no longer|cannot|can ?not|[a-z]+n't)"
_DONE = (
    r"(?:recommended|advised|advisable|advocated|indicated|suggested|suitable|appropriate|preferred|preferable|used|given|administered"
    r"|prescribed|offered|performed|continued|taken|started|treated|initiated|considered|warranted|necessary|needed|required|applied"
    r"|combined|an? option|option|choice|use|give|offer|receive|take|prescribe|start|administer|perform|combine|recommend|advise"
    r"|suggest|advocate)"
)
_FORBIDS_AFTER = re.compile(  # "do not give X"
    _words(
        rf"(?:do|should|must|may|can|shall|need|is|are|we do)? ?{_NOT} (?:to )?{_ADVERB}"
        r"(?:give|use|offer|prescribe|start|administer|take|perform|receive|recommend|advise|suggest|combine"
        r"|initiate|restart|resume|continue|add|consider|switch to|treat with"
        r"|(?:recommended|advisable) to (?:use|give|perform|administer))"
        r"(?: (?:the )?(?:routine )?use of)?",
        r"(?<!to )avoid(?:ing)?(?: (?:the )?(?:using|use of|giving))?|refrain(?:ing)? from(?: (?:using|giving))?",
        r"(?:stop|discontinue|withhold|withdraw|omit|cease(?=[ :(\"'\[]+(?!(?:and|or|then|after|give) )\w)|hold(?! on))"
        r"(?: (?:the )?use of| taking)?",
        r"(?:recommend|advise|suggest)(?:ed|d|s)? not (?:to )?(?:us(?:e|ing)|giv(?:e|ing)|start(?:ing)?)",
        r"under no circumstances (?:should|may|must)|neither|contra-?indications?(?: are| include)? ?:",
        r"no(?= [a-z-]+(?: [a-z-]+)? (?:should|must|may) be (?:given|used|offered|prescribed|taken))",
        rf"(?:(?:should|must|may|can|shall|is|are) )?{_NOT} (?:to )?(?:be )?(?:combined|mixed|co-?administered"
        r"|(?:given|used|taken|prescribed)"
        r"(?: together| concomitantly| concurrently| simultaneously| in combination| at the same time)) with",
        rf"{_NOT}(?= (?:intrathecal|intraven|intramusc|subcut|epidural|oral|rectal)(?:ous|ular|aneous)?(?:ly)?(?!{_WORD}))",
        r"rather than|instead of|but not (?:(?:together|combined|in combination) )?with",
        r"should (?:be )?avoid(?: (?:the )?use of)?",
        r"(?:recommend|advise)(?:ed|d|s)? against(?: (?:the )?use of)?",
        rf"{_NOT} {_ADVERB}(?:be )?treated with",
        r"there is no (?:indication|role|place) for",
    )
)
_FORBIDS_BEFORE = re.compile(  # "X is not recommended"
    _words(
        rf"(?:is|are|be|was|were|should|must|may|can|could|shall|has|have|ought) {_NOT} (?:to )?{_ADVERB}(?:be )?{_ADVERB}{_DONE}"
        r"(?! (?:well|in time)(?!\w))",
        rf"(?:should|must) {_NOT}",
        rf"(?:cannot|(?:should|must|is|are|need|may)n't) {_ADVERB}(?:be )?{_ADVERB}{_DONE}",
        r"(?:has|have) no (?:role|place|benefit)|(?:is|are) of no benefit",
        rf"{_NOT} {_ADVERB}(?:be )?{_ADVERB}(?:recommended|advised|indicated|advisable|suggested)",
        r"(?:is|are|be) (?:(?!not|never)\w+ )?(?:contra-?indicated|prohibited|forbidden|banned|avoided|withheld|withdrawn"
        r"|omitted|held(?! (?:upright|still|in (?:place|position)"
        r"|by (?:(?:an?|the|their|his|her) )?(?:parent|mother|father|adult|carer|caregiver|guardian|relative|assistant"
        r"|helper|hand)s?\b))"
        r"|discouraged|stopped"
        r"|discontinued|inadvisable|inappropriate|unsuitable|unsafe|dangerous|ineffective)",
        r"contra-?indicated",
    )
)
_STOPS = (
    r"(?:stop|discontinu|withh|withdr|avoid|interrupt|delay|omit|exceed|miss|den(?:y|ie)|postpon|defer|ceas|preclud|contra-?indic)"
)
_ONLY = re.compile(
    _words("only (?:if|when|where|in|for|after)", "only (?:use|give|offer|prescribe|consider)") + "|仅[在当限对用]|只有|才"
)
_STOPPED = re.compile(r"(?<![a-z])(?:stop|discontinu|withh|withdr)|停[用药]")
_KEEPS = re.compile(rf" (?:be )?(?:[a-z]+ly )?{_STOPS}[a-z]*")  # "should not be stopped"
_DOUBLED = re.compile(
    r"(?:(?<![a-z])(?:not|never|without)|n't)(?: [a-z]+ly| be| to){0,2} $"
    r"|[不勿未非免](?:应|得|可|宜|能|要|需|[突骤]然|随意|自行|擅自)*$"
)
_WITHOUT = re.compile(r"(?:(?! (?:in|to|for|with|among)(?![a-z]))[^,;.])* without(?![a-z])")  # "should not be given without tests"
_REPLACES = re.compile(  # "replace X with Y", "switch from X to Y": no more X
    _words(r"replac(?:e|ed|ing)(?= [^,;.]{2,60} (?:with|by) )", r"(?:switch|chang|convert)(?:e|ed|ing)? from(?= [^,;.]{2,60} to )")
)
_REPLACED = re.compile(_words(r"(?:is|are|be) replaced (?:with|by)"))  # "X is replaced by Y"
_REPLACEMENT = re.compile(r" (?:with|by|to) ")
_HAN_FORBIDS = re.compile(
    r"(?:不[宜应得可能要]|避免|禁止|严禁|切?勿|禁忌?|忌)(?:再|同时)?[与和同](?=[^,。;]{1,30}(?:合用|联用|同用|并用|同服|联合|同时))"
    r"|禁用|[禁停终]止(?:使用|应用|服用)|禁止|严禁(?:使用|应用)?|禁忌(?![证症])|(?<=的)(?:绝对|相对)?禁忌[证症](?=$|[,。;])|(?<!禁)忌用?(?![证症])|[切请]?勿(?:使用|用)?|反对(?:使用|应用)?"
    r"|不(?:再|作)?(?:常规)?(?:建议|推荐|主张|提倡)(?:常规|进行|使用|应用|给予|采用|单独|首选|行|用)*"
    r"|不(?:宜|应|得|可|能|要|需)(?:再|常规|继续|单独|长期)*"
    r"(?:使用|应用|给予|采用|加用|联用|启动|服用|进行|选用|首选|行|用(?!力)|给|予)"
    r"|不宜|避免(?:使用|应用|给予|服用)?|停[用服]|不适(?:合|宜|用(?=于|$|[,。;]))(?:使用|应用|用)?|无需(?:使用)?|不用(?!于)"
    r"|不作为(?=首选|一线|常规)|不必(?:使用|应用|给予)"
    r"|(?<!呼吸)(?<!心跳)(?<!心搏)暂停(?:使用|应用|服用)?|中止(?:使用)?|不(?:使用|应用|给予|加用|联用)(?!于)|暂不(?:使用|应用|给予|用)?"
)
_PEOPLE_ONLY = re.compile(r"(?:患者|病人|妇女|孕妇|患儿|者|人)(?:中?均?应?|亦应|也应)?$|^[^、]{0,16}(?:患者|者)中")
_HAN_PEOPLE = re.compile(  # "不宜手术的患者", but not "不宜给肝硬化的患者使用"
    r"[^、]{1,9}?(?:的(?:患者|病人|患儿|妇女|人)|(?<!患)者(?=[应可宜首推建行需]|\s*$))(?!.*[使应]用)|[^、]{1,9}(?:患者|时)\s*$"
)
_POINTS_BACK = re.compile(r"[这此其该]|" + _words("it|they|this|these|them|those drugs"))
_HAN_BEFORE = re.compile(r"\s*(?:于|用于|首选|一线|常规|者|$|[，。；,.;:：、）)])")
_POSITIVE = re.compile(
    _words(
        "recommended|should|may|can|could|must|is|are|be|preferred|effective|consider|give|use|administer|start|suggested|advisable"
    )
    + "|应|可|宜|推荐|建议|采用|给予|首选|选用|使用|有效"
)
_NEXT_PART = re.compile(
    r",| and (?=(?:give|use|start|offer|refer|consider|treat|switch|may|should|can|must)\b)|\b(?:other than|apart from|except)\b"
)
_ADVISES = re.compile(_words("recommended|should|may|can|could|must|is|are|be|preferred|suggested|advisable") + "|应|可|推荐|建议")
_CAUTION = re.compile(_words("cautio(?:n|us|usly)", "careful(?:ly)?", "worsen|aggravate|risk of") + "|慎|加重|诱发|小心|注意")
_EXCEPTION = re.compile(_words("unless", "except", "only (?:in|if|when|for)") + "|除非|除了|除[^,。;]{1,20}?外|仅|只有")
_PEOPLE = "(?:patients?|those|individuals?|adults?|children|infants?|people|persons?|women|men|cases?|subjects?|neonates?)"
_WITH = "(?:with|who|whose|of|where|in which|that|at|under|over|aged|without|receiving|having|presenting)"
_CONDITION = re.compile(
    _words(
        "if|when|whenever|where|once",
        rf"(?:in|for|among|of) (?:[a-z0-9-]+ ){{0,5}}?(?:{_PEOPLE}|pregnancy|disease)(?: {_WITH})?",
        rf"(?:{_PEOPLE}|anyone) {_WITH}",
        "in case of|in cases of|in the (?:presence|absence|event) of|during|after|in the setting of|unless|until",
        "who|whose",
    )
    + "|仅[在当对]|只有|对于?|如果?(?!.{0,2}[、])|若|当|一旦|凡|有(?=.{1,20}[者时])|合并|伴|出现|发生"
)
_CONDITION_END = re.compile(
    r"[,:]|(?<=[者时])"
    + "|"
    + _words(
        r"(?:is|are|was|were) (?:also )?(?:not )?(?:\w+ly )?"
        r"(?:recommended|advised|indicated|suggested|preferred|considered|used|given|administered)",
        "should|can be|may be|could be|must|may consider|may benefit",
    )
    + "|应|可(?!能)|宜|推荐|建议|采用|给予|首选|选用|禁用|忌用|不宜|不推荐|不建议|需"
)
_OTHERWISE = re.compile(
    _words("otherwise", "if not", "in other cases", "in all other(?: cases| patients)?", "the remaining patients", "all others?")
    + "|否则|反之|其[余他](?:患者|情况|病例|人)"
)
_ORDER = re.compile(  # at the beginning of a sentence or a part of it
    r"(?:^|[,;:.] ?|(?<![a-z])(?:then|and) )(?:repeat|increase|reduce|double|halve|taper|titrate|switch|replace|change|continue"
    r"|withdraw|withhold|admit|perform|inject|apply|arrange|call|seek|measure|aim)(?![a-z])"
)
_ORDERED = re.compile(  # a heading that says what to do
    r"(?:do not|don't|never|only|give|offer|avoid|stop|take|consider|add|prescribe|administer|refer|check|recommend|choose"
    r"|(?:use|start|treat|monitor|change|test|screen|review)(?! of| in| for| and))(?![a-z])"
    r"|推荐|建议|应|宜|首选|选用|采用|使用|给予|避免|停用|禁|忌|不"
)
_HEADING_ENDS = ":：.。?？!！ "
_ADVICE = re.compile(
    _words(
        "recommend(?:ed|s)?|should|advis(?:ed|able)|suggest(?:ed|s)?|indicated|considered|preferred|must|give|use|administer(?:ed)?"
        "|offer(?:ed)?|start(?:ed)?|treated?|treatments?|therapy|avoid(?:ed)?|stop|take|prescribe|choice|can be|may be|do not"
        "|contraindicated|discontinue|options?|effective|needed|needs?|required?s?|refer|monitor|check|add|used|given|appropriate"
    )
    + "|剂量(?:减|增|加|翻)|减量|加量|减半|停药"
    + "|推荐|建议|应|宜|可|首选|给予|治疗|禁|忌|采用|使用|选用|需|避免|有效|用于|选择|手术|方案|疗法|行|予"
)


@dataclass(frozen=True)
class Marks:
    """What a passage says that a tree should have, as far as rules of thumb can tell.

    Attributes:
        headings: those above it, with which it may begin.
    """

    passage: str
    headings: tuple[str, ...] = ()

    @cached_property
    def folded(self) -> Folded:
        return fold(self.passage)

    @property
    def text(self) -> str:
        return self.folded.text

    @cached_property
    def numbers(self) -> list[Number]:
        return numbers_of(self.text)

    @cached_property
    def limits(self) -> list[Limit]:
        """The words that make a number a limit; those without a number are left out."""
        found = []
        for match in LIMIT.finditer(self.text):
            after = next((one for one in self.numbers if one.begin >= match.end()), None)
            before = next((one for one in reversed(self.numbers) if one.end <= match.start()), None)
            behind = before and _AFTER_NUMBER.fullmatch(self.text, before.digits[-1].end, match.start())
            closed = match[0].startswith("max") and self.text[match.end() : match.end() + 1] in (")", "]")  # "40 mg (maximum)"
            if before and behind and (closed or match[0][:2] in ("or", "an", "以上", "以下", "以内")):
                found.append(Limit(Span(*match.span()), before))
                continue
            between = _CLOSE if _LOOSE.fullmatch(match[0]) else _BEFORE_NUMBER
            if after and between.fullmatch(self.text, match.end(), after.begin):
                found.append(Limit(Span(*match.span()), after))
        return found

    @cached_property
    def sides(self) -> dict[Number, bool]:
        """Numbers that are limits, and whether they are so from above ("below 140/90")."""
        said = [(limit.number, self.text[limit.words.begin : limit.words.end]) for limit in self.limits]
        found = {
            number: [(bool(BELOW.search(words)), bool(ABOVE.search(words))) for one, words in said if one == number]
            for number, _ in said
        }
        return {number: kinds[0][0] for number, kinds in found.items() if len(kinds) == 1 and kinds[0][0] != kinds[0][1]}

    @cached_property
    def frequencies(self) -> list[tuple[Span, Number | None]]:
        """How often something is done ("twice weekly", "every 7 days", 每日三次), with the dose beside it."""
        return [(Span(*match.span()), self._dose_beside(Span(*match.span()))) for match in _FREQUENCY.finditer(self.text)]

    def _dose_beside(self, span: Span) -> Number | None:
        doses = [one for one in self.numbers if one.kind == "dose"]
        before = next((one for one in reversed(doses) if one.end <= span.begin), None)
        after = next((one for one in doses if one.begin >= span.end), None)
        if before and _BESIDE.fullmatch(self.text, before.end, span.begin):
            return before
        return after if after and _HAN_BESIDE.fullmatch(self.text, span.end, after.begin) else None

    @cached_property
    def daily(self) -> list[tuple[Span, Number]]:
        """ "daily", "per day", 每日 beside a dose, with the dose."""
        spans = [Span(*match.span()) for match in DAILY.finditer(self.text)]
        alone = [one for one in spans if not any(other.begin <= one.begin < other.end for other, _ in self.frequencies)]
        return [(one, dose) for one in alone if (dose := self._dose_beside(one)) is not None]

    @cached_property
    def routes(self) -> list[tuple[Span, Number]]:
        """By which way a dose is given, with the dose beside it."""
        spans = [Span(*match.span()) for match in ROUTE.finditer(self.text)]
        found = [(one, dose) for one in spans if (dose := self._dose_beside(one)) is not None]
        return [(one, dose) for one, dose in found if not self.text[: dose.end].endswith("kg")]  # which weighs a patient

    @cached_property
    def sentences(self) -> list[Span]:
        ends = [match.end() for match in _SENTENCE_END.finditer(self.text)]
        bounds = sorted({0, *ends, len(self.text)})
        return [Span(a, b) for a, b in pairwise(bounds) if self.text[a:b].strip()]

    def sentence_at(self, place: int) -> Span:
        return next((one for one in self.sentences if one.begin <= place < one.end), Span(0, len(self.text)))

    @cached_property
    def named(self) -> list[tuple[Span, str, Span]]:
        """Sentences that begin with a name, as cells of tables are read ("Dose: 5 mg"): the name's place, it, the sentence."""
        found = [(match, one) for one in self.sentences if (match := _NAME.match(self.text, *one))]
        names = {match[1] for match, _ in found}
        made = []
        for match, one in found:  # the first cell may stand behind a heading, or what leads to the table: "Doses: Drug: ramipril."
            cells = [inner for inner in _INNER_NAME.finditer(self.text, match.end(1), one.end) if inner[1] in names - {match[1]}]
            name = cells[-1] if cells else match
            made.append((Span(*name.span(1)), name[1], Span(name.start(1), one.end) if cells else one))
        return made

    @cached_property
    def rows(self) -> list[Span]:
        """The rows of a table, of which the first cell has the same name in each; none if there is one row only."""
        made: list[list[Span]] = []
        names = Counter(name for _, name, _ in self.named)
        first, end = "", -1
        for _, name, sentence in self.named:
            anew = sentence.begin != end or names[first] == 1
            if anew or name == first:
                first = name if anew else first
                made.append([])
            made[-1].append(sentence)
            end = sentence.end
        starts = {sentence.begin: name for _, name, sentence in self.named}
        return [Span(row[0].begin, row[-1].end) for row in made if names[starts[row[0].begin]] > 1]

    @cached_property
    def parts(self) -> list[Span]:
        """The sentences, cut behind commas."""
        return self._cut(_COMMA)

    @cached_property
    def repeated_names(self) -> list[Span]:
        """Names of cells that come more than once."""
        names = Counter(name for _, name, _ in self.named)
        return [place for place, name, _ in self.named if names[name] > 1]

    @cached_property
    def clauses(self) -> list[Span]:
        """The sentences, cut before words of contrast."""
        return self._cut(_CONTRAST)

    def _cut(self, before: re.Pattern[str]) -> list[Span]:
        """The sentences, cut before what a pattern finds in them."""
        made = []
        for sentence in self.sentences:
            cuts = [match.start() for match in before.finditer(self.text, *sentence)]
            made += [Span(a, b) for a, b in pairwise(sorted({sentence.begin, *cuts, sentence.end}))]
        return made

    @cached_property
    def conditions(self) -> list[Span]:
        """Where the passage says for whom or when, from the word that begins it."""
        found: list[Span] = []
        for sentence in self.sentences:
            at = sentence.begin
            while (match := _CONDITION.search(self.text, at, sentence.end)) is not None:
                end = _CONDITION_END.search(self.text, match.end(), sentence.end)
                stop = end.start() if end else sentence.end
                found.append(Span(match.start(), max(stop, match.end())))
                at = max(stop, match.end())
        return found

    def in_condition(self, place: int) -> bool:
        return any(one.begin <= place < one.end for one in self.conditions)

    @cached_property
    def named_above(self) -> list[Span]:
        """The headings that the passage begins with, their numbers apart, but for those that say what to do."""
        made, at = [], 0
        for heading in map(fold, self.headings):
            said = heading.text.strip(_HEADING_ENDS)
            ends = (match.start() for match in re.finditer(r"(?<![a-z])\S", said))
            for part in (said[begin:] for begin in ends):
                after = at + len(part)
                if self.text.startswith(part, at) and self.text[after : after + 1] in tuple(_HEADING_ENDS):
                    if not _ORDERED.match(part) and not _ORDER.match(part):
                        made.append(Span(at, after))
                    at = len(self.text) - len(self.text[after:].lstrip(_HEADING_ENDS))
                    break
        return made

    def is_named_above(self, place: int) -> bool:
        return any(one.begin <= place < one.end for one in self.named_above)

    @cached_property
    def forbidden(self) -> list[Prohibition]:
        """What the passage forbids."""
        found = [(*one, self._wide(*one)) for clause in self.clauses for one in self._forbidden_in(clause)]
        return [Prohibition(*one) for one in found if one[1].begin < one[1].end or self.is_cell(one[0])]

    def is_cell(self, cue: Span) -> bool:
        """Whether words that forbid are all that a cell of a table says."""
        cell = next((name.end for name, _, sentence in self.named if sentence.holds(cue)), None)
        alone = cell is not None and not self.text[cell : cue.begin].strip(" :")
        return alone and any(row.holds(cue) for row in self.rows)

    def _wide(self, cue: Span, scope: Span) -> Span:
        """Where a drug may stand that a prohibition is of: its sentence, all before it where it names people only, or the row of a
        table of which a cell says no more than "do not use"."""
        sentence = self.sentence_at(cue.begin)
        about = self.text[scope.begin : scope.end].strip(" .;:,")
        if not about and (row := next((row for row in self.rows if row.holds(cue)), None)) is not None:
            return Span(row.begin, sentence.end)
        if _PEOPLE_ONLY.search(about) or _POINTS_BACK.search(about) or len(about) <= 2:
            return Span(0, sentence.end)
        return sentence

    def _forbidden_in(self, clause: Span) -> Iterator[tuple[Span, Span]]:
        text, held = self.text, []
        for match in _FORBIDS_AFTER.finditer(text, *clause):
            if self._is_condition_cue(match.start(), clause) or self._is_undone(match, clause):
                continue
            held.append(match.span())
            yield Span(*match.span()), Span(match.end(), self._ahead(match.end(), clause))
        for match in _FORBIDS_BEFORE.finditer(text, *clause):
            if any(a < match.end() and match.start() < b for a, b in held) or self._is_condition_cue(match.start(), clause):
                continue
            if self._is_undone(match, clause):
                continue
            yield Span(*match.span()), Span(self._back(match.start(), clause), match.start())
        for match in _HAN_FORBIDS.finditer(text, *clause):
            cue, end = Span(*match.span()), _to_comma(text, match.end(), clause.end)
            if self._is_undone(match, clause):
                continue
            about, looks_back = text[cue.end : end], _HAN_BEFORE.match(text, cue.end, clause.end) is not None
            if not looks_back and _HAN_PEOPLE.match(about):
                continue  # 不宜手术的患者 are people
            if match[0] == "避免" and about[:1] != "用" and text[clause.begin : cue.begin].rstrip()[-1:] == ",":
                continue  # a purpose
            begin = max(text.rfind(sign, clause.begin, cue.begin) for sign in ",:") + 1
            yield cue, Span(max(begin, clause.begin), cue.begin) if looks_back else Span(cue.end, end)

    @cached_property
    def bound(self) -> list[tuple[Span, Span]]:
        """What is forbidden "without" something else, as a whole: the words that forbid, and what they are about."""
        found = [match for clause in self.clauses for match in _FORBIDS_AFTER.finditer(self.text, *clause)]
        ends = [(match, _WITHOUT.match(self.text, match.end())) for match in found]
        return [(Span(*match.span()), Span(match.end(), self.sentence_at(match.end()).end)) for match, end in ends if end]

    def _is_undone(self, match: re.Match[str], clause: Span) -> bool:
        """Whether what would forbid is itself negated: "do not stop X", "X should not be delayed", "not without tests"."""
        text, (begin, end) = self.text, match.span()
        if _DOUBLED.search(text, max(clause.begin, begin - 30), begin) and not re.match("not|never", match[0]):
            return True
        if re.match(r"(?:[突骤]然|随意|自行|擅自)?(?:停[用药]|中断|减量|延[误迟])", text[end : end + 4]):
            return True
        is_not = re.search(rf"(?<![a-z]){_NOT}(?![a-z])", match[0]) is not None
        return is_not and (_KEEPS.match(text, end, clause.end) or _WITHOUT.match(text, end, clause.end)) is not None

    @cached_property
    def replaced(self) -> list[Prohibition]:
        """What the passage replaces by something else."""
        made = []
        for match in _REPLACES.finditer(self.text):
            end = _REPLACEMENT.search(self.text, match.end())
            scope = Span(match.end(), end.start() if end else match.end())
            points_back = _POINTS_BACK.fullmatch(self.text[scope.begin : scope.end].strip())
            wide = Span(self.sentence_at(match.start()).begin, scope.end) if points_back else scope
            made.append(Prohibition(Span(*match.span()), scope, wide))
        for clause in self.clauses:
            for match in _REPLACED.finditer(self.text, *clause):
                scope = Span(self._back(match.start(), clause), match.start())
                made.append(Prohibition(Span(*match.span()), scope, scope))
        return made

    def _is_condition_cue(self, place: int, clause: Span) -> bool:
        """Whether a negation belongs to a condition ("who should not be given X", "if X is not suitable")."""
        before = self.text[max(clause.begin, place - 60) : place]
        if re.search(r"\b(?:if|when|where|that|whom|whose)\b[^,;:]*$", before):
            return True
        return re.search(r"(?<!, )\b(?:who|those)\b *(?:[a-z]+ *)?$", before) is not None

    def _ahead(self, place: int, clause: Span) -> int:
        """Where a prohibition that looks ahead ends: before the next verb of advice."""
        for match in _NEXT_PART.finditer(self.text, place, clause.end):
            rest = self.text[match.end() : _to_comma(self.text, match.end(), clause.end)]
            if match[0] != "," or _POSITIVE.search(rest):
                return match.start()
        return clause.end

    def _back(self, place: int, clause: Span) -> int:
        """Where what a prohibition is about begins: behind the last part with a verb of its own."""
        begin = clause.begin
        for match in re.compile("[,:]| and ").finditer(self.text, clause.begin, place):
            if _ADVISES.search(self.text[begin : match.start()]):
                begin = match.end()
        return begin

    def advises(self, place: int) -> bool:
        """Whether the sentence at a place advises something."""
        begin, end = self.sentence_at(place)
        return _ADVICE.search(self.text, begin, end) is not None or _ORDER.search(self.text[begin:end].lstrip()) is not None

    def warns(self, place: int) -> bool:
        """Whether the sentence at a place asks for caution or tells of harm."""
        return _CAUTION.search(self.text, *self.sentence_at(place)) is not None

    def doubts(self, span: Span) -> bool:
        """Whether what stands at a place may be forbidden, or something to be careful with."""
        return self.warns(span.begin) or any(one.wide.holds(span) for one in self.forbidden)

    def is_restricted(self, place: int) -> bool:
        """Whether the sentence at a place is of a condition alone ("only if", 仅)."""
        return _ONLY.search(self.text, *self.sentence_at(place)) is not None

    def may_stop(self, place: int) -> bool:
        """Whether the sentence at a place says of an exception that something is stopped ("need not be stopped unless")."""
        return self.has_exception(place) and _STOPPED.search(self.text, *self.sentence_at(place)) is not None

    def is_exception(self, place: int) -> bool:
        """Whether the part of a sentence at a place begins with "unless", 除非."""
        clause = next((one for one in self.clauses if one.begin <= place < one.end), None)
        return clause is not None and _EXCEPTION.match(self.text, *clause) is not None

    def has_exception(self, place: int) -> bool:
        """Whether what the sentence at a place says has an exception ("unless", 除非)."""
        return _EXCEPTION.search(self.text, *self.sentence_at(place)) is not None

    @cached_property
    def recommends(self) -> bool:
        """Whether the passage advises anything."""
        return _ADVICE.search(self.text) is not None

    @cached_property
    def otherwise(self) -> list[Span]:
        """ "Otherwise", 否则: what is to be done where no condition holds."""
        return [Span(*match.span()) for match in _OTHERWISE.finditer(self.text)]


def _to_comma(text: str, begin: int, end: int) -> int:
    """The end of this part of a clause."""
    found = re.compile("[,;。]").search(text, begin, end)
    return found.start() if found else end


@lru_cache(maxsize=64)
def marks_of(passage: str, headings: tuple[str, ...] = ()) -> Marks:
    """The marks of a passage under headings."""
    return Marks(passage, headings)
