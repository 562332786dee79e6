"""The six relations of Text2MDT (arXiv 2401.02034) in English and Chinese, and the short words a model writes for them."""

import re
from typing import Literal, get_args

from gatewise.errors import GatewiseError

Language = Literal["en", "zh"]

RELATIONS: dict[str, str] = {
    "clinical manifestation": "临床表现",
    "drug therapy": "治疗药物",
    "therapeutic schedule": "治疗方案",
    "dosage and administration": "用法用量",
    "prohibited drugs": "禁用药物",
    "basic condition": "基本情况",
}
# One word each, so that a model spends few tokens on them; the Chinese names are short as they are.
SHORT: dict[str, str] = {
    "clinical manifestation": "sign",
    "drug therapy": "drug",
    "therapeutic schedule": "plan",
    "dosage and administration": "dose",
    "prohibited drugs": "avoid",
    "basic condition": "basic",
}
_ENGLISH = {chinese: english for english, chinese in RELATIONS.items()}
_FROM_SHORT = {short: name for name, short in SHORT.items()}


def is_relation(name: str) -> bool:
    """Whether this is, letter by letter, one of the twelve names."""
    return name in RELATIONS or name in _ENGLISH


def language_of(relation: str) -> Language:
    """The language of a relation's name; every name that is not one of the Chinese counts as English."""
    return "zh" if relation in _ENGLISH else "en"


def relation_in(relation: str, language: Language) -> str:
    """The name of a relation in a language.

    Raises:
        GatewiseError: the relation or the language is not known.
    """
    check_language(language)
    if not is_relation(relation):
        raise GatewiseError(f"{relation!r} is no relation: expected {expected_relations()}")
    english = _ENGLISH.get(relation, relation)
    return RELATIONS[english] if language == "zh" else english


def check_language(language: str) -> None:
    """Refuses every language but the two.

    Raises:
        GatewiseError: the language is not known.
    """
    if language not in get_args(Language):
        raise GatewiseError(f"the language is {language!r}: expected 'en' (English) or 'zh' (Chinese)")


def expected_relations() -> str:
    """The twelve names, for error messages."""
    return "one of " + ", ".join(f"{english} ({chinese})" for english, chinese in RELATIONS.items())


def short(relation: str) -> str:
    """The word that stands for a relation in what a model writes; in Chinese the name itself."""
    return SHORT.get(relation, relation)


def from_short(word: str) -> str | None:
    """The relation that a short word or a name stands for, exactly; None for any other."""
    name = _FROM_SHORT.get(word, word)
    return name if is_relation(name) else None


def nearest(word: str) -> str | None:
    """The relation a carelessly written word stands for, None when it is like none.

    Case, spaces and hyphens do not matter, and in each word of an English name a letter may be wrong, missing, over or out of its
    place (in the two long ones two). Another word makes another relation, perhaps the opposite one, as does another character of
    a Chinese name: those are never guessed.
    """
    plain = " ".join(word.casefold().split())
    if (name := from_short(plain)) is not None:
        return name
    # Of such short words as "sign" and "dose" no slip is safe to mend.
    apart = re.split(r"[\s_-]+", plain.replace("&", " and "))
    names = [one for one in (*RELATIONS, *_ENGLISH) if "".join(apart) == one.replace(" ", "")]
    names = names or [one for one in RELATIONS if _has_slips(apart, one.split(" "))]
    return names[0] if len(names) == 1 else None


def _has_slips(written: list[str], meant: list[str]) -> bool:
    """Whether words are those of a name but for slips. The first letters have to be right: "non" and "un" say the opposite."""
    return len(written) == len(meant) and all(
        one[:1] == other[0] and _slips(one, other) <= max(1, len(other) // 6) for one, other in zip(written, meant, strict=True)
    )


def _slips(one: str, other: str) -> int:
    """How many letters are to be changed, added or taken away, or neighbours to be swapped, to make one word of another."""
    if abs(len(one) - len(other)) > 2:
        return 3  # or more: too many for any name
    before, last = [0] * (len(other) + 1), list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, wanted in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
