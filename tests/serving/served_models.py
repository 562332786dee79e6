"""A tiny base model and adapters of every kind that can be served, as folders, what each writes alone, and a server of them."""

import json
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from routed_models import routed_config, trained_routers
from tiny_models import VOCABULARY, random_adapter, word_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gatewise import SelectivePromptConfig
from gatewise.adapters.loading import load_adapter
from gatewise.errors import GatewiseError
from gatewise.models import load_model
from gatewise.serving.server.running import AdapterServer

POSITIONS = 96
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w1"


def base_folder(folder: Path, family: str = "llama", **changes: int) -> Path:
    """A base model whose weights are as large as trained ones, so that all of a prompt tells in what it writes."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0, "eos_token_id": 1}
    sizes |= {"max_position_embeddings": POSITIONS, **changes}
    if family == "gemma3":  # a layer that sees eight tokens, and one that sees all
        window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
        model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **window))
    elif family == "gpt2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "eos_token_id": 1}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **small))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name or "wte" in name else 0.4)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def adapter_folder(base: Path, folder: Path, kind: str = "plain", seed: int = 0, **settings: Any) -> Path:
    """An adapter that looks trained: "plain", "routed", "dora" or "prompts"."""
    torch.manual_seed(seed)
    if kind == "routed":
        config: Any = routed_config(**settings)
    elif kind == "prompts":
        config = SelectivePromptConfig(task_type="CAUSAL_LM", num_prompt_tokens=3, prompt_layers=[1], bottleneck=4, **settings)
    else:
        common = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": kind == "dora"}
        config = LoraConfig(**(common | settings))
    model = get_peft_model(load_model(base), config)
    if kind == "prompts":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "norm" not in name:
                    parameter.normal_(std=0.7)
    else:
        random_adapter(model, scale=1.5 if kind == "routed" else 0.7)
        if kind == "routed":
            trained_routers(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@cache
def model_of(base: Path, adapter: Path | None) -> Any:
    """The base model with an adapter alone."""
    return load_model(base) if adapter is None else load_adapter(adapter, base=base)[0]


def writes(base: Path, adapter: Path | None, prompt: list[int], tokens: int, ends: bool = True) -> list[int]:
    """Greedy tokens of ``generate`` with the adapter alone, to the end of the text or, where it never ends, so many."""
    model = model_of(base, adapter)
    more = {} if ends else {"eos_token_id": -1}
    with torch.no_grad():
        row = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)[0]
    return row[len(prompt) :].tolist()


def words(ids: list[int]) -> str:
    """A prompt of these token ids as text."""
    return " ".join(f"w{one - 2}" for one in ids)


def text_of(ids: list[int]) -> str:
    """An answer of these token ids, as it goes on from a prompt."""
    return "".join(f" w{one - 2}" for one in ids if one > 1)


def run(server: AdapterServer) -> None:
    with suppress(GatewiseError):  # its engine was ended by a fault
        server.run()


@contextmanager
def serving(base: Path | str, *adapters: Path | str, **settings: Any) -> Iterator[AdapterServer]:
    """A server that runs in a thread until the block ends; its base model is called "tiny"."""
    given = {"name": "tiny", "port": 0, "device": "cpu", "dtype": "float32", "say": lambda text: None, "settled": 0.1, **settings}
    with AdapterServer(str(base), [str(one) for one in adapters], **given) as server:
        thread = threading.Thread(target=run, args=(server,))
        thread.start()
        try:
            yield server
        finally:
            server.end()
            thread.join(30)
        assert not thread.is_alive()


def ask_quickstart(url: str) -> None:
    """Asks the adapter of the quickstart as the commands of docs/guides/serve.md do: it names the department, and stops."""
    told = (Path(__file__).parents[2] / "docs/guides/serve.md").read_text(encoding="utf-8").replace("\\\n", "")
    curls = [shlex.split(line) for line in told.splitlines() if line.startswith("    curl localhost:8000/v1/") and " -d " in line]
    chat, text = (json.loads(words[words.index("-d") + 1]) for words in curls)
    assert [words[1].rpartition("/v1/")[2] for words in curls] == ["chat/completions", "completions"]
    asked = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    (choice,) = asked.completions.create(**text).choices
    assert (choice.text, choice.finish_reason) == (" delivery", "stop")
    (choice,) = asked.chat.completions.create(**chat).choices
    assert (choice.message.content, choice.finish_reason) == ("delivery", "stop")
    pieces = [one.choices[0] for one in asked.chat.completions.create(**chat, stream=True)]
    assert "".join(one.delta.content or "" for one in pieces) == "delivery"
    assert pieces[-1].finish_reason == "stop"
    for wrong in ({"messages": [{"role": "system", "content": "Be kind."}, *chat["messages"]]}, {"chat_template": "x"}):
        with pytest.raises(openai.BadRequestError):
            asked.chat.completions.create(**{**chat, "extra_body": wrong})


def client(server: AdapterServer, key: str = "none", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries, timeout=60)
