"""Which of the two languages a text is in."""

import re

from gatewise.errors import GatewiseError
from gatewise_mdt.relations import Language

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_WORD = re.compile(r"[^\W\d_]{2,}")
# Small words that other languages share are left out ("a", "in", "no"), and so are units.
_ENGLISH = (
    "the of and to for with if is are be or not by this that at on from when than should may give has have who which without "
    "after before less more otherwise any all an as start use it can must will do does but only over under until unless while "
    "during into their they also both each other either such using there was were been cannot "
    # of clinical notes, with their abbreviations
    "given used treat treated treatment therapy take taken stop avoid consider recommend recommended offer add check measure "
    "monitor refer prescribe administer continue reduce increase switch repeat review assess first second line choice daily "
    "once twice times every day days week weeks month months hour hours year years night morning needed orally adult adults "
    "child children women people pregnancy pregnant elderly mild moderate acute chronic disease failure blood pressure "
    "pain infection surgery symptoms signs high low od bd bid tds tid qds qid qd prn po iv sc stat nocte mane tablet tablets"
)
_COMMON = frozenset(_ENGLISH.split())
_UNITS = frozenset(["mg", "mcg", "µg", "μg", "ug", "kg", "ml", "dl", "mmol", "iu", "mmhg", "min"])
_MOST = 20_000
_TELLING = 8  # words from which on an English text has some of the common ones
_SHARE = 0.1  # of them; the published English passages have 0.25 and more, single sentences of them as little as 0.14


def detect_language(text: str, where: str = "") -> Language:
    """The language of a text: "zh" where Chinese characters carry it, "en" where Latin letters do and the words are English.

    Of a text of eight words or more some have to be common English ones; a shorter one in Latin letters counts as English.

    Raises:
        GatewiseError: the text has no letters, or is in neither English nor Chinese.
    """
    place = f"{where}: " if where else ""
    part = text[:_MOST]
    letters = sum(character.isalpha() for character in part)
    if not letters:
        raise GatewiseError(f"{place}the text has no letters, expected a passage in English or Chinese")
    han, latin = (len(kind.findall(part)) for kind in (_HAN, _LATIN))
    advice = "if it is one of them, say so with --language en or zh"
    if han + latin < 0.6 * letters:
        raise GatewiseError(f"{place}the text is in another script, expected English or Chinese; {advice}")
    # A Chinese character says about as much as three Latin letters, and Chinese passages name drugs and units in Latin ones.
    if 3 * han >= latin:
        return "zh"
    words = [word for word in map(str.lower, _WORD.findall(part)) if word not in _UNITS]
    if len(words) >= _TELLING and sum(word in _COMMON for word in words) < _SHARE * len(words):
        raise GatewiseError(f"{place}the text looks like neither English nor Chinese, the two that are known; {advice}")
    return "en"


def has_han(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return bool(_HAN.search(text))


def is_chinese(text: str) -> bool:
    """Whether Chinese characters carry a text: one says about as much as three Latin letters."""
    return 3 * len(_HAN.findall(text)) >= sum(map(str.isalpha, text)) > 0
