"""What it means that a hub does not give something, in sentences that say what to do.

The hub's library and the worker, which asks the hub itself, meet the same refusals. Each sentence
names what was wanted, such as ``the model 'owner/name'``.
"""

REFUSALS = frozenset({401, 403})
"""HTTP statuses of a token that is not valid, or lacks a right."""
PASSING_STATUSES = frozenset({408, 425, 429})
"""HTTP statuses below 500 that a later request may not get."""
SET_VARIABLE = "set DAR_HF_TOKEN on the worker (HF_TOKEN for dar train) to a token of {}"


def gated(what: str) -> str:
    """The owner of a repository has not accepted the account."""
    return (
        f"the hub gives {what} only to accounts that its owner has accepted; accept its "
        f"licence on its page of the hub, and {SET_VARIABLE.format('that account')}"
    )


def missing(what: str) -> str:
    """There is no such repository, or it is private: the hub does not say which."""
    return (
        f"the hub does not have {what}, or keeps it private; check the name, use a local copy, "
        f"or, if it is private, {SET_VARIABLE.format('an account that may read it')}"
    )


def refused(what: str, status: int, message: str | None) -> str:
    """The hub refuses the token.

    Args:
        what: What was wanted.
        status: HTTP status of the hub's answer.
        message: Its explanation.
    """
    says = f": {message.splitlines()[0]}" if message else ""
    return (
        f"the hub refuses {what} (HTTP {status}{says.rstrip('.')}); "
        f"{SET_VARIABLE.format('an account that may read it')}"
    )


def is_passing(status: int) -> bool:
    """Whether the same request may get another answer later."""
    return status >= 500 or status in PASSING_STATUSES


def unreachable(what: str, why: str) -> str:
    """Only the network or the hub's servers failed, and the files may exist."""
    return (
        f"the hub cannot be reached to load {what} ({why}); use a local copy, or "
        "try again with a connection"
    )
