"""The ``serving-check`` command: do adapters give in vLLM what they give in PEFT?"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gatewise.adapters.data_options import DataOptions
from gatewise.cli.options import ColumnsOption, LabelsOption, PromptOption, SplitOption, at_hand
from gatewise.files import finite
from gatewise.flags import BaseOption, DeviceOption, JsonOption

if TYPE_CHECKING:
    from gatewise.serving.checking import Checked, Match


def serving_check(
    adapters: Annotated[
        list[Path], typer.Argument(help="The folders of LoRA adapters of one base, routed or not.", show_default=False)
    ],
    data: Annotated[str, typer.Option(help="Rows to take prompts from: a file, sample:NAME or a data set.", show_default=False)],
    base: BaseOption = None,
    split: SplitOption = None,
    prompt: PromptOption = None,
    labels: LabelsOption = None,
    columns: ColumnsOption = None,
    device: DeviceOption = "auto",
    python: Annotated[
        Path | None, typer.Option(help="The Python of an environment that has vLLM. [default: this one]", show_default=False)
    ] = None,
    prompts: Annotated[int, typer.Option(help="The first rows that are answered.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens written after each prompt.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="Of the base model on both sides: float32 or bfloat16.")] = "float32",
    tolerance: Annotated[
        float, typer.Option(help="How far log-probabilities may differ, in nats, where rounding alone does less.", min=0.0)
    ] = 1e-3,
    as_json: JsonOption = False,
) -> None:
    """Start vLLM as `gatewise serve` does, and compare its greedy answers with PEFT's.

    vLLM leaves out the LoRA of modules that it is not told of, or that it calls by another name, and says nothing. Exit code 1 says
    that an answer differs, or that the prompts could not have shown it. Bfloat16 needs a tolerance such as 0.2, and then modules
    that change no answer by more may be missing: check in float32 where memory allows.

    \b
    Examples:
      gatewise serving-check small --data dev.jsonl --python .venv-serve/bin/python
      gatewise serving-check runs/one/adapter runs/two/adapter --data dev.jsonl
    """
    from gatewise.serving.checking import check_in_vllm

    options = DataOptions(base, split, prompt, labels, device=device, columns=columns)
    found = check_in_vllm(
        [at_hand(one) for one in adapters], data, options=options, python=python or sys.executable, prompts=prompts, tokens=tokens,
        dtype=dtype, tolerance=tolerance, say=lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps([finite({**asdict(one), "adapter": str(one.adapter), "holds": one.holds}) for one in found]))
    else:
        for one in found:
            typer.echo(line_of(one))
    if not all(one.holds for one in found):
        raise typer.Exit(1)


def line_of(one: "Checked") -> str:
    """An adapter's answers in a line, and why it does not hold if it does not."""
    name = f"{one.adapter.parent.name}/{one.adapter.name}"  # runs call all their adapters "adapter"
    line = f"{name}: vLLM {one.vllm} chose {_shown(one.unmerged)} as in PEFT; without the adapter {_shown(one.without)}"
    if one.holds:
        return line
    if one.without.holds:
        return f"{line}. CANNOT TELL: the adapter changes little that these prompts show, give others"
    return f"{line}. DIFFERS: vLLM calls some modules by other names than it is told, or the adapter is not what it serves"


def _shown(match: "Match") -> str:
    return f"{match.same} of {match.compared} tokens (log-probabilities within {match.difference:.1g})"
