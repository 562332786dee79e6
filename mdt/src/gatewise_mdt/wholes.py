"""What of a text is taken whole or not at all: words, numbers with their units, ranges, fractions, powers, and what is negated.

A phrase that is a part of one of these says something else than the text: "5 mg" is not what "2.5 mg", "5 mg/kg", "5-10 mg" or
"< 5 mg" says, nor "indicated" what "contra-indicated" says. :func:`cut` parts a text into such wholes. Both the check of a tree
(:mod:`gatewise_mdt.spans`) and verbatim decoding (:mod:`gatewise_mdt.extraction.course`) go by it, and so agree.

A rule that joins too much costs the reviewer a look, one that joins too little a wrong dose; so in doubt they join. They are rules
of thumb all the same, and no reading: "not ... indicated" with words between them is not seen.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

_HAN = r"\u3400-\u9fff\uf900-\ufaff"
_SIGN = rf"[^\W_{_HAN}]"  # a letter or a digit that is not Chinese

# ---- texts made comparable ----

_SIGNS = str.maketrans(
    dict.fromkeys("‐‑‒–—―−－﹣", "-")
    | dict.fromkeys("‘’‚‛′＇", "'")
    | dict.fromkeys("“”„‟″＂", '"')
    | dict.fromkeys("〜∼˜", "~")
    | dict.fromkeys("⁄∕", "/")
    | dict.fromkeys("≦⩽", "≤")
    | dict.fromkeys("≧⩾", "≥")
    | dict.fromkeys("✕✖⨯", "×")
    | dict.fromkeys("•∙⋅", "·")
    | {"∶": ":"}
)
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_LONGEST_POWER = 10
_LEVELLED = str.maketrans(_RAISED + "₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_METRES = re.compile(r"(?:^|[^a-zA-Zµμ])[kcdmnµμ]?m$")
_MEGA = re.compile(rf"(?:(?<=\d)|(?<=\d\s))M(?=(?i:i?u|bq|hz|pa|v)(?!{_SIGN}))")
_MICROGRAM = re.compile(rf"(?<![^\W\d_{_HAN}])(?:mcg|ug)(?!{_SIGN})")


class Folded(NamedTuple):
    """A text made comparable: its characters, and for each the place that it came from."""

    text: str
    starts: list[int]
    ends: list[int]


def fold(text: str) -> Folded:
    """A text without what does not matter: case, runs of spaces, full-width forms, the kinds of dashes and of quotation marks.

    Powers and fractions stay what they are: "10⁹" becomes "10^9" and never "109"; "½" stays, as "1½" is not "11/2". Case matters
    where a million units and a thousandth of one would be the same ("MU", "mU"). "mcg" is "μg". Accents are apart from letters.
    """
    made: list[tuple[str, int, int]] = []
    mega = {match.start() for match in _MEGA.finditer(text)}
    for place, character in enumerate(text):
        if character.isspace():
            begin = made.pop()[1] if made and made[-1][0] == " " else place
            made.append((" ", begin, place + 1))
        elif unicodedata.category(character) != "Cf":  # soft hyphens, joiners, byte order marks: not to be seen
            made += [(one, place, place + 1) for one in ("ᴍ" if place in mega else _plain(text, place))]
    for match in reversed(list(_MICROGRAM.finditer("".join(one for one, _, _ in made)))):
        begin, end = match.span()
        made[begin : end - 1] = [("μ", made[begin][1], made[end - 2][2])]
    return Folded("".join(one for one, _, _ in made), [begin for _, begin, _ in made], [end for _, _, end in made])


def _plain(text: str, place: int) -> str:
    """One character made plain, by character so that each keeps its place."""
    around = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
    if text[place] == "，" and place and all(one.isascii() and one.isdigit() for one in around):
        return ", "  # of a sentence, and not of "0,5"
    character = text[place].translate(_SIGNS)
    if character in _RAISED:
        return _power(text, place)
    if (levelled := character.translate(_LEVELLED)) != character:
        return levelled
    kind = unicodedata.category(character)
    if kind == "No":  # "½", and the "①" of a list, which would make "15 mg" of "①5 mg"
        return character
    # Signs composed: "≮" must not become a "<" and a stroke apart from it.
    return unicodedata.normalize("NFKC" if kind == "Sm" else "NFKD", character).casefold().translate(_SIGNS)


def _power(text: str, place: int) -> str:
    """A raised digit or sign as a power or mass ("^9", "m2", "kg^-1", "131i"); as it is where it may be the mark of a footnote."""
    first = place
    while first > max(0, place - _LONGEST_POWER) and text[first - 1] in _RAISED:
        first -= 1
    last = place
    while last + 1 < min(len(text), place + _LONGEST_POWER) and text[last + 1] in _RAISED:
        last += 1
    before, level = text[max(0, first - 4) : first], text[place].translate(_LEVELLED)
    if (
        (before[-1:].isdecimal() and text[last] not in "⁺⁻")
        or before.endswith((")", "]"))
        or (text[first] in "⁺⁻" and last > first)
    ):
        return f"^{level}" if place == first else level
    isotope = not re.match(_SIGN, before[-1:]) and text[last + 1 : last + 2].isalpha()
    return level if isotope or _METRES.search(before) or text[last] in "⁺⁻" else text[place]


# ---- what belongs together, in folded text ----


def any_of(words: str) -> str:
    """One of some words, as a regular expression."""
    return "(?:" + "|".join(sorted(map(re.escape, words.split()), key=len, reverse=True)) + ")"


_NO_MORE = rf"(?!{_SIGN})"
_APART = rf"(?<!{_SIGN})"
_FRACTION = "[¼½¾⅐-⅞]"
_UNIT_WORDS = any_of(
    "kg g mg μg ng pg gr gram grams gramme grammes milligram milligrams microgram micrograms nanogram nanograms kilogram"
    " kilograms kilo kilos lb lbs pound pounds oz ounce ounces l dl ml cl μl nl fl cc litre litres liter liters millilitre"
    " millilitres milliliter milliliters deciliter decilitre teaspoon teaspoons tablespoon tablespoons tsp tbsp cup cups"
    " glass glasses mol mmol μmol umol nmol pmol meq eq mosm osm iu miu ᴍiu kiu u ku mu ᴍu μu unit units kcal cal kj j"
    " kilocalories calories ci mci μci bq kbq mbq ᴍbq gbq gy cgy mgy sv msv s sec secs seconds ms min mins minute minutes h"
    " hr hrs hour hours d day days wk wks week weeks mo mos mth month months y yr yrs year years yo night nights decade"
    " decades trimester trimesters m cm mm μm um nm km metre metres meter meters centimetre centimetres centimeter"
    " centimeters millimetre millimetres millimeter millimeters inch inches ft feet fr french gauge mmhg cmh2o kpa mpa ᴍpa"
    " pa hpa bar torr hz khz mhz ᴍhz db v mv ᴍv kv ma w kw met mets degree degrees percent ppm ppb tablet tablets tab tabs"
    " capsule capsules cap caps caplet caplets pill pills drop drops puff puffs spray sprays ampoule ampoules ampule ampules"
    " vial vials patch patches sachet sachets suppository suppositories lozenge lozenges dose doses injection injections"
    " inhalation inhalations infusion infusions cycle cycles course courses time times fold session sessions application"
    " applications actuation actuations pack packs pack-years cigarettes drink drinks point points cell cells copies beats"
    " breaths bpm rpm episode episodes attack attacks relapse relapses fraction fractions"
)
_HAN_UNIT = "个?" + any_of(
    "月 疗程 周期 小时 星期 礼拜 季度 年 岁 周岁 周 天 日 晚 夜 钟头 分钟 分 秒 次 片 粒"
    " 丸 滴 支 瓶 袋 剂 喷 吸 揿 杯 包 贴 枚 盒 针 倍 例 级 期 型 度 代"
    " 毫克 微克 千克 公斤 公克 克 斤 毫升 微升 升 单位 国际单位 毫米 厘米 公分 微米 米 毫摩尔 微摩尔 摩尔"
    " 毫当量 千卡 大卡 卡 千焦 量"
)
_POWER = r"(?:\^[-+]?\d|\d)?"

# "5", "2.5", ".5", "1,000", "1 000", "0,5", "1e5", "10^9", "1½", "1 1/2", "20万", "65+"
_DIGITS = (
    rf"(?:0,\d++|\d++,\d{{1,2}}(?!\d)(?= ?(?:{_UNIT_WORDS}{_NO_MORE}|[%‰°~-]|{_HAN_UNIT}))"
    rf"|\d{{1,3}}(?:[ ']\d{{3}}){{1,6}}+(?!\d)|\d++(?:,\d{{3}}(?!\d)){{0,6}}+)(?:[.·]\d++){{0,6}}+"
)
_NUMBER = (
    rf"(?:{_APART}|(?<=\dx))(?:(?:{_DIGITS}|(?<!\.)\.\d++)(?:e[-+]?\d++)?(?:\^[-+]?\d++)?(?: ?{_FRACTION}| \d++/\d++(?!/))?"
    rf"(?: ?(?:million|billion|thousand|hundred|lakh){_NO_MORE}| ?[十百千万亿]+|个半)?(?:\+(?! ?\d))?|{_FRACTION})"
)
_HAN_DIGITS = "[〇零一二两三四五六七八九十百千万亿]"
_HAN_NUMBER = (  # no 数 of 次数 or 计数
    r"(?!(?<=[次计指倍参系总多少人分读])数)[〇零一二两三四五六七八九十百千万亿半数几]{1,12}+(?:点[〇零一二三四五六七八九]{1,12}+|个半)?"
)
_COUNT = any_of(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    " twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen half quarter"
)
_SPELT = rf"{_APART}(?<!-){_COUNT}(?:[- ](?:and )?(?:an? )?{_COUNT}){{0,6}}+{_NO_MORE}"
_WEIGHT = rf"(?:kgs?|kilos?|kilogram(?:me)?s?|lbs?|pounds?|m2|sqm|square met(?:er|re)s?){_NO_MORE}"
_HAN_WEIGHT = "每 ?(?:千克|公斤|kg|平方米|m2)(?:的?体重|的?体表面积)?"
_NO_TIME = rf"(?! (?:(?:before|after|prior|later|earlier|apart|ago){_NO_MORE}|pre-?(?:op|dos|proced)))"
_PER = (  # "/kg", "/ (kg·d)", "/24 h", "per day", "weekly", "once a week", "daily for each kg", "·d", " kg^-1", "每公斤"
    rf"(?: ?/ ?(?:{_NUMBER} ?)?(?:[(\[][^()\[\]@]{{1,30}}[)\]]|(?!{_FRACTION}|x? ?\d){_SIGN}++{_POWER}|{_HAN_UNIT})"
    rf"| per (?:{_NUMBER} ?)?{_SIGN}++| (?:once )?(?:week|month|year|hour|fortnight)ly{_NO_MORE}|·{_SIGN}++{_POWER}"
    rf"| (?:once )?(?:an?|each|every) (?:week|month|year|hour|fortnight){_NO_MORE}{_NO_TIME}"
    rf"| (?:(?:[a-z]++ ){{0,4}}(?:per|each|every) (?:\d++ )?|a ){_WEIGHT}| ?{_HAN_WEIGHT}"
    rf"|\.{_UNIT_WORDS}{_POWER}{_NO_MORE}| {_UNIT_WORDS}\^?-[1-3](?!\d))"
)
_UNIT = (  # glued, anything is a unit; apart, what is known as one
    rf"(?:[ -]?{_UNIT_WORDS}{_POWER}{_NO_MORE}|(?!\d|x\d){_SIGN}++| ?(?:%|‰|°(?: ?[cf]{_NO_MORE})?)| ?{_HAN_UNIT}半?)"
)
_SPELT_UNIT = rf"[- ](?:of )?(?:an? |the )?{_UNIT_WORDS}{_NO_MORE}"
_QUANTITY = (
    rf"(?:(?:(?<![^\s(\[<>=≤≥,;:~@{_HAN}])(?:[-+]|± ?))?{_NUMBER}"
    rf"(?:{_UNIT}{_PER}{{0,8}}+|(?: ?/ ?{_UNIT_WORDS}{_POWER}{_NO_MORE}{_PER}{{0,8}}+))?"
    rf"|(?:{_HAN_NUMBER}(?: ?(?:--?|~|至|到|或) ?)){{0,2}}{_HAN_NUMBER} ?{_HAN_UNIT}半?{_PER}{{0,8}}+"
    rf"|{_SPELT}(?:{_SPELT_UNIT}{_PER}{{0,8}}+)?)"
)
_COMPARED = (  # "< ", "no more than ", "up to ", "max. ", "every ", "不超过", "最大剂量为", "每公斤体重", "第", "每日"
    rf"(?:[<>=≤≥≠≈≮≯]{{1,4}}+ ?|{_APART}(?:(?:not|no|never) (?:to )?)?(?:{_SIGN}++ than(?: or equal to)?|at least|at most"
    rf"|at or (?:above|below)|up to|over|under|below|above|beyond|exceed(?:s|ing|ed)?|every|q|within"
    rf"|(?:minimum|maximum|maximal|max\.?|min)(?: (?:daily|single|total|recommended|allowed|adult|oral)){{0,3}}"
    rf"(?: (?:dose|dosage|amount))?(?: of| is| ?:)?)"
    rf"(?: |(?<=:))(?:about |approximately |an? |the )?"
    rf"|[不未无]?(?:小于|大于|少于|多于|低于|高于|短于|长于|早于|晚于|超过|超出|至少|至多|最多|最少|不足|不到|不满|满)"
    rf"(?:或?等于)? ?"
    rf"|(?:最[大高低小](?:日|单次|每[日天次])?(?:用?剂?量)?|[上下]限|极量)(?:可?[为是达至])?(?: ?:)? ?"
    rf"|{_HAN_WEIGHT}(?:给予?|使?用|予)? ?|第 ?|[每隔一](?:日|天|晚|周|月|年|晨|早|夜) ?|[每隔] ?)"
)
_TO = (  # between two quantities: "-", " to ", "一" for a dash, " x ", "/", "+", ":"
    r"(?: ?(?:--?|~|至|到) ?|一(?=\d)| (?:or )?(?:to|up to|through|until) | ?[x×*/] ?| ?(?:\+/-|\+|±) ?|(?<=\d):(?=\d)| : (?=\d)"
    r"| ?[<>≤≥]=? ?)"
)
_BOUND = (
    rf"(?:(?: of age| old)?(?: (?:or|and) (?:more(?! than)|less|fewer|greater|lower|higher|older|younger|longer|shorter|over|under"
    rf"|above|below|up|upwards|beyond)| of age| old){_NO_MORE}"
    rf"|(?<=years) plus(?= ?(?:$|[^\w\s]|(?:with|who|and|or|on|in|should|may|can|are|is){_NO_MORE}))"
    rf"|(?: daily)? (?:(?:maximum|max|minimum){_NO_MORE}(?! (?:response|effect|efficacy|benefit|relief|improvement|plasma|serum)"
    rf"{_NO_MORE})|at (?:most|least){_NO_MORE}(?! (?:once|twice|thrice|every|until|till|if|when|half|as|for|before|after|during"
    rf"|daily|weekly|monthly|yearly|on|in|an? (?:hour|day|night|week|fortnight|month|year)){_NO_MORE}))"
    rf"(?! ?:|\.? ?(?:(?:of|is|an?|the|about|daily|single|total) ){{0,4}}(?:{_NUMBER}|{_SPELT}|dos)"
    rf"| (?:recommended|allowed|adult|oral) (?:daily )?(?:dose|dosage)(?: of| is| ?:)? {_NUMBER})"
    rf"| ?[及或]?(?:以上|以下|以内|以外|之内|之上|之下|内(?![服科镜脏分固])))"
)
_TIMES = rf"(?:once|twice|thrice|(?:{_NUMBER}|{_SPELT})(?:{_TO}(?:{_NUMBER}|{_SPELT}))? (?:times?|x))"
_PERIOD = "(?:day|week|month|year|night|hour|morning|evening)s?"
_WHOLE = (
    # Words: "Th2", "CD4+", "don't", and a power with what stands before it; apart from them the "'s" of "patient's".
    rf"{_SIGN}++(?:(?<=\d)\+{_NO_MORE}|(?:'(?!s{_NO_MORE}){_SIGN}++)*+)",
    r"\S\^[-+]?\d++",
    rf"'s{_NO_MORE}",
    # Doses: "≥ 0.5-1 mg/kg per day", "2 x 500 mg", "500mg/125mg", "every 6 to 8 hours", "65 years or older", "30kg以下".
    rf"{_COMPARED}{{0,3}}{_QUANTITY}(?:{_TO}{_COMPARED}?{_QUANTITY}){{0,8}}+{_BOUND}?",
    # Numbers that share a unit: "4 or 8 mg", "1, 2 or 3 tablets", "between 5 mg and 10 mg".
    rf"{_NUMBER}(?: ?[,、] ?{_NUMBER}){{0,8}}(?:,? (?:or|and|&) | ?[或和及、] ?){_NUMBER}{_UNIT}{_PER}{{0,8}}+",
    rf"{_SPELT}(?:, {_SPELT}){{0,8}},? or {_SPELT}(?:{_SPELT_UNIT})?",
    rf"(?P<between>{_APART}between )?{_QUANTITY}(?(between) and |[和与及]){_QUANTITY}(?(between)|之间)",
    # How often: "once or twice daily", "3 times a day", "every other day".
    rf"{_APART}{_TIMES}(?: (?:or|to) {_TIMES})?(?: (?:(?:dai|week|month|night|year|hour)ly|(?:an?|per|each|every|in)"
    rf" (?:{_SIGN}++ )?{_PERIOD}))?{_NO_MORE}",
    rf"{_APART}(?:every|alternate)(?: other| second| third| fourth)? {_PERIOD}{_NO_MORE}",
    # Parts of a dose: "half the usual dose".
    rf"{_APART}(?:half|double|triple|twice|quarter|one-third|two-thirds)[ -](?:of )?(?:the |an? |their )?(?:(?:usual|standard"
    rf"|normal|adult|daily|full|recommended|maximum|initial|previous|current) ){{0,5}}"
    rf"(?:doses?|dosage|amount|{_UNIT_WORDS}){_NO_MORE}",
    rf"(?:{_NUMBER}|{_HAN_NUMBER})分之(?:{_NUMBER}|{_HAN_NUMBER})",
    # Stages: "II-IV". Larger numbers, ordinals, ranges in Chinese: "十二", "第三". What begins with a number: "6-巯基嘌呤".
    rf"{_APART}[ivx]{{1,4}}[a-d]?(?: ?[-~/至到] ?| to )[ivx]{{1,4}}[a-d]?{_NO_MORE}(?:级|期|度|型)?",
    rf"{_HAN_DIGITS}{{2,}}|第 ?(?:\d++|{_HAN_DIGITS}++)",
    rf"{_HAN_DIGITS}{{1,12}}+(?: ?(?:--?|~|至|到) ?{_HAN_DIGITS}{{1,12}}+){{1,3}}+",
    rf"\d-[{_HAN}]",
    # What is negated, with its "not": "non diabetic", "should not be used", "不宜", "无感染".
    rf"{_APART}(?:non|contra|anti|un|no|not(?! only)|never|cannot|neither|nor|[a-z]+n't)(?: ?- ?| )"
    rf"(?:(?:be|been|being|to|have|has|had|usually|generally|routinely|normally|yet|currently|always|longer) ){{0,6}}{_SIGN}",
    rf"(?<![有除或])[不未无非没勿忌禁] ?[{_HAN}\w]",
    rf"(?<!或)(?:不[宜应能可需须必伴得再]|无[需须法]|没有|未[见有]|[切请]勿) ?[{_HAN}\w]",
)
_CHAIN = re.compile(rf"{_APART}{_SIGN}++(?:-{_SIGN}++)++")
_OPPOSITES = any_of("non un in im ir il dis de an anti contra counter ex no not mis mal hypo hyper sub low high")
_WANTING = any_of(
    "free negative naive resistant refractory intolerant allergic sparing less deficient insensitive independent unresponsive"
    " ineligible poor low"
)
_TURNED = re.compile(rf"(?:.*-)?{_OPPOSITES}-.*|.*-{_WANTING}")
_COUNTED = re.compile(_COUNT)
ENDING = r"e?s([^a-zA-Z0-9].*)?"
"""What begins with the ending of a plural, as a regular expression: no phrase does."""
_ENDING = re.compile(ENDING, re.DOTALL)


class Cut(NamedTuple):
    """A text in wholes.

    Attributes:
        folded: the text made comparable; all other positions are of its characters.
        begins: where a phrase may begin.
        ends: where a phrase may end, which are these places and those before the "s" of plurals.
        squeezed: the characters that are left without the spaces that are a matter of taste ("5 mg" and "5mg").
    """

    folded: Folded
    begins: list[int]
    ends: list[int]
    squeezed: list[int]

    def is_whole(self, begin: int, end: int) -> bool:
        """Whether a phrase may stand here."""
        return _among(self.begins, begin) and _among(self.ends, end)

    def around(self, begin: int, end: int) -> tuple[int, int]:
        """The smallest phrase that may stand here and has these characters in it."""
        return self.begins[bisect_right(self.begins, begin) - 1], self.ends[bisect_left(self.ends, end)]


@lru_cache(maxsize=64)
def cut(text: str) -> Cut:
    """Parts a text into its wholes."""
    folded = fold(text)
    signs = "".join(map(_shape, folded.text))
    inner = {at for begin, end in _joined(signs) for at in range(begin + 1, end)}
    # What becomes several characters, as "㎎" does, is one all the same.
    inner |= {at for at in range(1, len(signs)) if folded.starts[at] < folded.ends[at - 1]}
    begins = [at for at in range(len(signs) + 1) if at not in inner]
    endings: list[int] = []
    if not any(_ENDING.fullmatch(text, folded.starts[at]) for at in begins[:-1]):
        endings = [at for at in _endings(folded, signs, begins, text) if _ENDING.fullmatch(text, folded.starts[at])]
    return Cut(folded, begins, sorted([*begins, *endings]), _squeezed(signs))


def pieces(text: str) -> tuple[list[str], bool]:
    """A text in pieces of which every phrase that may stand in it is made: any that follow each other.

    Returns:
        The pieces, and whether among them are the "s" or "es" of plurals, with which no phrase begins.
    """
    parts = cut(text)
    places = [0, *(parts.folded.starts[at] for at in parts.ends[1:-1]), len(text)]
    return [text[begin:end] for begin, end in pairwise(places)], len(parts.ends) > len(parts.begins)


def _among(places: list[int], place: int) -> bool:
    at = bisect_left(places, place)
    return at < len(places) and places[at] == place


def _shape(character: str) -> str:
    """What a character counts as: an accent is a part of its word, the number of a list or footnote none of the next number."""
    if unicodedata.combining(character):
        return "a"
    return ";" if unicodedata.category(character) == "No" and not re.match(_FRACTION, character) else character


@cache
def _patterns() -> list[re.Pattern[str]]:
    """What belongs together, compiled when it is first needed: it takes a second or two, and a server may never need it."""
    return [re.compile(pattern) for pattern in _WHOLE]


def _joined(signs: str) -> Iterator[tuple[int, int]]:
    """The places that belong together."""
    for pattern in _patterns():
        yield from (match.span() for match in pattern.finditer(signs))
    for match in _CHAIN.finditer(signs):
        words = match[0].split("-")  # "non-diabetic", "65-year-old", "twenty-five"
        if _TURNED.fullmatch(match[0]) or words[0].isdigit() or _COUNTED.fullmatch(words[0]):
            yield match.span()
        begin = match.start()
        for word, following in pairwise(words):
            # "IL-6", "β-blocker"
            if word[-1].isdigit() or following[0].isdigit() or len(word) == 1:
                yield begin, begin + len(word) + 1 + len(following)
            begin += len(word) + 1


def _endings(folded: Folded, signs: str, begins: list[int], text: str) -> Iterator[int]:
    """Where words end without their plural's ending: "dose|s", "patch|es", "PPI|s", but "sepsis"."""
    for begin, end in pairwise(begins):
        word = signs[begin:end]
        if len(word) > 3 and word.isalpha() and word.endswith("s"):
            if word.endswith(("xes", "zes", "sses", "ches", "shes")):
                yield end - 2
            elif not word.endswith(("ss", "us", "is")) or text[folded.starts[end - 2]].isupper():
                yield end - 1


def _squeezed(signs: str) -> list[int]:
    taste = re.compile(rf"(?<=[{_HAN}<>=≤≥~/×+±·°%-]) | (?=[{_HAN}<>=≤≥~/×+±·°%-])|(?<=\d) (?=[^\W\d_])")
    spaces = {match.start() for match in taste.finditer(signs)}
    return [at for at in range(len(signs)) if at not in spaces]
