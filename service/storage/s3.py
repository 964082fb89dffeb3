"""A storage in a bucket of an S3 store.

What passes through the service goes through obstore, which signs, retries and streams. What others
send and fetch themselves is in `service.storage.signing`.

An object has its final key only once its content was compared with its digest: by the store, for
what a worker sends directly, or here, before the object is written. Parts that pass through the
service are objects of their own until then, so that any replica can take the next one.
"""

import contextlib
import hashlib
import itertools
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from dar.errors import ConflictError, DARError
from dar.protocol.checkpoints import MANIFEST_NAME, ManifestFile
from service.storage.signing import Bucket, SignedTransfers
from service.storage.storage import (
    CHUNK_BYTES,
    MARKER,
    PartWriter,
    Space,
    Storage,
    StoredObject,
    Upload,
    altered,
    incomplete,
    is_old,
    not_mounted,
    offset_mismatch,
    own_manifest,
    storage_unavailable,
    unusable,
)

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential

log = structlog.get_logger()

PART_BYTES = 8 * 1024**2
"""Size of the parts in which this process writes an object, and largest one written at once."""
PARTS_AT_ONCE = 4
CONNECT = timedelta(seconds=5)
READ = timedelta(seconds=20)
REQUEST = timedelta(hours=12)
"""The longest transfer; a connection that is silent ends after `READ`."""
RETRIES = 2
RETRY_FOR = timedelta(seconds=10)
CREDENTIALS_FOR = timedelta(minutes=5)
"""How long temporary keys are used before botocore is asked again."""
SCRATCH = "dar-upload-"
"""How the names of folders of what passes through begin."""
CHECK_SECONDS = 30.0
"""How long a successful write says that the bucket can be written."""
_CODE = re.compile(r"<Code>(\w+)</Code>|\(code: (\w+)\)")
_STATUS = re.compile(r"status code: (\d{3})")


class S3Storage(Storage):
    """Objects of a bucket, below a prefix.

    Args:
        bucket: The bucket, with its keys.
        is_direct: Whether workers and users may transfer bytes without the service.
    """

    def __init__(self, bucket: Bucket, *, is_direct: bool = True) -> None:
        self.bucket = bucket
        self.where = bucket.url
        self.transfers = self.signed_downloads = SignedTransfers(bucket)
        self.direct = self.transfers if is_direct else None
        self.scratch_folder = Path(tempfile.gettempdir())
        self._writable_until = 0.0
        self._verifying: set[str] = set()
        """Keys of the checkpoints whose files a request is comparing now."""
        self._verifying_lock = threading.Lock()
        place: S3Config = {} if bucket.endpoint is None else {"endpoint": bucket.endpoint}
        self._store = S3Store(
            bucket.name,
            config=place,
            prefix=bucket.prefix or None,
            region=bucket.region,
            virtual_hosted_style_request=bucket.endpoint is None,
            checksum_algorithm="SHA256",
            credential_provider=self._credentials,
            client_options={
                "allow_http": True,
                "connect_timeout": CONNECT,
                "read_timeout": READ,
                "timeout": REQUEST,
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_FOR},
        )

    def _credentials(self) -> "S3Credential":
        access_key, secret, token, is_temporary = self.bucket.keys()
        expires_at = datetime.now(UTC) + CREDENTIALS_FOR if is_temporary else None
        return {
            "access_key_id": access_key,
            "secret_access_key": secret,
            "token": token,
            "expires_at": expires_at,
        }

    def close(self) -> None:
        self.transfers.close()

    def prepare(self) -> None:
        self._remove_abandoned_scratch()
        try:
            self.check_write()
            if self.direct is not None and not self.transfers.refuses_false_digests():
                log.warning(
                    "the store accepts content with a false digest, so uploads pass through the "
                    "service",
                    storage=self.where,
                )
                self.direct = None
        except DARError as error:
            raise unusable(error) from error

    def _remove_abandoned_scratch(self) -> None:
        """Remove what uploads through a process that was killed have left on this machine."""
        place = self.scratch_folder or Path(tempfile.gettempdir())
        for folder in place.glob(f"{SCRATCH}*"):
            with contextlib.suppress(
                OSError
            ):  # another process removes it, or it is another user's
                changed = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
                if folder.is_dir() and not folder.is_symlink() and is_old(changed):
                    shutil.rmtree(folder)

    def check_write(self) -> None:
        """Write an object that is no file.

        Raises:
            ServiceUnavailableError: The bucket cannot be written.
        """
        with self._asking():
            obstore.put(self._store, f"{MARKER}-probe", b"")
        self._writable_until = time.monotonic() + CHECK_SECONDS

    def check(self) -> str:
        if time.monotonic() < self._writable_until:
            return "ok"
        try:
            self.check_write()
        except DARError as error:
            return f"not writable: {error.message}"
        return "ok"

    def write_mark(self, owner: str, replacing: str = "") -> None:
        try:
            with self._asking():
                obstore.put(self._store, MARKER, owner.encode(), mode="create")
        except AlreadyExistsError:
            if self.mark() == replacing:
                self.put(MARKER, [owner.encode()])

    def check_mounted(self) -> None:
        if self.owner is not None and self.mark() != self.owner:
            raise not_mounted(self, 30.0)

    def space(self) -> Space | None:
        return None

    # --- objects ---

    def size(self, key: str) -> int | None:
        try:
            with self._asking():
                return obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            return None

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        # The library's prefixes end at a slash, given or not.
        with self._asking():
            pages = iter(obstore.list(self._store, prefix=prefix.rstrip("/") or None))
        while True:
            with self._asking():
                page = next(pages, None)
            if page is None:
                return
            for one in page:
                if not one["path"].startswith(MARKER):
                    yield StoredObject(one["path"], one["size"], one["last_modified"])

    def read(self, key: str, first: int = 0, end: int | None = None) -> Iterator[bytes]:
        if end is not None and end <= first:
            return iter(())
        options: dict[str, Any] = {}
        if end is not None:
            options["range"] = (first, end)
        elif first:
            options["range"] = {"offset": first}
        with self._asking():
            stream = obstore.get(self._store, key, options=cast("Any", options)).stream(
                min_chunk_size=CHUNK_BYTES
            )
        return self._chunks(iter(stream))

    def _chunks(self, stream: Iterator[Any]) -> Iterator[bytes]:
        while True:
            with self._asking():
                chunk = next(stream, None)
            if chunk is None:
                return
            yield bytes(chunk)

    def put(self, key: str, content: Iterable[bytes]) -> None:
        chunks, begin = iter(content), bytearray()
        for chunk in chunks:
            begin += chunk
            if len(begin) > PART_BYTES:
                break
        else:
            with self._asking():
                obstore.put(self._store, key, bytes(begin), use_multipart=False)
            return
        others = self.transfers.uploads(key)
        # `obstore.put` of an iterator would run it where it can ask the store for nothing itself.
        writer = obstore.open_writer(
            self._store, key, buffer_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )
        try:
            for chunk in itertools.chain([bytes(begin)], chunks):
                with self._asking():
                    writer.write(chunk)
        except BaseException:
            # Not closed, it makes no object, but its parts would stay.
            with contextlib.suppress(DARError):
                self.transfers.abort_all(key, others)
            raise
        with self._asking():
            writer.close()

    def put_file(self, key: str, path: Path) -> None:
        with self._asking():
            obstore.put(
                self._store, key, path, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
            )

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        try:
            yield folder / name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self, key: str) -> None:
        self._remove([key])

    def _remove(self, keys: list[str]) -> None:
        if keys:
            with self._asking(), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, keys)

    def remove_all(self, prefix: str) -> None:
        self._remove([entry.key for entry in self.entries(prefix)])
        self.transfers.abort_all(prefix)

    def folders(self, prefix: str, depth: int) -> Iterator[tuple[str, datetime]]:
        changed: dict[str, datetime] = {}
        found = ((entry.key, entry.modified_at) for entry in self.entries(prefix))
        for key, modified_at in itertools.chain(found, self.transfers.unfinished(prefix)):
            parts = key.removeprefix(prefix).split("/")
            if len(parts) > depth:
                folder = prefix + "/".join(parts[:depth])
                changed[folder] = max(changed.get(folder, modified_at), modified_at)
        yield from changed.items()

    # --- uploads through the service ---

    def received(self, upload: Upload) -> dict[str, int]:
        stored, staged = self._stored(upload), self._staged(upload)
        return {
            name: stored[name] if name in stored else _length(staged.get(name, {}))
            for name in upload.names
        }

    def open_part(self, upload: Upload, name: str, offset: int) -> PartWriter:
        parts = self._staged(upload).get(name, {})
        if offset == 0:
            self._remove([_part_key(upload, name, start) for start in parts])
        elif (size := _length(parts)) != offset:
            raise offset_mismatch(name, size, offset)
        return _PartObject(lambda file: self._put_part(_part_key(upload, name, offset), file))

    def _put_part(self, key: str, file: BinaryIO) -> None:
        file.seek(0)
        self.put(key, iter(lambda: file.read(CHUNK_BYTES), b""))

    def verify(self, upload: Upload) -> int:
        with self._verifying_lock:
            if upload.final in self._verifying:  # reading and writing all of it takes long
                raise storage_unavailable("another request is comparing this checkpoint's files")
            self._verifying.add(upload.final)
        try:
            return self._verify(upload)
        finally:
            self._verifying.discard(upload.final)

    def _verify(self, upload: Upload) -> int:
        stored, staged = self._stored(upload), self._staged(upload)
        for file in upload.manifest.files:
            if stored.get(file.name) != file.bytes:
                self._assemble(upload, file, staged.get(file.name, {}))
        manifest = self._manifest(upload, staged.get(MANIFEST_NAME, {}))
        found = hashlib.sha256(manifest).hexdigest()
        if found != upload.manifest_sha256:
            # Else it would count as received, and nobody could send it again.
            parts = staged.get(MANIFEST_NAME, {})
            self._remove([_part_key(upload, MANIFEST_NAME, start) for start in parts])
            self._remove([f"{upload.final}/{MANIFEST_NAME}"])
            raise altered(MANIFEST_NAME, found, upload.manifest_sha256)
        self.put(f"{upload.final}/{MANIFEST_NAME}", [manifest])
        self.remove_all(f"{upload.staging}/")
        # Of two requests that began one at once, one has lost.
        self.transfers.abort_all(f"{upload.final}/")
        return len(manifest)

    def _manifest(self, upload: Upload, staged: dict[int, int]) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return b"".join(self.read(f"{upload.final}/{MANIFEST_NAME}"))
        return b"".join(self._staged_content(upload, MANIFEST_NAME, staged)) or own_manifest(upload)

    def _assemble(self, upload: Upload, file: ManifestFile, staged: dict[int, int]) -> None:
        """Make an object of its parts, if they are the content that the manifest describes."""
        here = _length(staged)
        if here != file.bytes:
            raise incomplete(file.name, here, file.bytes)

        def verified() -> Iterator[bytes]:
            digest = hashlib.sha256()
            for chunk in self._staged_content(upload, file.name, staged):
                digest.update(chunk)
                yield chunk
            # Raised before the last part is sent, so that no object is made.
            if digest.hexdigest() != file.sha256:
                raise altered(file.name, digest.hexdigest(), file.sha256)

        try:
            self.put(f"{upload.final}/{file.name}", verified())
        except ConflictError as error:
            if error.error_code == "checksum_mismatch":
                self._remove([_part_key(upload, file.name, start) for start in staged])
            raise

    def _staged_content(self, upload: Upload, name: str, staged: dict[int, int]) -> Iterator[bytes]:
        for start in _chain(staged):
            try:
                yield from self.read(_part_key(upload, name, start))
            except FileNotFoundError:
                raise ConflictError(
                    f"another replica has taken the parts of {name!r}; ask for what was received",
                    code="upload_busy",
                ) from None

    def _stored(self, upload: Upload) -> dict[str, int]:
        place = f"{upload.final}/"
        return {entry.key.removeprefix(place): entry.bytes for entry in self.entries(place)}

    def _staged(self, upload: Upload) -> dict[str, dict[int, int]]:
        """Size of each part by its offset, by file."""
        place, found = f"{upload.staging}/", dict[str, dict[int, int]]()
        for entry in self.entries(place):
            name, _, offset = entry.key.removeprefix(place).rpartition("/")
            found.setdefault(name, {})[int(offset)] = entry.bytes
        return found

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn errors of the library into those of `dar.errors`, except a missing object."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise storage_unavailable(f"there is no bucket {self.bucket.name!r}") from None
            raise
        except AlreadyExistsError:
            raise
        except BaseError as error:
            raise self._failure(str(error)) from None

    def _failure(self, text: str) -> DARError:
        found, status = _CODE.search(text), _STATUS.search(text)
        code = "" if found is None else found[1] or found[2]
        number = 0 if status is None else int(status[1])
        return self.bucket.failure(code, number)


class _PartObject:
    """Collects a part on disk, and stores it as an object of its own."""

    def __init__(self, store: Callable[[BinaryIO], None]) -> None:
        self._store = store
        self._file = tempfile.SpooledTemporaryFile(max_size=PART_BYTES)  # noqa: SIM115 - closed by `close`

    def write(self, content: bytes, /) -> object:
        return self._file.write(content)

    def save(self) -> None:
        self._store(cast("BinaryIO", self._file))

    def close(self) -> None:
        self._file.close()


def _part_key(upload: Upload, name: str, offset: int) -> str:
    return f"{upload.staging}/{name}/{offset:020}"


def _chain(parts: dict[int, int]) -> Iterator[int]:
    """Offsets of the parts that follow each other without a gap from the start."""
    end = 0
    while end in parts:
        yield end
        if parts[end] == 0:
            return
        end += parts[end]


def _length(parts: dict[int, int]) -> int:
    return sum(parts[start] for start in _chain(parts))
