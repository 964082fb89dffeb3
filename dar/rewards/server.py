"""A reward service from one function.

    from dar.rewards.server import serve

    def brevity(prompts, completions, **columns):
        return [-len(text) / 100 for text in completions]

    if __name__ == "__main__":
        serve(brevity, port=9000, secret_file="~/.local/share/dar/reward_secret")

That answers ``POST http://127.0.0.1:9000/score`` for a job whose component names this URL, and ``GET /healthz``. The
function has TRL's signature: it gets lists of prompts and completions, and by name the columns that the job sends
(``ground_truth`` always). It may be a coroutine function. It returns one number per completion, or None where the reward
does not apply; a NaN is reported as a failed sample, and a list of another length refuses the whole request.

To run it under a server of your own, make the ASGI application with the decorator:

    @reward_server(secret_file="/run/secrets/reward")
    async def app(prompts, completions, **columns):
        ...
"""

import asyncio
import hashlib
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dar.errors import (
    ConfigurationError,
    DARError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    RewardContractError,
    UnsupportedMediaTypeError,
)
from dar.protocol.rewards import (
    MAX_REQUEST_BYTES,
    RequestSample,
    RewardRequest,
    decode_request,
)
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample, Skipped
from dar.rewards.functions import FunctionReward, RewardFunction
from dar.rewards.signing import decode_secret, verify
from dar.version import __version__

logger = logging.getLogger(__name__)
REMEMBERED_ANSWERS = 256
"""Answers kept for repeated requests, newest last."""
ASYNC_CALLS = 64
"""Calls of a coroutine function in progress at once, unless told otherwise."""


class RewardEndpoint:
    """Answers requests of ``dar.reward.v1`` with what a function returns.

    Args:
        function: The user's function.
        keys: Accepted secrets, decoded; none accepts every request.
        max_calls: Calls of the function in progress at once.
        max_body_bytes: Largest request.

    Raises:
        ConfigurationError: The function cannot take ``completions``, or cannot do without ``completion_ids``.
    """

    def __init__(
        self,
        function: RewardFunction,
        *,
        keys: Sequence[bytes],
        max_calls: int,
        max_body_bytes: int,
    ) -> None:
        self._source = FunctionReward(function)
        if self._source.needs_completion_ids:
            raise ConfigurationError(
                f"reward function {self._source.name} needs completion_ids, which are not sent to reward services; "
                "score the texts in completions, or give the parameter a default"
            )
        self._keys = tuple(keys)
        self._slots = asyncio.Semaphore(max_calls)
        self._max_body_bytes = max_body_bytes
        self._answers: OrderedDict[tuple[str, bytes], asyncio.Task[bytes]] = OrderedDict()

    async def __call__(self, request: Request) -> Response:
        """Answer one POST."""
        body = await self._read(request)
        if self._keys:
            verify(self._keys, request.headers, body)
        asked = decode_request(body)
        answer = await self._answer_once(asked, body)
        return Response(answer, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaTypeError("send the body without a content-encoding")
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaTypeError("send the body as application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise PayloadTooLargeError(f"the body is over {self._max_body_bytes} bytes")
        return bytes(body)

    async def _answer_once(self, request: RewardRequest, body: bytes) -> bytes:
        """The same bytes under the same id are scored once: a repetition gets the first one's answer, or waits for it."""
        key = (request.request_id, hashlib.sha256(body).digest())
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = asyncio.create_task(self._answer(request))
            answer.add_done_callback(lambda task: self._forget_failure(key, task))
            if len(self._answers) > REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
        # The caller may give up and ask again; what it has started goes on for the next attempt.
        return await asyncio.shield(answer)

    def _forget_failure(self, key: tuple[str, bytes], task: asyncio.Task[bytes]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._answers.pop(key, None)

    async def _answer(self, request: RewardRequest) -> bytes:
        samples = [_as_sample(sample) for sample in request.samples]
        context = RewardContext(request.step, request.mode, request.job_id)
        try:
            async with self._slots:
                results = await self._source.score(samples, context)
        except RewardContractError as error:  # the function's fault: a 500, not the sender's 400
            raise DARError(error.message, code=error.error_code) from error
        content = {
            "request_id": request.request_id,
            "results": [
                {"id": sample.id, **_as_json(result)}
                for sample, result in zip(samples, results, strict=True)
            ],
            "server": {"name": self._source.name, "version": f"dar-service/{__version__}"},
        }
        return orjson.dumps(content)


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


def _as_json(result: RewardResult) -> dict[str, Any]:
    if isinstance(result, Failed):
        error = {
            "code": result.code,
            "message": result.message,
            "retryable": result.is_transient,
        }
        return {"error": error}
    if isinstance(result, Skipped):
        return {"skip": True, "reason": result.reason}
    return {"reward": result.reward}


async def _healthz(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _render(_: Request, error: Exception) -> Response:
    """Every refusal in the one error shape of the product."""
    if isinstance(error, HTTPException):
        kind = MethodNotAllowedError if error.status_code == 405 else NotFoundError
        error = kind("a reward server answers a POST to its own path, and GET /healthz")
    elif not isinstance(error, DARError):
        error = InvalidRequestError("the request broke off")
    return JSONResponse(error.body(), error.status)


def _function_failed(error: Exception) -> Response:
    failure = DARError(
        f"the reward function raised {type(error).__name__}; the reward server's log has more",
        code="reward_function_failed",
    )
    return JSONResponse(failure.body(), failure.status)


@overload
def reward_server(function: RewardFunction, /) -> Starlette: ...
@overload
def reward_server(
    *,
    secret: str | Sequence[str] | None = None,
    secret_file: str | Path | None = None,
    path: str = "/score",
    max_calls: int | None = None,
    max_body_bytes: int = MAX_REQUEST_BYTES,
) -> Callable[[RewardFunction], Starlette]: ...


def reward_server(
    function: RewardFunction | None = None,
    /,
    *,
    secret: str | Sequence[str] | None = None,
    secret_file: str | Path | None = None,
    path: str = "/score",
    max_calls: int | None = None,
    max_body_bytes: int = MAX_REQUEST_BYTES,
) -> Starlette | Callable[[RewardFunction], Starlette]:
    """Turn a reward function into an ASGI application; a decorator, with or without arguments.

    Args:
        function: The reward function, when used without parentheses.
        secret: ``whsec_…``, or several while one replaces another. A request that none of them signed gets a 401.
        secret_file: File with the secret; ``~`` is expanded.
        path: Where rewards are asked for.
        max_calls: Calls of the function in progress at once; default 1 for a plain function, which thus need not be
            thread-safe, and 64 for a coroutine function. A function that waits for a network wants more than 1.
        max_body_bytes: Largest request; a larger one gets a 413, and the sender splits it.

    Raises:
        ConfigurationError: A secret is malformed, or the function cannot take ``completions`` or cannot do without
            ``completion_ids``.
        OSError: ``secret_file`` cannot be read.
    """
    keys = [decode_secret(text) for text in _secrets(secret, secret_file)]

    def make(function: RewardFunction) -> Starlette:
        if not keys:
            logger.warning(
                "NO SECRET: the reward server does not verify signatures and answers everybody who can reach it; "
                "pass secret= or secret_file="
            )
        default_calls = ASYNC_CALLS if inspect.iscoroutinefunction(function) else 1
        endpoint = RewardEndpoint(
            function,
            keys=keys,
            max_calls=max_calls or default_calls,
            max_body_bytes=max_body_bytes,
        )

        async def score(request: Request) -> Response:
            try:
                return await endpoint(request)
            except (DARError, ClientDisconnect):
                raise
            except Exception as error:
                # Not left to Starlette: what its last handler sees it raises again, and uvicorn then drops the connection.
                logger.exception("the reward function failed")
                return _function_failed(error)

        routes = [Route(path, score, methods=["POST"]), Route("/healthz", _healthz)]
        failures = (HTTPException, DARError, ClientDisconnect)
        return Starlette(routes=routes, exception_handlers=dict.fromkeys(failures, _render))

    return make if function is None else make(function)


def _secrets(secret: str | Sequence[str] | None, secret_file: str | Path | None) -> list[str]:
    secrets = [secret] if isinstance(secret, str) else list(secret or ())
    if secret_file is not None:
        secrets.append(Path(secret_file).expanduser().read_text(encoding="utf-8").strip())
    return secrets


def serve(
    function: RewardFunction | Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 9000,
    secret: str | Sequence[str] | None = None,
    secret_file: str | Path | None = None,
    max_calls: int | None = None,
) -> None:
    """Serve a reward function, or an application of `reward_server`, until Ctrl-C or SIGTERM.

    Args:
        function: The reward function, or an application, which brings its own secret and limits.
        host: Address to bind to; ``0.0.0.0`` for other machines.
        port: Port to bind to.
        secret: See `reward_server`.
        secret_file: See `reward_server`.
        max_calls: See `reward_server`.

    Raises:
        ConfigurationError: An application came with a secret or ``max_calls``; or see `reward_server`.
        OSError: ``secret_file`` cannot be read.
    """
    if not isinstance(function, Starlette):
        function = reward_server(secret=secret, secret_file=secret_file, max_calls=max_calls)(
            function
        )
    elif any(option is not None for option in (secret, secret_file, max_calls)):
        raise ConfigurationError(
            "an application brings its own secret and limits; "
            "pass secret, secret_file and max_calls to reward_server, not to serve"
        )
    uvicorn.run(
        function,
        host=host,
        port=port,
        access_log=False,
        timeout_keep_alive=75,  # longer than the client keeps idle connections, so that it closes first
        timeout_graceful_shutdown=5,
    )
