"""Constrained decoding: whatever a model prefers, what it writes is a valid tree, and every right answer can be written."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from gatewise_mdt import DecisionTree, TreeRecord, linearise, parse, parse_lenient, read_trees, sample
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.formats.lines import escaped
from gatewise_mdt.spans import absent_triples, find
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, properties, published, triple
from tiny_run import byte_tokenizer

pytest.importorskip("llguidance")
from gatewise_mdt.extraction.constraint import TreeConstraint, llguidance_tokenizer
from llguidance import LLMatcher

TOKENIZER = byte_tokenizer()
END = int(TOKENIZER.eos_token_id)
RECORD = TreeRecord(TEXT, DecisionTree.from_preorder(gout()))
CHINESE = TreeRecord(
    "成人患者@轻度脱水可以口服生理盐水；否则静脉注射。",
    DecisionTree.from_preorder(
        [
            {"role": "C", "triples": [["成人患者", "临床表现", "轻度脱水"]], "logical_rel": "null"},
            {
                "role": "D",
                "triples": [["成人患者", "治疗药物", "生理盐水"], ["生理盐水", "用法用量", "口服"]],
                "logical_rel": "and",
            },
            {"role": "D", "triples": [["成人患者", "治疗方案", "静脉注射"]], "logical_rel": "null"},
        ]
    ),
)

SIGNS = st.sampled_from("ab ~|;\\\"'/@#{}%&药１é\u00a0\u200b\u0301😀\x01\x7f\x85")


def write(course: Course, choose: Callable[[int, np.ndarray], int], most: int = 5000) -> TreeConstraint:
    """Writes token by token; choose(step, allowed) names the next."""
    constraint = TreeConstraint(TOKENIZER, [course], ends=[END], prompt_tokens=0, max_new_tokens=most)
    ids = torch.zeros(1, 0, dtype=torch.long)
    for step in range(most):
        scores = constraint(ids, torch.zeros(1, len(TOKENIZER)))
        token = choose(step, np.flatnonzero(scores[0].numpy() == 0))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == END:
            break
    constraint.read(ids)
    return constraint


def dictate(course: Course, text: str) -> None:
    """Writes a text, and fails where the constraint forbids it."""
    ids: Sequence[int] = [*TOKENIZER(f" {text}", add_special_tokens=False)["input_ids"], END]

    def choose(step: int, allowed: np.ndarray) -> int:
        assert ids[step] in allowed, f"forbidden after {text[: max(0, step - 1)][-60:]!r}"
        return ids[step]

    write(course, choose)
    assert course.finished
    assert course.written == text


def at_random(seed: int) -> Callable[[int, np.ndarray], int]:
    """Draws among what is allowed, with a lasting liking for some tokens, as models have."""
    draw = np.random.default_rng(seed)
    liking = draw.normal(scale=2.0, size=len(TOKENIZER))
    return lambda step, allowed: int(allowed[np.argmax((liking + draw.gumbel(size=len(liking)))[allowed])])


@pytest.mark.parametrize("verbatim", [False, True])
@pytest.mark.parametrize("record", [RECORD, CHINESE, *sample()[:4]], ids=lambda record: record.text[:12])
def test_every_right_answer_can_be_written(record: TreeRecord, verbatim: bool) -> None:
    course = Course(record.tree.language, within=record.text if verbatim else None)
    dictate(course, linearise(record.tree, text=record.text))


def test_every_published_chinese_tree_can_be_written() -> None:
    for file in (one for one in published() if one.name == "zh_dev.json"):
        for record in read_trees(file, repair=True).records[::10]:
            dictate(Course("zh", within=record.text), linearise(record.tree, text=record.text))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_a_model_likes_it_writes_a_tree(seed: int) -> None:
    record = (RECORD, CHINESE)[seed % 2]
    course = Course(record.tree.language, within=record.text if seed % 3 else None)
    constraint = write(course, at_random(seed), most=300 + 100 * (seed % 5))
    if course.finished:
        assert parse(course.written).language in ("en", record.tree.language)
        assert not seed % 3 or absent_triples(record.text, parse(course.written)) == ()
    else:  # cut inside a phrase: what is whole can be read
        assert constraint.rows[0].seen == constraint.rows[0].most
        assert parse_lenient(course.written).tree is not None or not course.written


def test_no_triple_comes_twice_in_a_node() -> None:
    course = Course("en")
    for piece in (" D: a | drug | b;", " ~ | drug | c;"):
        course.add_piece(piece)
    grammar = course.grammar()
    for form in ("a | drug | b", "~ | drug | b", "~ | drug | c", "a | drug | c"):
        assert f'"{form}"' in grammar


def test_the_tree_is_bounded() -> None:
    course = Course("en")
    course.most_depth, course.most_conditions = 3, 2
    conditions = [" C: a | sign | b\n", "C: ~ | sign | c\n"]
    for piece in conditions:
        course.add_piece(piece)
    assert '"C: "' not in course.grammar()
    for piece in ("D\n", "D\n", "D"):
        assert not course.finished
        course.add_piece(piece)
    assert course.finished


def test_a_tree_that_runs_out_of_tokens_is_closed() -> None:
    course = Course("en")
    wanted = "C: a | sign | b\n" * 8

    def choose(step: int, allowed: np.ndarray) -> int:
        token = TOKENIZER(f" {wanted}", add_special_tokens=False)["input_ids"][step]
        return token if token in allowed else int(allowed[allowed != END][0] if (allowed != END).any() else END)

    constraint = write(course, choose, most=120)
    assert constraint.rows[0].hurried
    assert course.finished
    assert len(parse(course.written).nodes) < 2**8


@settings(properties, max_examples=20)
@given(st.text(SIGNS | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
@example("\x7f", 2)
@example("\x85b", 2)
def test_any_text_can_be_written_from(text: str, seed: int) -> None:
    text = f"a{text}"
    course = Course("en", within=text)
    write(course, at_random(seed), most=400)
    if course.finished:
        tree = parse(course.written)
        said = " ".join(text.split())
        for triple in tree.triples:
            for part in (triple.subject, triple.object):
                assert part in said


BITS = (
    "Give take or and to not non un- contra- anti- in adults daily antibiotics patches PPIs s 's x / - ~ ; | , . ( ) 5 mg 10mg"
    " 1,000 0.5 10-20_mg ½_tablet 1_1/2_tablets 10⁹/L <_5 5_mg/kg every_8_hours twice_daily 患者 不宜使用 非糖尿病 每日 以上"
)


@properties
@given(
    st.lists(st.tuples(st.sampled_from(BITS.split()), st.sampled_from(["", " "])), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
@example([("antibiotics", " "), ("10-20 mg", ""), ("PPIs", "患者")], random.Random(0))
def test_what_can_be_written_is_what_stands_in_the_text(bits: list[tuple[str, str]], draw: random.Random) -> None:
    text = "".join(bit.replace("_", " ") + gap for bit, gap in bits).strip()
    spans = [(begin, end) for begin in range(len(text)) for end in range(begin + 1, len(text) + 1)]
    phrases = {text[begin:end].strip() for begin, end in spans} - {"", "~"}  # "~" alone stands for a subject
    grammar = Course("en", within=text).grammar()
    fresh = LLMatcher(llguidance_tokenizer(TOKENIZER, (END,), len(TOKENIZER)), LLMatcher.grammar_from_lark(grammar))
    for phrase in draw.sample(sorted(phrases), min(len(phrases), 40)):
        ids = TOKENIZER(f" D: {escaped(phrase)} | drug | {escaped(phrase)}", add_special_tokens=False)["input_ids"]
        matcher = fresh.deep_copy()
        written = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        # Found as it is, for a phrase that stands there in capitals can only be written in capitals.
        assert written == any(text[span.start : span.end] == phrase for span in find(text, phrase)), (text, phrase)


def test_an_object_that_reads_like_a_join_is_none() -> None:
    nodes = [
        node("C", triple("or")),
        node("D", triple("and", "drug therapy"), triple("or", "drug therapy"), joined="or"),
        node("D"),
    ]
    tree = DecisionTree.from_preorder(nodes)
    record = TreeRecord("adults with gout@or and or", tree)
    assert linearise(tree).splitlines()[:2] == ["C: adults with gout | sign | or", "D: ~ | drug | and; ~ | drug | or | or"]
    assert parse(linearise(tree)) == parse_lenient(linearise(tree)).tree == tree
    dictate(Course("en", within=record.text), linearise(tree, text=record.text))
