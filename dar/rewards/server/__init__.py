"""The reward server: a reward service from one function. Use `serve` or `reward_server`.

app: `serve` and `reward_server`, which make the ASGI application.
endpoint: the routes: verify the signature, score, answer at once or later.
idempotency: scores each request once and keeps the answers for repetitions.
callbacks: posts later results to callback URLs, until they are accepted.
options: the options of a server, checked.
process: socket, URL, and the server process.
"""

from dar.rewards.server.app import ServerOptions, reward_server, serve

__all__ = ["ServerOptions", "reward_server", "serve"]
