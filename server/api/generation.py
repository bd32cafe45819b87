"""The one way from a chat request to its answer, for all endpoints that take messages.

A `Generation` prepares and admits one request, and charges and counts what comes of it. Must not
know how an answer is worded.
"""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request

from server.api.health import not_ready
from server.api.media_usage import MediaUsage
from server.api.metrics import counted, counting_refusals
from server.api.multipart import Attachments
from server.api.places import SAME_PLACES, Places
from server.api.rate_limits import Allowance, ChargedStream
from server.api.sse import Answer
from server.chat.prepare import ChatRequest, Prepared
from server.chat.tokenizer import detokenize
from server.errors import MediaError


def refuse_unless_ready(request: Request) -> None:
    """Unavailable where nothing would be answered; to be asked before anything is read."""
    state = request.app.state
    unavailable = not_ready(state.engine.status, is_draining=state.lifecycle.is_draining)
    if unavailable is not None:
        raise unavailable


class Generation:
    """One request on its way through the preparer and the engine."""

    def __init__(
        self,
        request: Request,
        chat_request: ChatRequest,
        *,
        id: str,
        attachments: Attachments | None = None,
        places: Places = SAME_PLACES,
    ) -> None:
        """The engine knows the request by the `id`. Errors and usage name the caller's `places`."""
        self._state = request.app.state
        self._tenant: str = request.state.tenant
        self._allowance: Allowance = request.state.allowance
        self._chat_request = chat_request
        self._id = id
        self._attachments = attachments
        self._places = places
        self.media = MediaUsage(self._state.metrics)

    def check_room(self) -> None:
        """Unavailable or RateLimited where the engine would not take it; `start` asks again."""
        self._state.engine.check_room(self._tenant, self._chat_request.num_choices)

    async def prepare(self) -> Prepared:
        """Everything that comes before an answer; `media` tells of the media from here on."""
        metrics = self._state.metrics
        try:
            with self._places.named_in_errors(), counting_refusals(metrics):
                prepared: Prepared = await self._state.preparer.prepare(
                    self._chat_request,
                    request_id=self._id,
                    tenant=self._tenant,
                    attachments=self._attachments,
                )
        except MediaError as error:
            metrics.count_medium(error.kind, error.code)
            raise
        if self._attachments is not None:
            await self._attachments.finish()
        self.media.prepared(
            [
                (replace(report, path=self._places.of(report.path)), place)
                for report, place in prepared.reports
            ]
        )
        return prepared

    async def start(self, prepared: Prepared) -> Answer:
        """Admit it to the engine; from here on it costs tokens."""
        state, num_choices = self._state, prepared.request.num_choices
        self._allowance.check_tokens(prepared.usage.prompt_tokens)
        stream = await state.engine.submit(prepared.request, prepared.tiles)
        self._allowance.take_tokens(prepared.usage.prompt_tokens)
        deltas = detokenize(
            ChargedStream(stream, self._allowance),
            state.preparer.tokenizer,
            stop=prepared.stop,
            calls=prepared.calls,
            min_tokens=prepared.request.sampling.min_tokens,
            num_choices=num_choices,
        )
        return Answer(
            prepared.usage,
            counted(deltas, state.metrics, num_choices=num_choices),
            media=self.media,
            num_choices=num_choices,
        )
