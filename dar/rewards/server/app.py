"""A reward service from one function.

    from dar.rewards.server import serve

    def brevity(prompts, completions, **columns):
        return [-len(text) / 100 for text in completions]

    if __name__ == "__main__":
        serve(brevity, port=9000, secret_file="~/.local/share/dar/reward_secret")

This answers ``POST http://127.0.0.1:9000/score`` for a job whose component names this URL, and
``GET /healthz``. The function has the signature of TRL's reward functions: it gets lists of prompts
and completions, and by name the columns that the job sends (always ``ground_truth``). It may be a
coroutine function. It returns one number per completion, or None if the reward does not apply. A
NaN is reported as a failed sample, and a list of wrong length fails the whole request. Instead of a
number it may return a mapping, see `dar.rewards.functions.RewardFunction`.

To run it under another ASGI server, make the application with the decorator:

    @reward_server(secret_file="/run/secrets/reward")
    async def app(prompts, completions, **columns):
        ...

docs/rewards-server.md is the guide.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Unpack, overload

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from dar.errors import ConfigurationError, DARError
from dar.rewards.functions import RewardFunction
from dar.rewards.server.endpoint import FunctionEndpoint, render
from dar.rewards.server.options import CheckedOptions, ServerOptions
from dar.rewards.server.process import address, bind, run

__all__ = ["ServerOptions", "reward_server", "serve"]
logger = logging.getLogger(__name__)


@overload
def reward_server(function: RewardFunction, /) -> Starlette: ...
@overload
def reward_server(**options: Unpack[ServerOptions]) -> Callable[[RewardFunction], Starlette]: ...


def reward_server(
    function: RewardFunction | None = None, /, **options: Unpack[ServerOptions]
) -> Starlette | Callable[[RewardFunction], Starlette]:
    """Turn a reward function into an ASGI application; a decorator, with or without arguments.

    Args:
        function: The reward function, when used without parentheses.
        **options: See `ServerOptions`.

    Raises:
        ConfigurationError: An option is out of range, a secret is malformed, or the function does
            not accept ``completions`` or requires ``completion_ids``.
        OSError: A ``secret_file`` cannot be read.
    """
    checked = CheckedOptions(**options)
    keys = checked.keys()

    def make(function: RewardFunction) -> Starlette:
        if not keys:
            logger.warning(
                "NO SECRET: the reward server does not verify signatures and answers every "
                "request. It posts no callbacks, so later results must be fetched. "
                "Pass secret= or secret_file="
            )
        return _application(FunctionEndpoint(function, keys, checked), checked)

    return make if function is None else make(function)


def _application(endpoint: FunctionEndpoint, options: CheckedOptions) -> Starlette:
    path = options.decoded_path

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await endpoint.aclose()

    beside = path[: path.rindex("/") + 1]
    routes = [
        Route(path, endpoint.score, methods=["POST"]),
        Route(f"{beside}results/{{request_id}}", endpoint.fetch),
        Route("/healthz", endpoint.health),
    ]
    handlers = dict.fromkeys((HTTPException, DARError, ClientDisconnect), render)
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.state.reward_endpoint = endpoint
    app.state.reward_path = options.escaped_path
    return app


def serve(
    function: RewardFunction | Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 9000,
    started: Callable[[str, FunctionEndpoint | None], None] | None = None,
    **options: Unpack[ServerOptions],
) -> None:
    """Serve a reward function, or an application of `reward_server`, until Ctrl-C or SIGTERM.

    While it stops, new requests get a 503; running calls end and results promised with a 202 are
    delivered, for at most ``stop_seconds``. A second signal stops it at once.

    Args:
        function: The reward function, or an application, which has its own options.
        host: Address to bind to; ``0.0.0.0`` for other machines.
        port: Port to bind to; 0 takes a free one.
        started: Called with the URL and the endpoint once requests are accepted; the endpoint is
            None for an application of another kind.
        **options: See `ServerOptions`.

    Raises:
        ConfigurationError: The address cannot be bound, options were given for an application, or
            see `reward_server`.
        OSError: A ``secret_file`` cannot be read.
    """
    if not isinstance(function, Starlette):
        function = reward_server(**options)(function)
    elif any(option is not None for option in options.values()):
        raise ConfigurationError(
            "an application has its own secret and limits; "
            "pass options to reward_server, not to serve"
        )
    listener = bind(host, port)
    url = address(listener, host) + getattr(function.state, "reward_path", "/")
    if started is not None:
        started(url, getattr(function.state, "reward_endpoint", None))
    run(function, listener, url)
