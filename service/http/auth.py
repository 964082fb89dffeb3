"""Authentication and scopes: keys of users and of workers, and tokens of attempts."""

from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import Depends, Request

from dar.errors import AuthenticationError, NotFoundError, PermissionDeniedError
from dar.protocol.api_keys import Scope
from service import keys
from service.installation import CurrentInstallation, Installation
from service.store import fence
from service.store import keys as key_store

log = structlog.get_logger()
OTHER_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
"""Headers in which other services take a key."""
HINT = "send 'Authorization: Bearer <key>'; by default it is in $DAR_HOME/api_key"


@dataclass(frozen=True, slots=True)
class Principal:
    """The key that sent a request."""

    key_id: str
    project_id: str | None
    scopes: frozenset[str]
    node: str | None
    """The only node whose workers may use the key; None: any."""

    def may_act_for(self, node: str) -> bool:
        """Whether the key may be used by workers of ``node``."""
        return self.node in {None, node}


@dataclass(frozen=True, slots=True)
class User:
    """A user's key and its project."""

    key_id: str
    project_id: str


def bearer(request: Request) -> str:
    """The bearer credential of a request.

    Raises:
        AuthenticationError: The request has none.
    """
    header = request.headers.get("authorization", "")
    scheme, _, credential = header.partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise AuthenticationError(
            f"{_instead_of_key(request, header)}; {HINT}", code="missing_api_key"
        )
    return credential.strip()


def _instead_of_key(request: Request, header: str) -> str:
    """What a request without a bearer credential has sent; never shows a credential."""
    scheme, _, credential = header.strip().partition(" ")
    if scheme.lower() == "bearer":
        return "the Authorization header has no key after 'Bearer'"
    if header and not credential:
        return "the Authorization header holds a key without 'Bearer ' before it"
    if header:
        return "the Authorization header has another scheme than Bearer"
    for name in OTHER_HEADERS:
        if name in request.headers:
            return f"the key was sent in the header {name}, which is not read"
    return "no API key was sent"


def principal(request: Request, installation: CurrentInstallation) -> Principal:
    """The key that sent the request.

    Raises:
        AuthenticationError: The key is missing, unknown, expired or revoked.
    """
    key = bearer(request)
    with installation.database.read() as transaction:
        record = key_store.look_up(transaction, keys.key_id(key))
        now = transaction.now
    # An unknown id is compared too, so that both errors take the same time.
    if not keys.is_equal(key, record.sha256 if record else keys.digest("")) or record is None:
        raise AuthenticationError(f"the API key is not known here; {HINT}")
    # Only who has the key hears more about it.
    state = key_store.state_of(record, now)
    if state != "valid":
        raise AuthenticationError(
            f"the API key {record.id} {'has expired' if state == 'expired' else 'was revoked'}; "
            "an operator can make another one (dar keys create)",
            code=f"{state}_api_key",
        )
    installation.key_uses.note(record.id, now)
    return Principal(record.id, record.project_id, frozenset(record.scopes.split()), record.node)


def authenticate(request: Request, installation: Installation) -> None:
    """Check that the request has a known key or token, whatever its scopes.

    Raises:
        AuthenticationError: It has none.
    """
    lease_id = keys.lease_of_token(bearer(request))
    if lease_id is None:
        principal(request, installation)
    else:
        _check_token(installation, lease_id, bearer(request))


@dataclass(frozen=True, slots=True)
class UserWith:
    """A dependency that accepts users' keys with a scope."""

    scope: Scope

    def __call__(self, who: Annotated[Principal, Depends(principal)]) -> User:
        """The key and its project.

        Raises:
            PermissionDeniedError: It lacks the scope, or is a worker's.
        """
        if self.scope not in who.scopes or who.project_id is None:
            raise PermissionDeniedError(
                f"this key has the scopes {' '.join(sorted(who.scopes))!r}, but {self.scope!r} is "
                "needed"
            )
        return User(who.key_id, who.project_id)


Reader = Annotated[User, Depends(UserWith("read"))]
Submitter = Annotated[User, Depends(UserWith("submit"))]
Administrator = Annotated[User, Depends(UserWith("admin"))]


def worker(who: Annotated[Principal, Depends(principal)]) -> Principal:
    """A dependency that accepts workers' keys.

    Raises:
        PermissionDeniedError: It is a user's key.
    """
    if "worker" not in who.scopes:
        raise PermissionDeniedError(
            "this route takes a worker's key; by default it is in $DAR_HOME/worker_key"
        )
    return who


def lease_holder(lease_id: str, request: Request, installation: CurrentInstallation) -> str:
    """A dependency that accepts the token of the lease's own attempt. Returns the lease's id.

    Whether the lease is still valid is checked later.

    Raises:
        AuthenticationError: It is not a token of an attempt.
        NotFoundError: It is the token of another lease.
    """
    token = bearer(request)
    claimed = keys.lease_of_token(token)
    if claimed is None:
        raise AuthenticationError("this route takes the token of an attempt, which a claim gives")
    _check_token(installation, claimed, token)
    if claimed != lease_id:
        raise NotFoundError(f"there is no lease {lease_id!r}")
    return lease_id


def lease_sender(lease_id: str, request: Request, installation: CurrentInstallation) -> str:
    """A dependency that accepts the attempt's token, or a worker's key for attempts of its node.

    The header ``x-dar-node`` names the node.

    Raises:
        AuthenticationError: The credential is unknown.
        PermissionDeniedError: It is a user's key.
        NotFoundError: It is another attempt's token, or the attempt ran on another node than the
            header names or the key is bound to.
    """
    token = bearer(request)
    if keys.lease_of_token(token) is not None:
        return lease_holder(lease_id, request, installation)
    who = worker(principal(request, installation))
    try:
        with installation.database.read() as transaction:
            attempt = fence.find(transaction, lease_id)
    except NotFoundError:
        job_id = request.headers.get("x-dar-job")
        log.warning(
            "a worker has reports of a job that is not in the database: it was deleted, or a backup "
            "from before it was restored",
            job_id=None if job_id is None else job_id[:64],
            node=request.headers.get("x-dar-node"),
            lease_id=lease_id,
        )
        raise
    named = request.headers.get("x-dar-node")
    if attempt.node != named or not who.may_act_for(attempt.node):
        raise NotFoundError(f"lease {lease_id!r} was not held on the node that x-dar-node names")
    return lease_id


def _check_token(installation: Installation, lease_id: str, token: str) -> None:
    try:
        with installation.database.read() as transaction:
            sha256 = fence.find(transaction, lease_id).token_sha256
    except NotFoundError:
        sha256 = keys.digest("")
    if not keys.is_equal(token, sha256):
        raise AuthenticationError("the attempt's token is not known here")


LeaseHolder = Annotated[str, Depends(lease_holder)]
LeaseSender = Annotated[str, Depends(lease_sender)]
Worker = Annotated[Principal, Depends(worker)]
