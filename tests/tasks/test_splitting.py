"""One source dealt out to train, dev and test."""

import random
import re
from datetime import date
from typing import Any

import pytest

from gatewise.errors import GatewiseError
from gatewise.tasks.records import Records
from gatewise.tasks.splitting import asked_again, asks_of, deal_out, set_aside, shown_of, taken_out

PARTS = {"dev": 0.1, "test": 0.1}


def tickets(count: int, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    """One in ten is rare."""
    return [
        {"text": f"ticket {n}", "label": "rare" if n % 10 == 0 else "often", "id": n} | more for n in range(first, first + count)
    ]


def dealt(
    rows: list[dict[str, Any]], group: str | None = None, **parts: float
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    found, told = deal_out(Records("label", rows, sorted({row["label"] for row in rows}), "rows.csv"), parts or PARTS, group)
    assert all(part.labels == sorted({row["label"] for row in rows}) for part in found.values())
    return {name: part.rows for name, part in found.items()}, told


def ids(rows: list[dict[str, Any]]) -> set[int]:
    return {row["id"] for row in rows}


def test_a_row_stays_on_its_side_in_any_order_and_when_rows_are_added() -> None:
    rows = tickets(400)
    found, told = dealt(rows)
    assert sorted(ids(found["train"]) | ids(found["dev"]) | ids(found["test"])) == list(range(400))
    assert sum(map(len, found.values())) == 400
    for name in PARTS:
        assert 25 <= len(found[name]) <= 55
        assert {row["label"] for row in found[name]} == {"rare", "often"}
    assert told == [
        f"rows.csv: {len(found['train'])} rows for train, {len(found['dev'])} rows for dev, {len(found['test'])} rows for test"
    ]
    assert ids(dealt(rows, dev=0.2)[0]["dev"]) > ids(found["dev"])
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {name: ids(part) for name, part in dealt(shuffled)[0].items()} == {name: ids(part) for name, part in found.items()}
    for count in (12, 25, 40):  # few, so that labels give rows whose hash is above the part
        before = dealt(tickets(count))[0]
        after = dealt(tickets(600))[0]
        assert not ids(before["train"]) & (ids(after["dev"]) | ids(after["test"]))
    assert ids(found["train"]) <= ids(after["train"])


def test_labels_of_few_rows_are_measured_if_one_is_left_to_train_on() -> None:
    rows = [*tickets(60), *({"text": f"odd {n}", "label": label, "id": 100 + n} for n, label in enumerate("aabbbc"))]
    found, told = dealt(rows)
    of = {name: {label: sum(row["label"] == label for row in part) for label in "abc"} for name, part in found.items()}
    assert of["train"] == {"a": 1, "b": 1, "c": 1}
    assert {label: (of["dev"][label], of["test"][label]) for label in "abc"} == {"a": (0, 1), "b": (1, 1), "c": (0, 0)}
    assert told[1:] == [
        "data.dev has no row with label a, c: there are too few to have some in each part",
        "data.test has no row with label c: there are too few to have some in each part",
    ]


def test_rows_that_ask_the_same_are_on_one_side() -> None:
    rows = [
        *tickets(200),
        *({**row, "id": row["id"] + 1000, "text": f" {row['text']}\n"} for row in tickets(200)),
        *tickets(50, label="other"),
    ]
    found, _ = dealt(rows)
    asked = [{" ".join(row["text"].split()) for row in part} for part in found.values()]
    assert sum(map(len, asked)) == 200
    assert len(found["dev"]) > 20
    chat = [{"messages": [{"role": "user", "content": f"{n % 20}"}, {"role": "assistant", "content": f"{n}"}]} for n in range(40)]
    parts, _ = deal_out(Records("chat", chat, None, "chat.jsonl"), {"dev": 0.2})
    asked = [{row["messages"][0]["content"] for row in part.rows} for part in parts.values()]
    assert sum(map(len, asked)) == 20


def test_what_is_taken_out_is_whole_units_in_any_order() -> None:
    units = [f"question {n // 2}" for n in range(40)]
    taken = taken_out(units, 7)
    assert len(taken) == 6
    assert {units[at] for at in taken}.isdisjoint(units[at] for at in range(40) if at not in taken)
    assert {39 - at for at in taken_out(units[::-1], 7)} == taken  # in any order
    assert len(taken_out(units, 30)) == 10
    assert taken_out(["the same"] * 40, 7) == set()


def test_what_two_groups_ask_is_not_both_trained_and_tuned_on() -> None:
    groups, asks = [f"customer {n // 2}" for n in range(40)], [f"question {n % 25}" for n in range(40)]
    kept, taken = set_aside(groups, asks, 7)
    assert {groups[at] for at in taken}.isdisjoint(groups[at] for at in kept)
    assert {asks[at] for at in taken}.isdisjoint(asks[at] for at in kept)
    assert len(taken) == 6
    assert len(kept) < 40 - 6
    assert set_aside(groups, groups, 0) == ([*range(40)], [])


def test_a_conversation_and_its_beginning_ask_the_same() -> None:
    def chat(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}

    short, long, other = chat("Hello", "Hi"), chat("Hello", " Hi ", "A lamp?", "Yes"), chat("Hello", "Good day", "A lamp?", "Yes")
    asks = asks_of(Records("chat", [long, other, short], None, "chats.jsonl"))
    assert asks[0] == asks[2] == '["Hello"]'
    assert asks[1] == '["Hello", "Good day", "A lamp?"]'
    assert asks_of(Records("chat", [long], None, "chats.jsonl")) == ['["Hello", "Hi", "A lamp?"]']
    dev, train = (Records("chat", rows, None, "chats.jsonl") for rows in ([short, other], [long, chat("A rug?", "No")]))
    assert (asked_again(dev, train), asked_again(train, dev)) == (1, 1)


def test_what_a_prompt_shows_beside_the_usual_field_is_a_part_of_what_a_row_asks() -> None:
    """An instruction that comes again is no copy where the rows have texts of their own."""
    rows = [{"source": "Shorten.", "document": f"text {n // 2}", "target": f"{n}"} for n in range(80)]
    blind, seeing = (Records("generation", rows, None, "rows.jsonl", shown=shown) for shown in ((), ("document",)))
    assert (len(set(asks_of(blind))), len(set(asks_of(seeing)))) == (1, 40)
    parts, _ = deal_out(seeing, {"dev": 0.2})
    assert 8 <= len(parts["dev"]) <= 24
    assert not {row["document"] for row in parts["dev"].rows} & {row["document"] for row in parts["train"].rows}
    assert shown_of("generation", ["source", "document", "answer"]) == ("answer", "document")
    assert shown_of("choice", ["question"]) == ("choices",)
    choice = [{"question": "Which?", "choices": [f"{n}", "none"], "answer": 0} for n in range(9)]
    assert len(set(asks_of(Records("choice", choice, None, "rows.jsonl", shown=("choices",))))) == 9


def test_a_field_that_is_no_text_may_be_shown() -> None:
    """A table's dates and numbers."""
    rows = [{**row, "when": date(2026, 1, 1 + row["id"] % 28), "text": "hello"} for row in tickets(28)]
    shown = Records("label", rows, ["often", "rare"], "rows.parquet", shown=("when",))
    assert len(set(asks_of(shown))) == 28


def test_a_group_is_on_one_side() -> None:
    rows = [{**row, "customer": f"c{row['id'] % 40}"} for row in tickets(400)]
    rows[7]["customer"] = ""  # nobody's
    found, told = dealt(rows, "customer", dev=0.2)
    customers = [{row["customer"] for row in part} - {""} for part in found.values()]
    assert not customers[0] & customers[1]
    assert len(customers[1]) > 2
    assert len(told) == 1
    # A text that several customers sent is not learned on one side and asked on the other.
    found, told = dealt(
        [*rows, *({"text": "hello", "label": "often", "customer": f"c{n}", "id": 400 + n} for n in range(40))], "customer", dev=0.2
    )
    assert [sum(row["text"] == "hello" for row in part) for part in found.values()] == [0, len(customers[1])]
    assert (
        told[1]
        == f"{40 - len(customers[1])} of them are left out: they ask what a row on another side asks, which is of another group"
    )


@pytest.mark.parametrize(
    ("rows", "group", "message"),
    [
        (
            tickets(1),
            None,
            "rows.csv has 1 different rows, of which none is left for data.dev with data.dev: 0.1 and data.test: 0.1",
        ),
        (tickets(2), None, "rows.csv has 2 different rows, of which none is left for data.dev"),
        (tickets(9, customer="c"), "customer", "rows.csv has 1 groups of rows, of which none is left for data.dev"),
        (tickets(9), "client", "data.group is client, which no row of rows.csv has: its fields are text, label, id"),
    ],
)
def test_what_cannot_be_dealt_out(rows: list[dict[str, Any]], group: str | None, message: str) -> None:
    with pytest.raises(GatewiseError, match=re.escape(message)):
        dealt(rows, group)
