"""Which of the two languages a text is in."""

import re
from collections import Counter

from gatewise.errors import GatewiseError
from gatewise_mdt.relations import Language

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_ACCENTED = re.compile(r"[\u00c0-\u024f\u1e00-\u1eff]")
_KANA = re.compile(r"[\u3040-\u30ff]")
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
    "child children women men people pregnancy pregnant elderly mild moderate acute chronic disease failure blood pressure "
    "pain infection surgery symptoms signs high low od bd bid tds tid qds qid qd prn po iv sc stat nocte mane tablet tablets"
)
# Of languages in Latin script; words that English notes and names have too are left out, as "os" (per os), "et" (et al.), "von".
_OTHERS = (
    "das und ist mit bei für nicht sind werden wird oder eine einen einem auf zu "  # German
    "le les des est pour dans une avec chez sont du sur pas ou "  # French
    "el los las por se debe pacientes una "  # Spanish
    "il gli che di è sono nei delle della pazienti si "  # Italian
    "het een voor zijn niet wordt bij geen moet geeft eerste keus wacht patiënten "  # Dutch
    "em não dos uma deve ao paciente "  # Portuguese
    "och är inte som ved til ikke av på hos eller skal hvis "  # Swedish, Danish, Norwegian
    "jest nie lub oraz należy przez dla jeśli pacjentów przypadku "  # Polish
    "při nebo není jsou pokud pacientů "  # Czech
    "ve ile bir için veya hasta hastalarda verilir "  # Turkish
    "yang dan dengan untuk pada jika atau tidak pasien "  # Indonesian
    "și şi cu este sau pentru dacă în la nu "  # Romanian
    "và nên không cho bệnh nhân nếu thì "  # Vietnamese
    "ja ei jos tai kun potilaan potilaalle annetaan "  # Finnish
    "és az egy hogy vagy nem esetén ha kell"  # Hungarian
)
_UNITS = "mg mcg µg μg ug kg ml dl mmol iu mmhg min"
_MOST = 20_000
_TELLING = 8  # words from which on an English text has some of the common ones
_SHARE = 0.1  # of them; the published English passages have 0.25 and more, single sentences of them as little as 0.14


def detect_language(text: str, where: str = "") -> Language:
    """The language of a text: "zh" where Chinese characters carry it, "en" where Latin letters do and the words are English.

    Of a text of eight words or more some have to be common English ones; a shorter one passes unless it has words or letters of
    other languages.

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
    if not _is_english(_WORD.findall(part)):
        raise GatewiseError(f"{place}the text looks like neither English nor Chinese, the two that are known; {advice}")
    return "en"


def has_han(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return bool(_HAN.search(text))


def is_chinese(text: str) -> bool:
    """Whether Chinese characters carry a text: one says about as much as three Latin letters."""
    return 3 * len(_HAN.findall(text)) >= sum(map(str.isalpha, text)) > 0


def _is_english(words: list[str]) -> bool:
    other_words = frozenset(_OTHERS.split())
    # "LA" and "DES" are abbreviations in English, and no articles.
    counts = Counter(word.lower() for word in words if not (word.isupper() and word.lower() in other_words))
    for unit in _UNITS.split():
        counts.pop(unit, None)
    english = sum(counts[word] for word in set(_ENGLISH.split()))
    others = sum(counts[word] for word in other_words)
    if others >= 2 and others > english:
        return False
    if counts.total() >= _TELLING:
        return english >= _SHARE * counts.total()
    accented = sum(number for word, number in counts.items() if _ACCENTED.search(word))
    return english > 0 or accented < 2
