"""The constraint of trees in `gatewise serve`: the same trees as in one process, by plain and routed adapters in one server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gatewise_mdt import Extraction, Extractor, sample
from gatewise_mdt.extraction.served import ServedExtractor
from mdt_models import random_model
from served_models import adapter_folder, client, serving

from gatewise.adapters.loading import load_adapter
from gatewise.serving.constraints import find_constraints
from gatewise.serving.server.running import AdapterServer

pytest.importorskip("llguidance")
pytest.importorskip("openai")

TEXTS = [record.text for record in sample()[:3]]
MOST = 120
NAMES = ("plain", "routed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    model, tokenizer = random_model(3)
    model.generation_config.eos_token_id = model.config.eos_token_id = int(tokenizer.eos_token_id)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for number, name in enumerate(NAMES):
        adapter_folder(root / "base", root / "adapters" / name, kind=name, seed=number)
    return root / "base"


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[AdapterServer]:
    with serving(base, base.parent / "adapters", constraints=find_constraints()) as made:
        yield made


def test_the_same_trees_as_in_one_process(base: Path, server: AdapterServer) -> None:
    found, settings = [], {"verbatim": True, "max_new_tokens": MOST}
    for name in NAMES:
        model, tokenizer, *_ = load_adapter(base.parent / "adapters" / name, base=str(base), dtype=torch.float32)
        alone = Extractor(model, tokenizer, **settings)(TEXTS)
        through = ServedExtractor.connect(server.url, name, **settings)(TEXTS * 2)
        for one, other in zip(through, [*alone, *alone], strict=True):
            if isinstance(one, Extraction) and isinstance(other, Extraction):
                assert (one.tree, one.written) == (other.tree, other.written)
            else:
                assert str(one) == str(other)
        found.append([str(one) if not isinstance(one, Extraction) else one.written for one in through])
    assert found[0] != found[1]


def test_what_cannot_be_kept_to_is_refused(server: AdapterServer) -> None:
    import openai

    ask = client(server).completions.create
    for extra, expected in (
        ({"gatewise_tree": '{"language": "fr"}'}, "none of gatewise's .expected language, en or zh"),
        ({"gatewise_poem": "a"}, "vllm_xargs has gatewise_poem: this server serves one of gatewise_tree"),
        (["gatewise_tree"], "vllm_xargs: Input should be a valid dictionary"),
    ):
        with pytest.raises(openai.BadRequestError, match=expected):
            ask(model="plain", prompt="a", max_tokens=5, extra_body={"vllm_xargs": extra})
    assert ask(model="plain", prompt="a", max_tokens=5).choices[0].finish_reason in ("stop", "length")


def test_a_fault_of_a_limit_ends_its_answer_alone(server: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai
    from gatewise_mdt.extraction.constraint import TreeScores

    def broken(*_: Any) -> Any:
        raise ValueError("broken")

    body = {"vllm_xargs": {"gatewise_tree": '{"language": "en"}'}}
    with monkeypatch.context() as patch:
        patch.setattr(TreeScores, "__call__", broken)
        with pytest.raises(openai.InternalServerError):
            client(server).completions.create(model="plain", prompt="a", max_tokens=5, extra_body=body)
    assert client(server).completions.create(model="plain", prompt="a", max_tokens=5)
    assert server.engine.is_alive
