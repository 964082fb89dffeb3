"""The reward server: a reward service from one function. `serve` and `reward_server` are its face.

app: `serve` and `reward_server`, which make the ASGI application.
endpoint: one request: read, verify, score, answer.
idempotency: an answer that was given is given again.
callbacks: answers by 202 and a later callback.
options: the options of a server, checked.
process: the address, the socket and the server process.
"""

from dar.rewards.server.app import ServerOptions, reward_server, serve

__all__ = ["ServerOptions", "reward_server", "serve"]
