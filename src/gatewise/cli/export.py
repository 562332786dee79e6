"""The ``export`` command: an adapter of any kind as plain LoRA, at its true ranks."""

from pathlib import Path
from typing import Annotated

import typer

from gatewise.adapters.data_options import DataOptions
from gatewise.cli.options import ColumnsOption, LabelsOption, LimitOption, PromptOption, SplitOption, at_hand
from gatewise.errors import GatewiseError
from gatewise.flags import BaseOption, DeviceOption


def export(
    adapter: Annotated[
        Path,
        typer.Argument(help="The folder of an adapter or checkpoint, or an id on the hub.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write, new or empty.", show_default=False)],
    padded: Annotated[
        bool, typer.Option("--padded", help="One rank for all modules, for engines that ignore rank patterns.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            help="One rank: differences are cut to it, others padded, modules without ranks zeros (to swap and merge adapters).",
            min=1,
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Keep this share of the energy of each module's difference, such as 0.9999. [default: at most 64 ranks]"),
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="With --no-plain only dead ranks go: DoRA, biases and whole modules stay, for PEFT alone.")
    ] = True,
    data: Annotated[
        str | None,
        typer.Option(help="Rows to compare logits and loss on: a .jsonl, .json, .csv, .parquet file, sample:NAME, or a data set."),
    ] = None,
    base: BaseOption = None,
    split: SplitOption = None,
    prompt: PromptOption = None,
    labels: LabelsOption = None,
    columns: ColumnsOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Write an adapter of any kind as plain LoRA, which vLLM, SGLang and llama.cpp load.

    LoRA and AdaLoRA are written as they are. For other kinds (DoRA, LoHa, OFT, PiSSA, whole modules, trained tokens ...) the base
    model is loaded, and the difference of its weights becomes LoRA by singular values. What is lost is told; --data measures it.

    What changes few ranks is exact (LoHa, PiSSA, trained tokens). Of an adapter on a quantised base the difference is to the
    weights in the base's files. Refused is what depends on the text, and what changes layer norms or biases.

    \b
    Examples:
      gatewise export runs/quickstart/adapter for-serving --padded
      gatewise export runs/dora-support/adapter plain --rank 32 --data sample:support-dev
    """
    from gatewise.adapters.difference import compare
    from gatewise.adapters.export import EXPORT_FILE, to_lora
    from gatewise.adapters.loading import read_data
    from gatewise.inspection.card import carry_card

    options = DataOptions(base, split, prompt, labels, limit, device, columns)
    if data is None and (split or prompt or labels or columns or limit):
        raise GatewiseError("how to read data was given without --data: add it, or leave the rest out")
    adapter = at_hand(adapter)
    if data is not None:  # refused before anything is written
        read_data(adapter, data, options)
    to_lora(
        adapter, out, padded=padded, rank=rank, plain=plain, keep=keep, base=base, device=device,
        say=lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    typer.echo(f"written: {out}")
    told = "`gatewise export` wrote it as plain LoRA" if plain else "`gatewise export` wrote it at its true ranks"
    if (out / EXPORT_FILE).is_file():
        told += f"; what was lost of each module's difference is in `{EXPORT_FILE}`"
    if data is not None:
        found = compare(adapter, out, data, options)
        lost = f"largest difference of a logit: {found.logits:.2g}; loss {found.before:.4f} before, {found.after:.4f} after"
        typer.echo(lost)
        told += f". On some rows, {lost}"
    carry_card(adapter, out, "Exported", f"{told}.")
