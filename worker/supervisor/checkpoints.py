"""Uploads published checkpoints during training: register, send in resumable parts, commit.

Parts go to the service. Where it keeps files in a bucket, they go directly to the store.
"""

import collections
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from dar.client.transport import Backoff
from dar.errors import (
    CheckpointError,
    ConflictError,
    DARError,
    FencedError,
    ServiceUnavailableError,
)
from dar.fault_points import fault_point
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest, ManifestFile
from dar.protocol.worker import (
    CheckpointParts,
    CheckpointUpload,
    NewCheckpointRow,
    RegisterCheckpoint,
)
from worker.api import LONGEST_PAUSE_SECONDS, WorkerClient
from worker.store_client import StoreClient, digests_of
from worker.supervisor.state import AttemptState

log = structlog.get_logger(__name__)

PART_BYTES = 8 * 1024**2
UPLOAD_ATTEMPTS = 5
"""Attempts at an upload without progress, when the service and the worker disagree about it."""
LOOK_SECONDS = 0.5
BLOCKING = frozenset({"storage_full", "storage_unavailable"})
"""Codes of errors of the artifact store, which only its operator can end."""
Answer = TypeVar("Answer")


class CheckpointUploader:
    """Uploads one checkpoint at a time, in order; `run` is the body of its thread.

    A checkpoint is skipped when ``keep_last`` newer ones wait, because the job would not keep it.
    """

    def __init__(self, state: AttemptState, client: WorkerClient, keep_last: int) -> None:
        self._state = state
        self._lease = state.lease
        self._client = client
        self._store = StoreClient(state.is_given_up)
        self._keep = keep_last
        self._waiting: collections.deque[NewCheckpointRow] = collections.deque()
        self._arrived = threading.Event()
        self._ended = threading.Event()
        self.committed: dict[int, str] = {}
        """Checkpoint ids by step."""

    def take(self, row: NewCheckpointRow) -> None:
        """Queue the checkpoint that ``row`` announces."""
        self._waiting.append(row)
        while len(self._waiting) > self._keep:
            skipped = self._waiting.popleft()
            log.warning("checkpoint skipped: newer ones wait", step=skipped.step)
            self._drop(skipped)
        self._arrived.set()

    def finish(self) -> None:
        """Make `run` return when all are committed, because no more checkpoints follow."""
        self._ended.set()
        self._arrived.set()

    def run(self) -> None:
        previous: NewCheckpointRow | None = None
        while not self._state.is_given_up():
            self._arrived.clear()
            is_last = self._ended.is_set()
            if self._waiting:
                row = self._waiting.popleft()
                self.committed[row.step] = self._upload(row)
                if previous is not None:
                    self._drop(previous)
                previous = row
            elif is_last:
                return
            else:
                self._arrived.wait(LOOK_SECONDS)

    def _folder(self, row: NewCheckpointRow) -> Path:
        return self._state.folder.work / "checkpoints" / Path(row.folder).name

    def _drop(self, row: NewCheckpointRow) -> None:
        shutil.rmtree(self._folder(row), ignore_errors=True)

    def _upload(self, row: NewCheckpointRow) -> str:
        folder = self._folder(row)
        content = (folder / MANIFEST_NAME).read_bytes()
        manifest = Manifest.model_validate_json(content)
        register = RegisterCheckpoint(
            attempt=self._lease.attempt, manifest=manifest, manifest_sha256=row.manifest_sha256
        )
        backoff, left, most = Backoff(LONGEST_PAUSE_SECONDS), UPLOAD_ATTEMPTS, 0
        while True:
            try:
                upload = self._register(register)
                arrived = sum(upload.received.values())
                if arrived > most:  # only progress renews the attempts, so the loop ends
                    backoff, left, most = Backoff(LONGEST_PAUSE_SECONDS), UPLOAD_ATTEMPTS, arrived
                return self._upload_rest(folder, register, upload, len(content))
            except FencedError:
                raise
            except ConflictError as error:
                # The service has other bytes than expected: register again and continue there.
                left -= 1
                log.warning("upload starts again", step=row.step, error=error.message)
                if left == 0:
                    raise CheckpointError(
                        f"the checkpoint of step {row.step} could not be uploaded: {error.message}"
                    ) from error
                self._state.over.wait(backoff.next())

    def _register(self, register: RegisterCheckpoint) -> CheckpointUpload:
        return self._until_stored(
            lambda: self._client.register(self._lease.lease_id, register), "register checkpoint"
        )

    def _until_stored(self, call: Callable[[], Answer], what: str) -> Answer:
        """Repeat a call until it succeeds; `AttemptState.blocked` says if the store is the reason.

        A store that is full or away is waited for without limit.
        """

        def attempt() -> Answer:
            try:
                answer = call()
            except DARError as error:
                is_blocking = error.error_code in BLOCKING
                self._state.blocked = error.message if is_blocking else None
                raise
            self._state.blocked = None
            return answer

        return self._client.until_answered(attempt, what)

    def _upload_rest(
        self,
        folder: Path,
        register: RegisterCheckpoint,
        upload: CheckpointUpload,
        manifest_bytes: int,
    ) -> str:
        lease_id, attempt = self._lease.lease_id, self._lease.attempt
        if upload.status == "pending":
            files = list(register.manifest.files)
            if upload.part_bytes is not None:
                self._send_directly(folder, register.manifest, upload, upload.part_bytes)
                files = []
            if MANIFEST_NAME in upload.received:
                files.append(
                    ManifestFile(
                        name=MANIFEST_NAME, bytes=manifest_bytes, sha256=register.manifest_sha256
                    )
                )
            for file in files:
                self._send_file(folder, upload, file)
            fault_point("worker.uploaded")
            self._until_stored(
                lambda: self._client.commit(lease_id, upload.checkpoint_id, attempt),
                "commit checkpoint",
            )
        log.info("checkpoint committed", step=register.manifest.step, id=upload.checkpoint_id)
        return upload.checkpoint_id

    def _send_directly(
        self, folder: Path, manifest: Manifest, upload: CheckpointUpload, part_bytes: int
    ) -> None:
        """Send all files of the manifest to the store, in parts that it compares with digests.

        Raises:
            ConflictError: A file here or a part there is not as the manifest says.
        """
        digests = {}
        for file in manifest.files:
            found = digests_of(folder / file.name, part_bytes, self._state.is_given_up)
            if found.sha256 != file.sha256:
                raise ConflictError(
                    f"{file.name!r} on the worker's disk is not as its manifest says",
                    code="checksum_mismatch",
                )
            digests[file.name] = found.parts
        request = CheckpointParts(attempt=self._lease.attempt, files=digests)

        stored: set[tuple[str, int]] = set()

        def send_next() -> bool:
            # Asked again after every failure: its URLs may have expired, and some parts are stored.
            lease_id = self._lease.lease_id
            parts = self._client.direct_parts(lease_id, upload.checkpoint_id, request).parts
            if unknown := {part.name for part in parts} - digests.keys():
                raise CheckpointError(f"the service asked for {min(unknown)!r}, which is no file")
            self._store.put_all(folder, parts)
            fault_point("worker.parts_stored")
            sent = {(part.name, part.offset) for part in parts}
            is_lost = bool(sent & stored)
            stored.update(sent)
            if is_lost:  # repeated with growing pauses
                raise ServiceUnavailableError(
                    "the artifact store took parts of a checkpoint, but the service does not find "
                    "them there; DAR_S3_PUBLIC_ENDPOINT must lead to the store of DAR_S3_ENDPOINT",
                    code="storage_unavailable",
                )
            return bool(parts)

        while self._until_stored(send_next, "upload to the store"):
            pass

    def _send_file(self, folder: Path, upload: CheckpointUpload, file: ManifestFile) -> None:
        offset = upload.received.get(file.name, 0)
        with (folder / file.name).open("rb") as content:
            is_sent = False
            while offset < file.bytes or (file.bytes == 0 and not is_sent):
                content.seek(offset)
                self._send_part(upload.checkpoint_id, file.name, content.read(PART_BYTES), offset)
                offset, is_sent = content.tell(), True

    def _send_part(self, checkpoint_id: str, name: str, part: bytes, offset: int) -> None:
        lease_id, attempt = self._lease.lease_id, self._lease.attempt

        def put() -> CheckpointUpload:
            return self._client.put_part(
                lease_id, checkpoint_id, name, part, attempt=attempt, offset=offset
            )

        self._until_stored(put, f"upload {name}")
