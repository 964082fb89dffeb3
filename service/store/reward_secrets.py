"""Secrets of reward endpoints: stored encrypted, decrypted only for requests to the endpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import delete, or_, select

from dar.protocol.ids import new_id
from service.secret_box import Binding, SecretBox, origin_of
from service.store.database import Transaction
from service.store.reward_tables import (
    RewardEndpointRow,
    RewardRequestRow,
    RewardSecretRow,
    SecretKeyRow,
)

OVERLAP = timedelta(hours=24)
"""How long a replaced signing secret still signs, beside the new one."""


@dataclass(frozen=True, slots=True)
class Access:
    """An endpoint's secrets, decrypted."""

    secrets: list[str] = field(repr=False)
    """Newest first."""
    headers: dict[str, str] = field(repr=False)


def _binding(endpoint: RewardEndpointRow, kind: str, name: str | None) -> Binding:
    use = kind if name is None else f"{kind}:{name}"
    return Binding(endpoint.project_id, endpoint.id, origin_of(endpoint.url), use)


def _add(
    transaction: Transaction,
    box: SecretBox,
    endpoint: RewardEndpointRow,
    value: str,
    *,
    header: str | None = None,
) -> None:
    kind = "signing" if header is None else "header"
    binding = _binding(endpoint, kind, header)
    transaction.add(
        RewardSecretRow(
            id=new_id("rws_"),
            endpoint_id=endpoint.id,
            kind=kind,
            name=header,
            token=box.seal(binding, value),
            fingerprint=box.fingerprint(binding, value),
            created_at=transaction.now,
        )
    )
    transaction.flush()


def list_all(transaction: Transaction, endpoint_ids: Sequence[str]) -> Sequence[RewardSecretRow]:
    """The valid secrets, newest first."""
    expires_at = RewardSecretRow.expires_at
    return transaction.scalars(
        select(RewardSecretRow)
        .where(RewardSecretRow.endpoint_id.in_(endpoint_ids))
        .where(or_(expires_at.is_(None), expires_at > transaction.now))
        .order_by(RewardSecretRow.created_at.desc(), RewardSecretRow.id.desc())
    ).all()


def open_all(transaction: Transaction, box: SecretBox, endpoint: RewardEndpointRow) -> Access:
    """An endpoint's secrets, decrypted.

    Raises:
        SecretUnreadableError: A secret cannot be decrypted, or was stored for another use.
    """
    found = list_all(transaction, [endpoint.id])
    # The new secret signs first, whatever the clocks of the hosts were.
    signing = sorted(
        (row for row in found if row.kind == "signing"), key=lambda row: row.expires_at is not None
    )
    return Access(
        [box.open(_binding(endpoint, "signing", None), row.token) for row in signing],
        {
            row.name: box.open(_binding(endpoint, "header", row.name), row.token)
            for row in found
            if row.kind == "header" and row.name is not None
        },
    )


def add_signing(
    transaction: Transaction, box: SecretBox, endpoint: RewardEndpointRow, value: str
) -> None:
    """Store the first signing secret of an endpoint."""
    _add(transaction, box, endpoint, value)


def replace_signing(
    transaction: Transaction,
    box: SecretBox,
    endpoint: RewardEndpointRow,
    value: str,
    *,
    is_overlapping: bool,
) -> None:
    """Store a new signing secret. The current one stays for a day if ``is_overlapping``."""
    signing = RewardSecretRow.kind == "signing"
    own = RewardSecretRow.endpoint_id == endpoint.id
    present = transaction.scalars(
        select(RewardSecretRow).where(own, signing, RewardSecretRow.expires_at.is_(None))
    ).all()
    transaction.execute(
        delete(RewardSecretRow).where(own, signing, RewardSecretRow.expires_at.is_not(None))
    )
    for row in present:
        if is_overlapping:
            row.expires_at = transaction.now + OVERLAP
        else:
            transaction.delete(row)
    transaction.flush()
    _add(transaction, box, endpoint, value)


def set_headers(
    transaction: Transaction,
    box: SecretBox,
    endpoint: RewardEndpointRow,
    headers: Mapping[str, str | None],
) -> None:
    """Set secret headers by name; None removes one, others stay."""
    if headers:
        transaction.execute(
            delete(RewardSecretRow).where(
                RewardSecretRow.endpoint_id == endpoint.id,
                RewardSecretRow.kind == "header",
                RewardSecretRow.name.in_(headers),
            )
        )
    for name, value in headers.items():
        if value is not None:
            _add(transaction, box, endpoint, value, header=name)


def move(
    transaction: Transaction, box: SecretBox, endpoint: RewardEndpointRow, url: str
) -> list[str]:
    """Change the URL of an endpoint. A new origin keeps signing secrets and drops secret headers.

    Headers are sent unchanged, so the new origin could read those that were meant for the old one.

    Returns:
        Names of the dropped headers.

    Raises:
        SecretUnreadableError: A signing secret cannot be decrypted.
    """
    if origin_of(url) == origin_of(endpoint.url):
        endpoint.url = url
        return []
    found = list_all(transaction, [endpoint.id])
    before = _binding(endpoint, "signing", None)
    opened = {row.id: box.open(before, row.token) for row in found if row.kind == "signing"}
    endpoint.url = url
    after = _binding(endpoint, "signing", None)
    dropped = []
    for row in found:
        if row.id in opened:
            row.token = box.seal(after, opened[row.id])
        else:
            dropped.append(row.name or "")
            transaction.delete(row)
    transaction.flush()
    return sorted(dropped)


def remove_all(transaction: Transaction, endpoint_id: str) -> None:
    """Delete all secrets of an endpoint."""
    transaction.execute(delete(RewardSecretRow).where(RewardSecretRow.endpoint_id == endpoint_id))


def rotate(transaction: Transaction, box: SecretBox) -> int:
    """Encrypt every secret, and every stored ``poll_url``, with the newest key.

    Returns:
        The number of secrets.

    Raises:
        SecretUnreadableError: No key fits a secret; nothing is changed.
    """
    rows = transaction.scalars(select(RewardSecretRow).with_for_update()).all()
    for row in rows:
        row.token = box.renew(row.token)
    accepted = select(RewardRequestRow).where(RewardRequestRow.poll_url.is_not(None))
    for request in transaction.scalars(accepted.with_for_update()).all():
        assert request.poll_url is not None
        if box.is_readable(request.poll_url):  # otherwise the request is sent again
            request.poll_url = box.renew(request.poll_url)
    transaction.flush()
    return len(rows)


def known_keys(transaction: Transaction) -> set[str]:
    """Digests of the keys that hosts have used."""
    return set(transaction.scalars(select(SecretKeyRow.sha256)).all())


def note_keys(transaction: Transaction, digests: Sequence[str]) -> None:
    """Store the keys of this host."""
    new = set(digests) - known_keys(transaction)
    transaction.add_all(
        SecretKeyRow(sha256=item, created_at=transaction.now) for item in sorted(new)
    )
    transaction.flush()


def any_token(transaction: Transaction) -> str | None:
    """The newest stored secret, still encrypted; None if there is none."""
    newest = select(RewardSecretRow.token).order_by(RewardSecretRow.created_at.desc()).limit(1)
    return transaction.scalars(newest).first()
