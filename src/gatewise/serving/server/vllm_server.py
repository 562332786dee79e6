"""vLLM's own server for OpenAI's API, whose adapters come and go as another process says. It imports nothing but vLLM.

    python vllm_server.py ARGUMENT...

The arguments are those of ``vllm serve``. Standard input has a JSON object a line: {"name": ..., "path": ...} has the adapter of a
folder served by a name, which answers that are being written go on without; {"name": ...} ends that. No client can do either. Under
"chat" may be a ``ChatTemplate`` of gatewise's, which writes the chats with this adapter; vLLM has one template for all, and leaves
answers as they are. The process
leads a group of processes, and kills it when its standard input ends: whoever started it is gone then, however that came.

Read in vLLM 0.32: ``OpenAIServingModels``, ``LoRARequest``, ``OnlineRenderer.preprocess_chat``, ``OpenAIServingChat``,
``OutputProcessor.request_states`` and ``init_app_state`` in the launcher of its server.
"""

import asyncio
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

GUARD = "gatewise_guard"
"""What guard.py is called in this process."""
STATE = "\u2063"
"""Stands between an adapter's name and a number in what vLLM calls it. No name has it, since it cannot be printed."""

UNUSED = 60.0
"""Seconds without a request after which nothing more is written with an adapter that is gone. A request may be on its way to the
engine, and one of a client may be several there, one after the other (beam search)."""


def client_name(name: str) -> str:
    """What clients call an adapter, whichever of its states vLLM's ``name`` is of."""
    return name.partition(STATE)[0]


async def events_without(before: str, events: AsyncGenerator[str, None], answers: int) -> AsyncGenerator[str, None]:
    """The events of a chat's stream, each answer without what it begins with, if that is ``before``."""
    begun: set[int] = set()
    async with aclosing(events):
        async for event in events:
            if len(begun) < answers and event.startswith("data: {"):
                told = json.loads(event.removeprefix("data: "))
                for one in told.get("choices", ()):  # an error has none
                    if (text := one["delta"].get("content")) and one["index"] not in begun:
                        begun.add(one["index"])
                        one["delta"]["content"] = text.removeprefix(before)
                event = f"data: {json.dumps(told)}\n\n"
            yield event


class Adapters:
    """Loads and removes adapters in the order in which standard input names them, once the server runs.

    Each state of an adapter has a name of its own, which only vLLM's metrics show: vLLM takes adapters of one name for one
    (``LoRARequest.__eq__``), and ended where a batch had two of its states.
    """

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._chats: dict[str, dict[str, Any] | None] = {}
        self._gone: dict[str, tuple[int, float]] = {}  # adapters that no new request finds: vLLM's number, and when it had one last
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Reads standard input to its end, and then ends all."""
        held = b""
        while piece := os.read(0, 65536):  # not sys.stdin, whose lock a forked process would inherit
            *lines, held = (held + piece).split(b"\n")
            self._lines.extend(lines)
        os.killpg(0, signal.SIGKILL)

    async def begin(self, models: Any, renderer: Any) -> None:
        """Loads the adapters that were named so far, before the first request, and follows standard input from then on."""
        name_of, list_all, write_chat = models.model_name, models.show_available_models, renderer.preprocess_chat

        async def show_available_models() -> Any:
            found = await list_all()
            for card in found.data:
                card.id = client_name(card.id)
            return found

        async def preprocess_chat(request: Any, *given: Any, **more: Any) -> Any:
            """Of every address that takes messages, after templates that clients bring along were refused."""
            name: Any = getattr(request, "model", None)  # its requests for decisions have none
            while True:
                asked, chat = models.lora_requests.get(name), self._chats.get(name)
                if chat is not None:
                    more["default_template"] = chat["text"]
                    if "add_special_tokens" in type(request).model_fields:  # else vLLM adds them
                        request.add_special_tokens = chat["special_tokens"]
                written = await write_chat(request, *given, **more)
                # A chat's adapter is looked up next: it has to be the one whose template this was. /v1/responses had it before.
                if models.lora_requests.get(name) is asked or not hasattr(request, "messages"):
                    return written

        renderer.preprocess_chat = preprocess_chat
        models.model_name = lambda *given, **more: client_name(name_of(*given, **more))
        models.show_available_models = show_available_models
        while self._lines:
            await self._read(models)
        self._task = asyncio.create_task(self._follow(models))

    def answer(self, serving: Any) -> None:
        """Has the answers to chats begin as the adapter's template says."""
        create = serving.create_chat_completion

        async def create_chat_completion(request: Any, *given: Any, **more: Any) -> Any:
            before = (self._chats.get(request.model) or {}).get("before_answer")
            made = await create(request, *given, **more)
            if before and hasattr(made, "choices"):  # an error has none
                for one in made.choices:
                    one.message.content = one.message.content and one.message.content.removeprefix(before)
            return events_without(before, made, request.n or 1) if before and hasattr(made, "__aiter__") else made

        serving.create_chat_completion = create_chat_completion

    async def _follow(self, models: Any) -> None:
        while True:
            if self._lines:
                await self._read(models)
            else:
                await asyncio.sleep(0.1)
            await self._let_go(models.engine_client)

    async def _read(self, models: Any) -> None:
        """The next line."""
        one = json.loads(self._lines.popleft())
        await self._change(models, one["name"], one.get("path"), one.get("chat"))

    async def _change(self, models: Any, name: str, path: str | None, chat: dict[str, Any] | None) -> None:
        from vllm.lora.request import LoRARequest

        before, made = models.lora_requests.get(name), None
        if path is not None:
            # A number of its own, so that requests that run go on with the adapter that they began with.
            number = models.lora_id_counter.inc(1)
            made = LoRARequest(lora_name=f"{name}{STATE}({number})", lora_int_id=number, lora_path=path)
            try:
                await models.engine_client.add_lora(made)
            except Exception as error:
                print(f"error: vLLM does not load the adapter {name!r}: {error}", file=sys.stderr, flush=True)
                self._gone[made.lora_name] = number, time.monotonic()  # some of it may be loaded
                made = None
        if made is not None:
            models.lora_requests[name], self._chats[name] = made, chat
        else:
            models.lora_requests.pop(name, None)
            self._chats.pop(name, None)
        if before is not None:
            self._gone[before.lora_name] = before.lora_int_id, time.monotonic()

    async def _let_go(self, engine: Any) -> None:
        """Has vLLM forget adapters with which nothing is written any more: gatewise in it keeps their files open (held.py)."""
        if not self._gone:
            return
        now, writing = time.monotonic(), {request.lora_name for request in engine.output_processor.request_states.values()}
        self._gone |= {name: (number, now) for name, (number, _) in self._gone.items() if name in writing}
        due = [name for name, (_, used) in self._gone.items() if used + UNUSED <= now]
        numbers = [self._gone.pop(name)[0] for name in due]
        for error in await asyncio.gather(*map(engine.remove_lora, numbers), return_exceptions=True):
            if isinstance(error, Exception):
                print(f"error: vLLM does not let go of an adapter: {error}", file=sys.stderr, flush=True)


def run(adapters: Adapters) -> None:
    """Runs vLLM's server with these adapters."""
    threading.Thread(target=adapters.listen, daemon=True).start()
    from vllm.entrypoints.launchers.api_server import entry

    init = entry.init_app_state

    async def init_app_state(engine: Any, state: Any, *given: Any, **more: Any) -> None:
        await init(engine, state, *given, **more)
        await adapters.begin(state.openai_serving_models, state.online_renderer)
        if state.openai_serving_chat is not None:
            adapters.answer(state.openai_serving_chat)

    entry.init_app_state = init_app_state
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import guard

    sys.modules[GUARD] = guard
    sys.path.pop(0)  # this folder, whose files would stand before libraries of their names
    run(Adapters())
