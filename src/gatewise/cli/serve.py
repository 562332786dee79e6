"""The ``serve`` command: one base model and many adapters behind OpenAI's API."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.errors import GatewiseError
from gatewise.flags import DeviceOption

if TYPE_CHECKING:
    from gatewise.serving.server.running import AdapterServer
    from gatewise.serving.server.with_vllm import VllmServer

ENGINES = ("auto", "transformers", "vllm")


def serve(
    base: Annotated[str, typer.Argument(help="The base model: a hub id, a folder or an embedded model.", show_default=False)],
    vllm: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM-ARGUMENT...]", help="More arguments, for vLLM's own server.", show_default=False),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="An adapter, a folder of adapters, a pattern such as 'runs/*/adapter', or NAME=FOLDER; repeatable.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="transformers, vllm, or auto: vllm where --python or this Python has it.")] = "auto",
    python: Annotated[
        Path | None, typer.Option(help="The Python of an environment that has vLLM. [default: this one]", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve at: 0.0.0.0 for all, which needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="GATEWISE_API_KEY",
            help="What clients have to send. Better in the variable: others see arguments.",
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the base model. [default: BASE]", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="Of the base model: auto, float32 or bfloat16.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer. [default: the model's positions]", min=2, show_default=False)
    ] = None,
    max_loaded: Annotated[int, typer.Option(help="Adapters that are loaded at a time.", min=1)] = 32,
    max_running: Annotated[int, typer.Option(help="Answers that are written at a time.", min=1)] = 32,
    max_waiting: Annotated[
        int | None,
        typer.Option(help="Answers that may wait; more are refused with status 503. [default: 256]", min=1, show_default=False),
    ] = None,
    trees: Annotated[
        bool,
        typer.Option(
            "--trees",
            help="Have vLLM keep to decision trees where `gatewise mdt extract --server` asks; needs gatewise beside it.",
        ),
    ] = False,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the folders.", min=0.1)] = 2.0,
) -> None:
    """Serve a base model and its adapters to OpenAI's clients, each by the name of its folder.

    Adapters may be of different kinds, are loaded when somebody asks for them, and come and go with their folders. Ctrl-C ends.

    \b
    Examples:
      gatewise serve smollm2-135m-instruct --adapters 'runs/*/adapter'
      gatewise serve smollm2-135m-instruct --adapters adapters --python .venv-serve/bin/python -- --gpu-memory-utilization 0.8
    """
    if engine not in ENGINES:
        raise GatewiseError(f"--engine is {engine!r}: expected {', '.join(ENGINES)}")
    if engine == "auto":
        engine = "vllm" if python is not None or vllm or find_spec("vllm") is not None else "transformers"
    settings: dict[str, Any] = {
        "name": served_model_name, "host": host, "port": port, "key": api_key, "dtype": dtype, "most_tokens": max_model_len,
        "most_loaded": max_loaded, "most_running": max_running, "every": poll, "say": _say,
    }  # fmt: skip
    try:
        if engine == "vllm":
            if device != "auto":
                raise GatewiseError(
                    f"--device is {device!r}, but vLLM chooses its own: leave it out, or take --engine transformers"
                )
            if max_waiting is not None:
                raise GatewiseError(
                    f"--max-waiting is {max_waiting}, but vLLM lets any number wait: leave it out, or take --engine transformers"
                )
            from gatewise.serving.server.with_vllm import VllmServer

        else:
            for name, given in (("--python", python), ("vLLM's own arguments", vllm)):
                if given:
                    raise GatewiseError(f"{name} goes with --engine vllm: leave it out")
            from gatewise.serving.server.running import AdapterServer
    except ModuleNotFoundError as error:
        raise GatewiseError(
            f"serve needs {(error.name or '').partition('.')[0]}, which is not installed: pip install 'gatewise[server]'"
        ) from error
    if engine == "vllm":
        in_vllm = VllmServer(base, adapters or (), python=python or sys.executable, rest=vllm or (), trees=trees, **settings)
        try:
            in_vllm.run(ready=lambda: _ready(in_vllm))
        except KeyboardInterrupt:
            _say("serving ended")
        return
    limits = _limits(trees)
    with AdapterServer(base, adapters or (), device=device, most_waiting=max_waiting or 256, limits=limits, **settings) as server:
        _ready(server)
        try:
            server.run()
        except KeyboardInterrupt:
            _say("serving ended")


def _limits(trees: bool) -> dict[str, Any]:
    """What requests may ask to be kept to: trees, where gatewise_mdt and llguidance are installed, which ``trees`` insists on."""
    try:
        from gatewise_mdt.extraction.constraint import TreeScores, check_available
        from gatewise_mdt.extraction.course import ARGUMENT

        check_available()
    except (ImportError, GatewiseError) as error:
        if trees:
            missing = getattr(error, "name", None) or "llguidance"
            raise GatewiseError(
                f"--trees needs {missing}, which is not installed: pip install gatewise-mdt, or leave it out"
            ) from error
        return {}
    return {ARGUMENT: TreeScores}


def _ready(server: "AdapterServer | VllmServer") -> None:
    names = [server.name, *server.names]
    _say(f"models: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}")
    typer.echo(f"serving: {server.url}/v1")
    sys.stdout.flush()


def _say(text: str) -> None:
    typer.echo(text, err=True)
