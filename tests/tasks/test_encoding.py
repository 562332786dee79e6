import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gatewise.errors import GatewiseError
from gatewise.tasks import PadCollator, Records, Template, encode, encode_classification

LABELS = Records(
    "label",
    [
        {"text": "the lamp is good", "label": "good"},
        {"text": "灯坏了", "label": "very bad indeed"},
        {"text": "x", "label": "good"},
    ],
    ["good", "very bad indeed"],
    "rows",
)
TEMPLATE = Template("Text: {text}\nLabel:")


@pytest.fixture
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts <s> before and </s> after every text."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>:1",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _answer(feature: dict[str, list[int]]) -> list[int]:
    return [label for label in feature["labels"] if label != -100]


def test_prompt_and_answer_are_tokenised_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    for feature, row in zip(encode(LABELS, tokenizer, TEMPLATE), LABELS.rows, strict=True):
        answer = [*tokenizer(" " + row["label"])["input_ids"], tokenizer.eos_token_id]
        assert feature["input_ids"] == tokenizer(TEMPLATE.render(row))["input_ids"] + answer
        assert _answer(feature) == answer
        assert feature["labels"][-len(answer) :] == answer
        assert tokenizer.decode(feature["input_ids"]) == f"Text: {row['text']}\nLabel: {row['label']}</s>"


def test_every_answer_ends_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    for kind, row in (
        ("choice", {"question": "what", "choices": ["a lamp", "4"], "answer": 1}),
        ("generation", {"source": "灯", "target": "a lamp"}),
        ("number", {"question": "how many", "answer": "#### 4"}),
    ):
        (feature,) = encode(Records(kind, [row], None, "rows"), tokenizer, None)  # type: ignore[arg-type]
        text = row.get("target") or ("4" if kind == "choice" else row["answer"])
        assert _answer(feature) == [*tokenizer(" " + text)["input_ids"], tokenizer.eos_token_id]


def test_a_long_prompt_loses_its_beginning_and_keeps_the_answer_and_bos(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    records = Records("label", [{"text": "late " * 50, "label": "good"}], LABELS.labels, "rows")
    (whole,) = encode(records, bos_tokenizer, TEMPLATE)
    said: list[str] = []
    (cut,) = encode(records, bos_tokenizer, TEMPLATE, max_length=30, say=said.append)
    assert said == ["1 of 1 prompts of rows do not fit into 30 tokens and lose their beginning"]
    encode_classification(records, bos_tokenizer, max_length=30, say=said.append)
    assert said[1:] == ["1 of 1 rows of rows are longer than 30 tokens and lose their end"]
    encode(records, bos_tokenizer, TEMPLATE, say=said.append)
    encode_classification(records, bos_tokenizer, say=said.append)
    assert len(said) == 2
    assert whole["input_ids"][0] == cut["input_ids"][0] == bos_tokenizer.bos_token_id
    assert bos_tokenizer.eos_token_id not in whole["input_ids"][:-1]
    assert _answer(cut) == _answer(whole)
    # There is room for the longest label, which evaluation needs, though the right one here is the shorter.
    longest = len(bos_tokenizer(" very bad indeed", add_special_tokens=False)["input_ids"])
    assert len(cut["input_ids"]) == 30 - 1 - longest + len(_answer(cut))
    assert cut["input_ids"][1:] == whole["input_ids"][1 - len(cut["input_ids"]) :]


def test_an_answer_without_room_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    records = Records("generation", [{"source": "lamp", "target": "late " * 50}], None, "rows")
    with pytest.raises(GatewiseError, match=r"the prompt 'Input: lamp\\nOutput:' .* its answer of \d+ tokens leaves no room in 40"):
        encode(records, tokenizer, None, max_length=40)


def test_of_a_field_that_is_null_nothing_is_written() -> None:
    assert Template("{title}: {text}").render({"title": None, "text": "lamp"}) == ": lamp"


def test_pairs_are_parted_where_the_tokenizer_does_not_do_it(tokenizer: PreTrainedTokenizerFast) -> None:
    """As those of decoders: "The cat sat" + "ting" would read as "The cat" + " satting"."""
    rows = [{"premise": one, "hypothesis": two, "label": "good"} for one, two in (("good lamp", "s"), ("good", " lamps"))]
    first, second = encode_classification(Records("label", rows, ["good"], "rows"), tokenizer)
    assert first["input_ids"] != second["input_ids"]
    assert tokenizer.decode(first["input_ids"]) == "good lamp\ns"
    long = Records("label", [{"premise": "good lamp " * 40, "hypothesis": "bad", "label": "good"}], ["good"], "rows")
    (cut,) = encode_classification(long, tokenizer, max_length=20)
    assert tokenizer.decode(cut["input_ids"]).endswith("\nbad")


@pytest.mark.parametrize("labels", [["good", "good lamp"], ["bad", "good lamp", "good"]])
def test_labels_that_begin_another_one_are_refused(tokenizer: PreTrainedTokenizerFast, labels: list[str]) -> None:
    """Without an end the longer one is never the likelier."""
    records = Records("label", [{"text": "x", "label": "good"}], labels, "rows")
    with pytest.raises(GatewiseError, match=r"the label word ' good' is the beginning of ' good lamp'.* other words for them"):
        encode(records, tokenizer, TEMPLATE)
    with pytest.raises(GatewiseError, match="the beginning of"):
        encode(records, tokenizer, Template(TEMPLATE.prompt, dict.fromkeys(labels, "same")))
    words = Template(TEMPLATE.prompt, {"good": "plain good", "good lamp": "good lamp", "bad": "bad"})
    assert len(encode(records, tokenizer, words)) == 1


def test_collator_pads_right(tokenizer: PreTrainedTokenizerFast) -> None:
    features = encode(LABELS, tokenizer, TEMPLATE)
    batch = PadCollator(tokenizer)(features)
    longest = max(len(feature["input_ids"]) for feature in features)
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(batch, (3, longest))
    for index, feature in enumerate(features):
        length = len(feature["input_ids"])
        assert batch["input_ids"][index].tolist() == feature["input_ids"] + [tokenizer.pad_token_id] * (longest - length)
        assert batch["labels"][index].tolist() == feature["labels"] + [-100] * (longest - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (longest - length)


def test_classification_features_and_pairs(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    features = encode_classification(LABELS, bos_tokenizer, max_length=8)
    assert [feature["labels"] for feature in features] == [0, 1, 0]
    assert max(len(feature["input_ids"]) for feature in features) == 8
    batch = PadCollator(bos_tokenizer)(features)
    assert batch["labels"].tolist() == [0, 1, 0]
    pair = Records("label", [{"premise": "the lamp", "hypothesis": "a lamp", "label": "good"}], ["good"], "rows")
    (feature,) = encode_classification(pair, bos_tokenizer)
    assert bos_tokenizer.decode(feature["input_ids"]) == "<s>the lamp</s>a lamp</s>"
    assert set(feature["token_type_ids"]) == {0, 1}
    assert PadCollator(bos_tokenizer)([feature])["token_type_ids"].tolist() == [feature["token_type_ids"]]
    with pytest.raises(GatewiseError, match="rows holds generation rows"):
        encode_classification(Records("generation", [{"source": "a", "target": "b"}], None, "rows"), bos_tokenizer)


def test_missing_special_tokens_are_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(GatewiseError, match="no padding token"):
        PadCollator(bare)
    with pytest.raises(GatewiseError, match="no end-of-text token"):
        encode(Records("generation", [{"source": "a", "target": "b"}], None, "rows"), bare, None)
