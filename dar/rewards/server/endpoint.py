"""The routes of a reward server: POST for rewards, GET for later results, and health."""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dar.errors import (
    AuthenticationError,
    ConfigurationError,
    DARError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    RewardContractError,
    ServiceUnavailableError,
    UnsupportedMediaTypeError,
)
from dar.protocol.rewards import RESULT_TYPE, RequestSample, RewardRequest, decode_request
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample, Skipped
from dar.rewards.functions import FunctionReward, RewardFunction
from dar.rewards.http.signing import verify
from dar.rewards.server.callbacks import CallbackSender, signed
from dar.rewards.server.idempotency import Answers, Entry
from dar.rewards.server.options import CheckedOptions
from dar.rewards.threads import ExitRequestedError
from dar.version import __version__

logger = logging.getLogger(__name__)
STOPPING_RETRY_AFTER = 2.0
"""``Retry-After`` of a stopping server, in seconds: by then a new process may have started."""
BODY_SECONDS = 60.0
"""Time limit for reading a body. Until it is complete, its signature cannot be checked."""
LARGE_BODIES = 8
"""Most bodies of the largest size being read at once; smaller ones share that space."""
BUSY_RETRY_AFTER = 1.0
_POLL_SECONDS = 0.05
"""Interval for checking whether a stopping server has work left."""


class FunctionEndpoint:
    """Answers requests of ``dar.reward.v1`` with the results of a function.

    Args:
        function: The user's reward function.
        keys: Accepted secrets, decoded; without any, every request is accepted.
        options: Limits.

    Raises:
        ConfigurationError: The function does not accept ``completions``, or requires an argument
            that is not sent to reward services.
    """

    def __init__(
        self, function: RewardFunction, keys: Sequence[bytes], options: CheckedOptions
    ) -> None:
        self._source = FunctionReward(function)
        if self._source.needs_completion_ids:
            raise ConfigurationError(
                f"reward function {self._source.name} needs completion_ids, which are not sent to "
                "reward services; score the texts in completions, or give the parameter a default"
            )
        self._keys = keys
        self._options = options
        self._wait_seconds = options.seconds_before_202
        calls = options.calls(is_coroutine=inspect.iscoroutinefunction(function))
        self._answers = Answers(options, calls, self._finished)
        self._callbacks = CallbackSender(keys)
        self._deliveries: set[asyncio.Task[None]] = set()
        self._stops_at: float | None = None
        self._incoming_bytes = 0

    @property
    def name(self) -> str:
        """Name of the function, for a component."""
        return self._source.name

    @property
    def answers_later(self) -> bool:
        """Whether a 202 may be answered."""
        return self._wait_seconds is not None

    async def score(self, request: Request) -> Response:
        """Answer the POST of a request."""
        body = await self._read(request)
        if self._keys:
            verify(self._keys, request.headers, body)
        decoded = decode_request(body)
        if self._keys and request.headers["webhook-id"] != decoded.request_id:
            raise InvalidRequestError("webhook-id differs from the body's request_id")
        columns = {name for sample in decoded.samples for name in sample.columns}
        self._source.check_columns(columns | {"ground_truth"})
        if not self._keys:
            decoded = _without_callback(decoded)
        entry = self._answers.known(decoded)
        if entry is None:
            if self._stops_at is not None:
                raise ServiceUnavailableError(
                    "the reward server is stopping", retry_after_seconds=STOPPING_RETRY_AFTER
                )
            entry = self._answers.start(decoded, lambda entry: self._answer(decoded, entry))
        if self.answers_later and "async" in decoded.reply.modes:
            # With 0 there is no wait, so that even a fast function gives a 202.
            if self._wait_seconds:
                await asyncio.wait([entry.task], timeout=self._wait_seconds)
            if not entry.task.done():
                entry.is_promised = True
                promise = {"status": "accepted", "poll_url": f"results/{entry.request_id}"}
                return JSONResponse({"request_id": entry.request_id, **promise}, 202)
        # If the client disconnects, the call goes on; a retry of the request gets its result.
        return self._given(entry, await asyncio.shield(entry.task))

    async def fetch(self, request: Request) -> Response:
        """Answer the GET of a later result."""
        request_id = request.path_params["request_id"]
        if self._keys:
            verify(self._keys, request.headers, b"")
            if request.headers["webhook-id"] != request_id:
                raise AuthenticationError(
                    "the GET is not signed under the id of its request", code="invalid_signature"
                )
        entry = self._answers.find(request_id)
        if entry is None:
            raise NotFoundError(
                f"there is no result of {request_id} in this process: the request never came, its "
                "function failed, or the result was deleted"
            )
        if not entry.task.done():
            return JSONResponse({"request_id": request_id, "status": "accepted"}, 202)
        return self._given(entry, entry.task.result())

    async def health(self, _: Request) -> Response:
        """Whether requests are accepted."""
        if self._stops_at is not None:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    def stop(self) -> None:
        """Reject new requests, and give the others ``stop_seconds``."""
        if self._stops_at is None:
            self._stops_at = time.monotonic() + self._options.stop_seconds

    async def drained(self) -> None:
        """Stop; wait until calls have ended and promised results are delivered or fetched."""
        self.stop()
        await self._wait(lambda entry: not entry.task.done() or entry.is_promised)

    async def aclose(self) -> None:
        """Stop; wait only for callbacks, as results can no longer be fetched; cancel the rest."""
        self.stop()
        await self._wait(lambda entry: entry.is_promised and entry.reply.callback is not None)
        left = [entry for entry in self._answers if entry.is_promised and not entry.is_settled]
        if left:
            logger.warning("%d promised results were not delivered before the end", len(left))
        tasks = [*self._deliveries, *(entry.task for entry in self._answers)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._callbacks.aclose()

    async def _wait(self, concerns: Callable[[Entry], bool]) -> None:
        assert self._stops_at is not None
        while time.monotonic() < self._stops_at and any(  # noqa: ASYNC110 - deadlines pass without an event
            concerns(entry) and not entry.is_settled and (entry.is_in_time or not entry.task.done())
            for entry in self._answers
        ):
            await asyncio.sleep(_POLL_SECONDS)

    def _given(self, entry: Entry, answer: bytes) -> Response:
        entry.is_settled = True
        headers = signed(self._keys, entry.request_id, answer)
        return Response(answer, media_type="application/json", headers=headers)

    async def _read(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaTypeError("send the body without a content-encoding")
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaTypeError("send the body as application/json")
        most = self._options.max_body_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise PayloadTooLargeError(f"the body has {length[:20]} bytes, over {most}")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self._incoming_bytes += len(chunk)
                    if len(body) > most:
                        raise PayloadTooLargeError(f"the body is over {most} bytes")
                    if self._incoming_bytes > LARGE_BODIES * most:
                        raise ServiceUnavailableError(
                            "too many request bodies at once", retry_after_seconds=BUSY_RETRY_AFTER
                        )
        except TimeoutError:
            raise ServiceUnavailableError(
                f"the body did not arrive within {BODY_SECONDS:.3g} s", code="slow_body"
            ) from None
        finally:
            self._incoming_bytes -= len(body)
        return bytes(body)

    def _finished(self, entry: Entry) -> None:
        if entry.is_promised and entry.reply.callback is not None:
            delivery = asyncio.create_task(self._deliver(entry))
            self._deliveries.add(delivery)
            delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, entry: Entry) -> None:
        try:
            result = entry.task.result()
            await self._callbacks.deliver(
                entry.request_id, lambda: (entry.reply.callback, entry.remaining_seconds), result
            )
        finally:
            entry.is_settled = True

    async def _answer(self, request: RewardRequest, entry: Entry) -> bytes:
        samples = [_as_sample(sample) for sample in request.samples]
        context = _context_of(request)
        results: Sequence[RewardResult]
        try:
            results = await self._source.score(samples, context)
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            # Any exception of the function is a 500, also an error of this product or a
            # cancellation that it raised itself.
            logger.exception("the reward function failed")
            if not entry.is_promised:
                raise DARError(_reason(error), code=_code(error)) from error
            # After a 202 there is no status to send: each sample fails, and the client retries it.
            results = [Failed(_code(error), _reason(error), is_transient=True)] * len(samples)
        content = {
            "type": RESULT_TYPE,
            "request_id": request.request_id,
            "results": [
                {"id": sample.id, **_as_json(result)}
                for sample, result in zip(samples, results, strict=True)
            ],
            "server": {"name": self._source.name, "version": f"dar-service/{__version__}"},
        }
        return orjson.dumps(content)


def _without_callback(request: RewardRequest) -> RewardRequest:
    """Without signatures anybody could make this machine post to any address."""
    reply = request.reply.model_copy(update={"callback": None})
    return request.model_copy(update={"reply": reply})


def _context_of(request: RewardRequest) -> RewardContext:
    context = RewardContext(request.step, request.mode, request.job_id)
    sampled_at = request.samples[0].metadata.policy_version
    return replace(context, staleness=context.steps_done - sampled_at)


def _as_sample(sample: RequestSample) -> RewardSample:
    return RewardSample(
        id=sample.id,
        group_id=sample.group_id,
        index=sample.index,
        prompt=sample.prompt,
        messages=sample.messages,
        completion=sample.completion,
        finish_reason=sample.finish_reason,
        completion_tokens=sample.completion_tokens,
        columns={"ground_truth": sample.ground_truth, **sample.columns},
    )


def _as_json(result: RewardResult) -> Mapping[str, Any]:
    if isinstance(result, Failed):
        error = {"code": result.code, "message": result.message, "retryable": result.is_transient}
        return {"error": error}
    if isinstance(result, Skipped):
        return {"skip": True, "reason": result.reason}
    fields = {"reward": result.reward, "components": result.components, "feedback": result.feedback}
    return {name: value for name, value in fields.items() if value not in (None, {})}


def _reason(error: BaseException) -> str:
    if isinstance(error, RewardContractError):
        return error.message
    if isinstance(error, ExitRequestedError):
        error = error.request
    return f"the reward function raised {type(error).__name__}; see the reward server's log"


def _code(error: BaseException) -> str:
    return error.error_code if isinstance(error, RewardContractError) else "reward_function_failed"


async def render(_: Request, error: Exception) -> Response:
    """Render every error in the product's error format."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
        kind = MethodNotAllowedError if error.status_code == 405 else NotFoundError
        error = kind("a reward server answers POST to its path, GET /healthz and GETs of results")
    elif not isinstance(error, DARError):
        error = InvalidRequestError("the client disconnected")
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(round(error.retry_after_seconds))
    return JSONResponse(error.body(), error.status, headers)
