"""Which of the two languages a text is in."""

import re
from collections import Counter

from gatewise.errors import GatewiseError
from gatewise.mdt.relations import Language

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_WORD = re.compile(r"[^\W\d_]+")
# The commonest small words tell the languages of Latin script apart; words that two of them share are left out.
_ENGLISH = (
    "the of and to for with if is are be or not by this that at on from when than should may give has have who which without "
    "after before less more otherwise any all no as an start use it"
)
_OTHERS = (
    "der die das und ist mit bei für nicht sind werden wird oder eine einen einem auf zu von "
    "le la les des et est pour dans une avec chez sont du sur pas ou "
    "el los las y con para por del se debe pacientes "
    "il gli che di è sono nei delle della "
    "het een van voor zijn niet wordt "
    "os em não dos uma och är inte med som ved og til"
)
_MOST = 20_000


def detect_language(text: str, where: str = "") -> Language:
    """The language of a text: "zh" where Chinese characters carry it, "en" where Latin letters do and nothing speaks against it.

    Raises:
        GatewiseError: the text has no letters, or is in neither English nor Chinese.
    """
    place = f"{where}: " if where else ""
    part = text[:_MOST]
    letters = sum(character.isalpha() for character in part)
    if not letters:
        raise GatewiseError(f"{place}the text has no letters, expected a passage in English or Chinese")
    han, latin, kana = (len(kind.findall(part)) for kind in (_HAN, _LATIN, _KANA))
    advice = "name the language with --language en or zh if it is one of them all the same"
    if kana > 0.1 * (han + kana):
        raise GatewiseError(f"{place}the text looks Japanese, expected English or Chinese; {advice}")
    if han + latin < 0.6 * letters:
        raise GatewiseError(f"{place}the text is in another script, expected English or Chinese; {advice}")
    # A Chinese character says about as much as three Latin letters, and Chinese passages name drugs and units in Latin ones.
    if 3 * han >= latin:
        return "zh"
    words = Counter(word.lower() for word in _WORD.findall(part))
    english, others = (sum(words[word] for word in known.split()) for known in (_ENGLISH, _OTHERS))
    if others >= 2 and others > english:
        raise GatewiseError(f"{place}the text looks like neither English nor Chinese, the two that are known; {advice}")
    return "en"
