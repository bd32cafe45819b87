"""Stand-ins at the seams, so that nearly everything is tested without a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

from server.core import FinishReason, GenerationRequest, Tiles, TokenEvent, TokenLogprobs
from server.engine.client import EngineFacts, EngineStats, EngineStatus, QueueStats, TokenStream
from server.errors import ServerError

FAKE_FACTS = EngineFacts(
    logits_width=512,
    embedding_rows=512,
    max_request_tokens=4096,
    kv_tokens=4096,
    kv_bytes=1 << 20,
    block_size=64,
    device="cpu",
    dtype="float32",
    attention="fake",
    slowest_step_s=0.1,
    load_s=0.0,
)


class FakeEngine:
    """An engine that answers every request from a script.

    `tokens` are the ids of each choice, or a function that makes them from the request and the
    number of the choice; all choices go on together. The last of each carries `finish_reason`; one
    longer than the request's `max_tokens` is cut there and ends with "length". With `error_code`
    the answer ends, after its tokens, in an error event.
    `refuse` is raised by `submit`, `refuse_early` by `check_room`. With a `gate`, each event waits
    for one `gate.release()`.

    Where log-probabilities are asked for, each id has one of its own, and as many ids before it
    are told as likelier.

    `submitted` and `aborted` record what reached it, and `aborted_choices` the single choices that
    did not go on; `running` are the ids not yet ended.
    """

    def __init__(
        self,
        tokens: Sequence[int] | Callable[[GenerationRequest, int], Sequence[int]] = (),
        *,
        finish_reason: FinishReason = "stop",
        error_code: str | None = None,
        refuse: ServerError | None = None,
        status: EngineStatus = "ready",
        facts: EngineFacts | None = FAKE_FACTS,
        gate: asyncio.Semaphore | None = None,
    ) -> None:
        self.status: EngineStatus = status
        self.facts = facts
        self.worker_pid: int | None = None
        self.num_restarts = 0
        self.stats = EngineStats()
        self.queue = QueueStats()
        self.refuse = refuse
        self.refuse_early: ServerError | None = None
        self.submitted: list[tuple[GenerationRequest, tuple[Tiles, ...]]] = []
        self.aborted: list[str] = []
        self.aborted_choices: list[int] = []
        self.running: dict[str, asyncio.Task[None]] = {}
        self._mailboxes: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._tokens = tokens
        self._finish_reason = finish_reason
        self._error_code = error_code
        self._gate = gate

    async def start(self) -> None:
        self.status = "ready"

    async def stop(self) -> None:
        self.status = "stopping"
        for request_id, task in list(self.running.items()):
            task.cancel()
            event = TokenEvent(request_id, None, "error", "shutting_down")
            self._mailboxes[request_id].put_nowait(event)
        self.running.clear()

    def check_room(self, tenant: str, num_choices: int) -> None:
        if self.refuse_early is not None:
            raise self.refuse_early

    async def submit(self, request: GenerationRequest, tiles: Sequence[Tiles]) -> TokenStream:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append((request, tuple(tiles)))
        mailbox: asyncio.Queue[TokenEvent] = asyncio.Queue()
        task = asyncio.create_task(self._answer(request, mailbox))
        self.running[request.request_id] = task
        self._mailboxes[request.request_id] = mailbox
        return TokenStream(
            mailbox, partial(self._abort, request.request_id), num_choices=request.num_choices
        )

    def _abort(self, request_id: str, choice: int | None) -> None:
        if choice is not None:
            self.aborted_choices.append(choice)
            return
        self.aborted.append(request_id)
        task = self.running.pop(request_id, None)
        if task is not None:
            task.cancel()

    async def _answer(self, request: GenerationRequest, mailbox: asyncio.Queue[TokenEvent]) -> None:
        scripts = [self._script(request, choice) for choice in range(request.num_choices)]
        together = [event for step in zip_longest(*scripts) for event in step if event is not None]
        for event in together:
            if self._gate is not None:
                await self._gate.acquire()
            if event is together[-1]:
                self.running.pop(request.request_id, None)
            mailbox.put_nowait(event)

    def _script(self, request: GenerationRequest, choice: int) -> list[TokenEvent]:
        ids = self._tokens(request, choice) if callable(self._tokens) else self._tokens
        ids = list(ids)[: request.sampling.max_tokens]
        events = [
            TokenEvent(
                request.request_id,
                token_id,
                choice=choice,
                logprobs=fake_logprobs(token_id, request.sampling.num_logprobs),
            )
            for token_id in ids
        ]
        if self._error_code is not None:
            return [*events, TokenEvent(request.request_id, None, "error", self._error_code)]
        reason: FinishReason = self._finish_reason
        if len(ids) == request.sampling.max_tokens and reason == "stop":
            reason = "stop" if ids[-1] in request.sampling.stop_token_ids else "length"
        if not events:
            return [TokenEvent(request.request_id, None, reason, choice=choice)]
        events[-1] = replace(events[-1], finish_reason=reason)
        num_told = request.sampling.num_prompt_logprobs
        if choice == 0 and num_told is not None:
            _, *rest = request.prompt_ids
            told = (None, *(fake_logprobs(token_id, num_told) for token_id in rest))
            events[0] = replace(events[0], prompt_logprobs=told)
        return events


def fake_logprobs(token_id: int, num_top: int | None) -> TokenLogprobs | None:
    if num_top is None:
        return None
    top = tuple((token_id - place, -0.5 * place - 0.5) for place in range(num_top))
    return TokenLogprobs(token_id, -token_id / 100, top)
