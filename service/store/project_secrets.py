"""Secrets that sign requests to inline reward URLs: each project has its own.

They are derived from one random root, which is stored encrypted and never leaves the service. A
worker that has the secret of one project can compute neither the root nor the secret of another.

The first project of an installation signs with the secrets of the settings until its secret is
rotated for the first time, so that reward services of earlier installations keep working.
"""

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import func, or_, select

from dar.errors import SecretUnreadableError
from dar.rewards.http.signing import PREFIX
from service.secret_box import Binding, SecretBox, derived
from service.store.database import Transaction
from service.store.keys import default_project
from service.store.reward_secrets import OVERLAP
from service.store.reward_tables import InstallationSecretRow
from service.store.tables import ProjectRow

ROOT = "reward_root"
ROOT_BYTES = 32
_BINDING = Binding(owner="", endpoint_id="", origin="", use=ROOT)


@dataclass(frozen=True, slots=True)
class ProjectSecrets:
    """What signs the requests of a project to inline URLs."""

    values: list[str] = field(repr=False)
    """Newest first."""
    generation: int
    """Number of rotations."""
    is_configured: bool
    """Whether they come from the settings."""
    old_until: datetime | None
    """Until when the last but one signs too; None: it does not."""


def secrets_of(
    transaction: Transaction, box: SecretBox, configured: Sequence[str], project_id: str
) -> ProjectSecrets:
    """The reward secrets of a project.

    Args:
        transaction: Where they are read.
        box: Decrypts the root.
        configured: The reward secrets of the settings, the newest first.
        project_id: The project.

    Raises:
        SecretUnreadableError: No key decrypts the root.
    """
    project = transaction.get_one(ProjectRow, project_id)
    number = project.reward_generation
    is_first = default_project(transaction) == project_id

    def of(generation: int) -> Sequence[str]:
        if is_first and generation == 0:
            return configured
        return [_derived(transaction, box, project_id, generation)]

    values = list(of(number))
    until = project.old_reward_secret_until
    is_overlapping = number > 0 and until is not None and until > transaction.now
    if is_overlapping:
        values += of(number - 1)
    return ProjectSecrets(
        list(dict.fromkeys(values)),
        number,
        is_first and number == 0,
        until if is_overlapping else None,
    )


def rotate(transaction: Transaction, project_id: str, *, is_overlapping: bool) -> None:
    """Let a project sign with its next secret. The current one signs too for a day if wanted."""
    wanted = select(ProjectRow).where(ProjectRow.id == project_id).with_for_update()
    project = transaction.scalars(wanted.execution_options(populate_existing=True)).one()
    project.reward_generation += 1
    project.old_reward_secret_until = transaction.now + OVERLAP if is_overlapping else None
    transaction.flush()


def _derived(transaction: Transaction, box: SecretBox, project_id: str, generation: int) -> str:
    row = transaction.get(InstallationSecretRow, ROOT)
    try:
        root = "" if row is None else box.open(_BINDING, row.token)
    except SecretUnreadableError:
        root = ""
    if not root:
        raise SecretUnreadableError(
            "the root of the projects' reward secrets cannot be decrypted; the operator must add "
            "the key that it was stored with (DAR_SECRET_KEYS)"
        )
    key = derived(base64.b64decode(root), f"reward secret\n{project_id}\n{generation}")
    return PREFIX + base64.b64encode(key).decode()


def token_in_use(transaction: Transaction) -> str | None:
    """The encrypted root, if a project signs with a secret that was derived from it."""
    others = select(func.count()).select_from(ProjectRow).scalar_subquery() > 1
    rotated = select(ProjectRow.id).where(ProjectRow.reward_generation > 0).exists()
    wanted = select(InstallationSecretRow.token).where(
        InstallationSecretRow.name == ROOT, or_(others, rotated)
    )
    return transaction.scalars(wanted).one_or_none()


def keep_root(transaction: Transaction, box: SecretBox) -> None:
    """Make the root at the first start, and again if no key fits and no project needs it."""
    row = transaction.get(InstallationSecretRow, ROOT)
    if row is not None and (box.is_readable(row.token) or token_in_use(transaction) is not None):
        return
    token = box.seal(_BINDING, base64.b64encode(secrets.token_bytes(ROOT_BYTES)).decode())
    if row is None:
        transaction.add(InstallationSecretRow(name=ROOT, token=token, created_at=transaction.now))
    else:
        row.token, row.created_at = token, transaction.now
    transaction.flush()


def renew(transaction: Transaction, box: SecretBox) -> None:
    """Encrypt the root with the newest key.

    Raises:
        SecretUnreadableError: No key fits.
    """
    row = transaction.get(InstallationSecretRow, ROOT, with_for_update=True)
    if row is not None:
        row.token = box.renew(row.token)
        transaction.flush()
