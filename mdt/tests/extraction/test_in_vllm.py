"""The constraint of trees in the real vLLM's server: `make test-serve`, which makes an environment for it."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gatewise_mdt import Extraction, Extractor, sample
from gatewise_mdt.extraction.course import ARGUMENT
from gatewise_mdt.extraction.served import ServedExtractor
from tiny_run import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

PYTHON = os.environ.get("GATEWISE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="GATEWISE_VLLM_PYTHON names no Python that has vLLM: run `make test-serve`")

TEXTS = [record.text for record in sample()[:4]] + ["成人患者@轻度脱水可以口服生理盐水；否则静脉注射。"]
POSITIONS = 1024
MOST = 150
# vLLM's attention needs heads of 32 numbers and more.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that does not write one letter for ever."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), byte_tokenizer()
    torch.manual_seed(3)
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": int(tokenizer.eos_token_id)}
    sizes = {**SIZES, "head_dim": 32, "max_position_embeddings": POSITIONS, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, **ends, initializer_range=0.8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [sys.executable, "-m", "gatewise", "serve", str(base), "--python", str(PYTHON), "--port", "0"]
    command += ["--constraint", "gatewise_tree"]
    command += ["--served-model-name", "trees", "--dtype", "float32", "--max-model-len", str(POSITIONS), "--max-running", "8"]
    # So little room that requests are set aside and read again.
    command += ["--", "--enforce-eager", "--num-gpu-blocks-override", "9"]
    log = tmp_path_factory.mktemp("log") / "vllm.txt"
    with log.open("w") as out:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True, env=environment)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("serving: "), log.read_text()[-3000:]
            yield line.split()[1].removesuffix("/v1")
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


@pytest.mark.parametrize(
    "settings",
    [{}, {"verbatim": True}],
    ids=lambda settings: "-".join(settings) or "constrained",
)
def test_the_same_trees_as_in_one_process(base: Path, url: str, settings: dict[str, Any]) -> None:
    model = LlamaForCausalLM.from_pretrained(base).eval()
    alone = Extractor(model, byte_tokenizer(), max_new_tokens=MOST, **settings)(TEXTS)
    through = ServedExtractor.connect(url, "trees", max_new_tokens=MOST, batch_size=8, **settings)(TEXTS * 4)
    for number, one in enumerate(through):
        other = alone[number % len(TEXTS)]
        if isinstance(other, Extraction):
            assert isinstance(one, Extraction)
            assert (one.tree, one.written) == (other.tree, other.written)
        else:
            assert str(one) == str(other)


def test_requests_were_set_aside_meanwhile(url: str) -> None:
    """Or the tests above would not say that what was written before is read again."""
    ServedExtractor.connect(url, "trees", max_new_tokens=MOST, batch_size=8)(TEXTS * 4)
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    assert sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_preemptions_total")) > 0


def test_a_course_that_cannot_be_read_is_refused(url: str) -> None:
    asked = {"model": "trees", "prompt": "a", "max_tokens": 4, "vllm_xargs": {ARGUMENT: "{}"}}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert "none of gatewise's (" in refused.value.read().decode()


def test_a_tokenizer_that_cannot_be_read_is_told_at_the_start() -> None:
    """With the first request it would end the engine."""
    code = """
from types import SimpleNamespace
from gatewise.errors import GatewiseError
from gatewise_mdt.extraction import in_vllm
in_vllm.cached_tokenizer_from_config = lambda model: type("Tokenizer", (), {"eos_token_id": 1})()
nothing = SimpleNamespace(max_num_seqs=1, get_vocab_size=lambda: 9)
config = SimpleNamespace(model_config=nothing, scheduler_config=nothing)
try:
    in_vllm.TreeLogits(config, "cpu", False)
except GatewiseError as error:
    print(error)
"""
    found = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "is none of the tokenizers library" in found.stdout
