"""A reward service from one function.

    from dar.rewards.server import serve

    def brevity(prompts, completions, **columns):
        return [-len(text) / 100 for text in completions]

    if __name__ == "__main__":
        serve(brevity, port=9000, secret_file="~/.local/share/dar/reward_secret")

That answers ``POST http://127.0.0.1:9000/score`` for a job whose component names this URL, and ``GET /healthz``. The
function has TRL's signature: it gets lists of prompts and completions, and by name the columns that the job sends
(``ground_truth`` always). It may be a coroutine function. It returns one number per completion, or None where the reward
does not apply; a NaN is reported as a failed sample, and a list of another length refuses the whole request. Instead of a
number it may return a mapping with more, see `dar.rewards.functions.RewardFunction`.

To run it under a server of your own, make the ASGI application with the decorator:

    @reward_server(secret_file="/run/secrets/reward")
    async def app(prompts, completions, **columns):
        ...

docs/rewards-server.md is the guide.
"""

import contextlib
import inspect
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
        ConfigurationError: An option is out of range, a secret is malformed, or the function cannot take ``completions`` or
            cannot do without ``completion_ids``.
        OSError: A ``secret_file`` cannot be read.
    """
    checked = CheckedOptions(**options)
    keys = checked.keys()

    def make(function: RewardFunction) -> Starlette:
        if not keys:
            logger.warning(
                "NO SECRET: the reward server does not verify signatures and answers everybody who can reach it; "
                "it posts to no callbacks, so that later results must be fetched; pass secret= or secret_file="
            )
        is_coroutine = inspect.iscoroutinefunction(function)
        endpoint = FunctionEndpoint(function, checked.of(keys, is_coroutine=is_coroutine))
        return _application(endpoint, checked.path)

    return make if function is None else make(function)


def _application(endpoint: FunctionEndpoint, path: str) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await endpoint.aclose()

    beside = path[: path.rindex("/") + 1]
    routes = [
        Route(path, endpoint.ask, methods=["POST"]),
        Route(f"{beside}results/{{request_id}}", endpoint.fetch),
        Route("/healthz", endpoint.health),
    ]
    failures = (HTTPException, DARError, ClientDisconnect)
    app = Starlette(
        routes=routes, exception_handlers=dict.fromkeys(failures, render), lifespan=lifespan
    )
    app.state.reward_endpoint = endpoint
    app.state.reward_path = path
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

    Then new requests get a 503, while calls in flight end and promised results are delivered, for at most ``stop_seconds``.
    A second signal ends it at once.

    Args:
        function: The reward function, or an application, which brings its own options.
        host: Address to bind to; ``0.0.0.0`` for other machines.
        port: Port to bind to; 0 takes a free one.
        started: Called with the URL of the reward service, once requests are taken in, and with what answers them.
        **options: See `ServerOptions`.

    Raises:
        ConfigurationError: The address cannot be bound to, an application came with options, or see `reward_server`.
        OSError: A ``secret_file`` cannot be read.
    """
    if not isinstance(function, Starlette):
        function = reward_server(**options)(function)
    elif any(option is not None for option in options.values()):
        raise ConfigurationError(
            "an application brings its own secret and limits; pass options to reward_server, not to serve"
        )
    listener = bind(host, port)
    url = address(listener, host) + getattr(function.state, "reward_path", "/")
    if started is not None:
        started(url, getattr(function.state, "reward_endpoint", None))
    run(function, listener, url)
