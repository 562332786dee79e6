"""The ``serve`` command: one base model and many adapters behind OpenAI's API."""

import gc
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.cli.options import at_hand
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
            help="An adapter, a folder of adapters, a pattern ('runs/*/adapter'), an id on the hub, or NAME=ADAPTER; repeatable.",
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
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="GATEWISE_API_KEY",
            help="What clients have to send; repeatable. Better in the variable, blanks between: others see arguments.",
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
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What answers can be kept to, by its name in an installed package; repeatable. [default: all; with vLLM none]",
            show_default=False,
        ),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line on stderr for each request: who answered, how much, how long.")
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
    if vllm and not vllm[0].startswith("-"):
        raise GatewiseError(f"{vllm[0]} belongs to no option: quote a pattern of --adapters, or repeat --adapters for each place")
    if engine == "auto":
        engine = "vllm" if python is not None or vllm or find_spec("vllm") is not None else "transformers"
    ignored = {"--device": device != "auto", "--max-waiting": max_waiting is not None}
    if engine == "transformers":
        ignored = {"--python": python is not None, "vLLM's own arguments": bool(vllm)}
    for name, is_given in ignored.items():
        if is_given:
            raise GatewiseError(f"{name} does not go with --engine {engine}: leave it out, or take the other engine")
    if not api_key and "GATEWISE_API_KEY" in os.environ:
        raise GatewiseError("GATEWISE_API_KEY is there, but empty: put a key in it, or unset it to serve without one")
    settings: dict[str, Any] = {
        "name": served_model_name, "host": host, "port": port, "keys": api_key or (), "dtype": dtype, "most_tokens": max_model_len,
        "most_loaded": max_loaded, "most_running": max_running, "every": poll, "log_requests": log_requests, "say": _say,
    }  # fmt: skip
    # As an interrupt: answers end in order, nothing of vLLM is left behind, and what stopped the server sees that it did as told.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from gatewise.serving.constraints import find_constraints

        places = [_at_hand(place) for place in adapters or ()]
        if engine == "vllm":
            from gatewise.serving.server.with_vllm import VllmServer

            kept_to = find_constraints(constraint or ())
            in_vllm = VllmServer(base, places, python=python or sys.executable, rest=vllm or (), constraints=kept_to, **settings)
            in_vllm.run(ready=lambda: _ready(in_vllm))
        else:
            from gatewise.serving.server.running import AdapterServer

            settings |= {"device": device, "most_waiting": max_waiting or 256, "constraints": find_constraints(constraint)}
            with AdapterServer(base, places, **settings) as server:
                _ready(server)
                # Or Python's collector looks at all objects of the libraries again while a body of many lists is read: for seconds.
                gc.freeze()
                server.run()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise GatewiseError(f"serve needs {missing}, which is not installed: pip install 'gatewise[server]'") from error
    except KeyboardInterrupt:
        _say("serving ended")


def _at_hand(place: str) -> str:
    """A place of adapters; of an id on the hub the folder that was fetched, with the name that clients call it by."""
    from gatewise.serving.server.catalogue import split_place

    name, path = split_place(place)
    folder = at_hand(Path(path))
    return place if folder == Path(path) else f"{name or path.rpartition('/')[2]}={folder}"


def _ready(server: "AdapterServer | VllmServer") -> None:
    names = [server.name, *server.names]
    _say(f"models: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}")
    typer.echo(f"serving: {server.url}/v1")
    sys.stdout.flush()


def _say(text: str) -> None:
    typer.echo(text, err=True)
