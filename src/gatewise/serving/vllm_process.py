"""Answers prompts in vLLM, in a process of its own. It imports nothing but vLLM, so that it runs where gatewise is not installed.

    python vllm_process.py REQUEST.json ANSWER.json

It leads a group of processes, and kills it when its standard input ends: whoever started it is gone then, however that came.

The request has ``arguments``, those of vLLM's command line; ``tokens``, how many to write after each prompt; and ``batches``,
lists of rows with ``prompt``, token ids, and ``adapter``, a folder or null. The answer has the ``version`` of vLLM, and for each of
the ``batches`` its ``rows``, with the ``tokens`` chosen greedily and their ``logprobs``, and the ``seconds`` of processor time that
all of vLLM's processes took.
"""

import json
import os
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NO_VLLM = 3
"""The exit code of a Python that has no vLLM."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without it vLLM takes half of a machine without GPU
    import psutil
    from vllm import LLM, SamplingParams, __version__
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(request["arguments"])))
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, logprobs=0, detokenize=False)
    folders = sorted({row["adapter"] for rows in request["batches"] for row in rows if row["adapter"]})
    adapters = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, 1)}

    def processor_seconds() -> float:
        here = psutil.Process()
        times = [one.cpu_times() for one in (here, *here.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    batches = []
    for rows in request["batches"]:
        before = processor_seconds()
        outputs = engine.generate(
            [{"prompt_token_ids": row["prompt"]} for row in rows],
            sampling,
            lora_request=[adapters.get(row["adapter"]) for row in rows] if folders else None,
            use_tqdm=False,
        )
        seconds = processor_seconds() - before
        answers = []
        for output in outputs:
            tokens, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
            answers.append({"tokens": tokens, "logprobs": [at[one].logprob for one, at in zip(tokens, logprobs, strict=True)]})
        batches.append({"rows": answers, "seconds": seconds})
    return {"version": __version__, "batches": batches}


def die_with_input() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a forked process would inherit
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if find_spec("vllm") is None:
        sys.exit(NO_VLLM)
    threading.Thread(target=die_with_input, daemon=True).start()
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), encoding="utf-8")
