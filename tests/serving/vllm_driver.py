"""Runs in a Python that has vLLM: ``python vllm_driver.py REQUEST.json ANSWER.json``; what test_vllm_routed.py wants to see there.

The request has ``arguments`` of vLLM's command line and ``steps``, each with what to ``do``: see the functions below. The answer
has what each of them returned, or ``{"error": ...}``. With ``ahead`` a step is scheduled before the last one has ended, which vLLM
does on GPUs and not on processors.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Engine:
    def __init__(self, arguments: list[str]) -> None:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        self.llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(arguments)))
        self.numbers: dict[str, int] = {}

    def adapter(self, folder: str | None, name: str | None = None) -> Any:
        from vllm.lora.request import LoRARequest

        if folder is None:
            return None
        number = self.numbers.setdefault(name or folder, len(self.numbers) + 1)
        return LoRARequest(name or folder, number, folder)

    def answer(self, rows: list[dict[str, Any]], tokens: int, n: int = 1, stop: Sequence[int] = ()) -> list[list[dict[str, Any]]]:
        """For each row (prompt, adapter, maybe name) its greedy answer, or n that are sampled, with log-probabilities."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": row["prompt"]} for row in rows],
            SamplingParams(
                n=n,
                max_tokens=tokens,
                ignore_eos=True,
                stop_token_ids=stop,
                logprobs=0,
                detokenize=False,
                seed=1,
                temperature=n - 1,
            ),
            lora_request=[self.adapter(row["adapter"], row.get("name")) for row in rows],
            use_tqdm=False,
        )
        return [
            [
                {
                    "tokens": list(one.token_ids),
                    "logprobs": [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)],
                }
                for one in output.outputs
            ]
            for output in outputs
        ]

    def prompt_logprobs(self, prompt: list[int], adapter: str | None) -> list[float]:
        """Of a prompt's own tokens, from its second one on."""
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = self.llm.generate([{"prompt_token_ids": prompt}], asked, lora_request=self.adapter(adapter), use_tqdm=False)
        return [at[token].logprob for token, at in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]

    def runner(self) -> str:
        """Which of vLLM's model runners this is, and whether steps are scheduled ahead."""
        config = self.llm.llm_engine.vllm_config
        ahead = " ahead" if config.scheduler_config.async_scheduling else ""
        return f"V{2 if config.use_v2_model_runner else 1}{ahead}"

    def preemptions(self) -> int:
        return int(next(one.value for one in self.llm.get_metrics() if one.name == "vllm:num_preemptions"))

    def cached(self) -> int:
        return int(next(one.value for one in self.llm.get_metrics() if one.name == "vllm:prefix_cache_hits"))

    def requests_with_gates(self) -> list[str]:
        """Only without a process for the engine (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        return sorted(worker.model_runner.lora_manager._adapter_manager.gatewise_routing.requests)

    def replace(self, folder: str, by: str | None) -> None:
        """Puts other files into a folder, or removes it."""
        shutil.rmtree(folder, ignore_errors=True)
        if by is not None:
            shutil.copytree(by, folder)

    def load(self, folder: str) -> None:
        """As vLLM's server does before it serves an adapter."""
        self.llm.llm_engine.add_lora(self.adapter(folder))

    def unload(self, folder: str, name: str | None = None) -> bool:
        lora = self.adapter(folder, name)
        return bool(self.llm.llm_engine.remove_lora(lora.lora_int_id))

    def abort(self, prompt: list[int], adapter: str) -> int:
        """Stops a request after three steps, and goes on until nothing is left."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        name = engine.add_request(
            "stopped",
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False),
            lora_request=self.adapter(adapter),
        )
        for _ in range(3):
            engine.step()
        before = len(self.requests_with_gates())
        engine.abort_request([name], internal=True)
        return before

    def beam_search(self, prompt: list[int], adapter: str) -> None:
        from vllm.sampling_params import BeamSearchParams

        self.llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=2, max_tokens=2), self.adapter(adapter))


def schedule_ahead() -> None:
    from vllm.platforms import current_platform

    made = type(current_platform).check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        made(cls, config)
        config.scheduler_config.async_scheduling = True

    type(current_platform).check_and_update_config = classmethod(check_and_update_config)


def main(request: dict[str, Any]) -> list[Any]:
    answers: list[Any] = []
    if request.get("version"):
        import vllm

        vllm.__version__ = request["version"]
    if request.get("ahead"):
        schedule_ahead()
    try:
        engine = Engine(request["arguments"])
    except Exception as error:
        return [{"error": str(error)}]
    for step in request["steps"]:
        try:
            answers.append(getattr(engine, step.pop("do"))(**step))
        except Exception as error:
            answers.append({"error": str(error), "kind": type(error).__name__})
    return answers


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), encoding="utf-8")
