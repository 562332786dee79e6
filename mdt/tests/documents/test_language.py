"""The language of a text: English and Chinese are told from others, and notes in telegraphic English are English."""

import pytest
from gatewise_mdt.documents.language import detect_language

from gatewise.errors import GatewiseError


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("For an acute flare, give colchicine 0.5 mg twice daily.", "en"),
        ("Amoxicillin 500 mg", "en"),
        ("CAP患者首选左氧氟沙星 levofloxacin 750 mg qd", "zh"),
        ("成人患者应口服药物治疗。", "zh"),
        ("Bei Patienten mit Gicht ist Colchicin die erste Wahl und wird oder", None),
        ("Les patients avec une goutte et des crises", None),
        ("痛風の患者にはコルヒチンを投与する", None),
        ("통풍 환자에게 콜히친을 투여한다", None),
        ("Пациентам с подагрой", None),
        ("123 / 45", None),
        ("Colchicine 0.5 mg per os twice daily; prednisolone 30 mg per os daily", "en"),
        ("Smith et al. Jones et al. recommend colchicine 0.5 mg twice daily", "en"),
        ("Give O2.", "en"),
        ("BP >140/90: start amlodipine 5 mg od", "en"),
        ("Metformin 500 mg bd, ramipril 5 mg od, atorvastatin 20 mg nocte, aspirin 75 mg od", "en"),
        ("Von Willebrand disease: LA catheter, DES stent, per os.", "en"),
        ("Hydroxychloroquine for Sjögren and Ménière disease", "en"),
        ("U pacjentów z ostrym napadem dny moczanowej należy podać kolchicynę, a w razie przeciwwskazań prednizon.", None),
        ("Akut gut atağında kolşisin verilir; kontrendikasyon varsa prednizolon başlanır ve hasta izlenir.", None),
        ("Ai pazienti con gotta acuta si somministra colchicina; se controindicata, prednisolone.", None),
    ],
)
def test_the_language_is_found_out_or_refused(text: str, language: str | None) -> None:
    if language is not None:
        assert detect_language(text) == language
        return
    with pytest.raises(GatewiseError, match=r"x\.md: .*expected .*English or Chinese|x\.md: .*neither English nor Chinese"):
        detect_language(text, "x.md")
