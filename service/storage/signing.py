"""Signed URLs with which workers and users transfer bytes to and from a bucket without its keys.

botocore signs them, since obstore signs neither headers nor a query: only a signed header binds a
part to its digest. The store refuses a part whose content has another SHA-256 than its URL says.
"""

import base64
import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import botocore.session
import structlog
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError

from dar.errors import ConfigurationError, DARError, InvalidRequestError
from dar.protocol.worker import FULL_CODES
from service.storage.storage import (
    MOST_REQUESTS,
    DirectTransfers,
    PartRequest,
    storage_full,
    storage_unavailable,
)

log = structlog.get_logger()

PART_BYTES = 32 * 1024**2
"""A cut connection costs one part. With 10,000 parts, the most of S3, a file has 312 GiB."""
MOST_PARTS = 10_000
URL_SECONDS = 3600
"""How long a URL is valid. One that has expired is asked for again."""
GONE = frozenset({"NoSuchUpload", "404", "NoSuchKey", "NotFound"})
REFUSED = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY})
PROBE = ".dar-storage-digest"
DIGEST_HEADER = "x-amz-checksum-sha256"


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 store, and how to reach it.

    Attributes:
        name: The bucket.
        prefix: What all keys begin with, without slashes at its ends.
        region: Its region.
        endpoint: URL of the store; None: AWS.
        public_endpoint: URL of the store for workers and users; None: the same.
        access_key_id: Key; without it or its secret, the pair that botocore finds in the
            environment, in files or on the machine.
        secret_access_key: Its secret.
    """

    name: str
    prefix: str
    region: str
    endpoint: str | None
    public_endpoint: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")

    @property
    def shown(self) -> str:
        """Its address, for messages."""
        return self.endpoint or f"AWS in {self.region}"

    def failure(self, code: str, status: int) -> DARError:
        """The error about a response of the store that is none.

        Args:
            code: S3's code of the error; empty: there is none.
            status: HTTP status; 0: there was no response, or none is known.
        """
        known = dict.fromkeys(str(one) for one in (status, code) if one)
        if not known:
            return storage_unavailable(f"{self.url} does not answer at {self.shown}")
        answer = f"{self.url} answers {' '.join(known)} at {self.shown}"
        is_full = code in FULL_CODES or status == HTTPStatus.INSUFFICIENT_STORAGE
        return storage_full(answer) if is_full else storage_unavailable(answer)

    @functools.cached_property
    def session(self) -> Any:  # noqa: ANN401 - botocore has no types
        session = botocore.session.get_session()
        if self.access_key_id and self.secret_access_key:
            session.set_credentials(self.access_key_id, self.secret_access_key)
        return session

    def keys(self) -> tuple[str, str, str | None, bool]:
        """Key, secret and token, and whether they expire.

        Raises:
            ConfigurationError: There are none.
        """
        try:
            found = self.session.get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
        except BotoCoreError as error:
            raise ConfigurationError(f"the keys of the bucket cannot be loaded: {error}") from None
        if frozen is None:
            raise ConfigurationError(
                "there are no keys for the bucket; set DAR_S3_ACCESS_KEY_ID and "
                "DAR_S3_SECRET_ACCESS_KEY, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name "
                "a file in AWS_SHARED_CREDENTIALS_FILE"
            )
        is_temporary = isinstance(found, RefreshableCredentials)
        return frozen.access_key, frozen.secret_key, frozen.token, is_temporary

    def client(self, endpoint: str | None) -> Any:  # noqa: ANN401 - botocore makes its classes at run time
        return self.session.create_client(
            "s3",
            region_name=self.region,
            endpoint_url=endpoint,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path" if endpoint else "virtual"},
                retries={"mode": "standard", "total_max_attempts": 3},
                connect_timeout=5,
                read_timeout=20,
                max_pool_connections=32,
            ),
        )


class SignedTransfers(DirectTransfers):
    """Transfers by signed URLs.

    An upload of several parts is found by its key, so nothing about it is kept elsewhere.

    Args:
        bucket: The bucket.
    """

    part_bytes = PART_BYTES

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._opened: list[Any] = []

    @functools.cached_property
    def _client(self) -> Any:  # noqa: ANN401 - see `Bucket.client`
        return self._open(self._bucket.endpoint)

    @functools.cached_property
    def _signer(self) -> Any:  # noqa: ANN401 - see `Bucket.client`
        public = self._bucket.public_endpoint
        return self._client if public is None else self._open(public)

    def _open(self, endpoint: str | None) -> Any:  # noqa: ANN401 - see `Bucket.client`
        client = self._bucket.client(endpoint)
        self._opened.append(client)
        return client

    def close(self) -> None:
        for client in self._opened:
            client.close()

    def _at(self, key: str) -> dict[str, str]:
        full = f"{self._bucket.prefix}/{key}" if self._bucket.prefix else key
        return {"Bucket": self._bucket.name, "Key": full}

    def download_url(self, key: str, filename: str) -> str:
        shown = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        return self._sign(
            "get_object",
            key,
            ResponseContentDisposition=shown,
            ResponseContentType="application/octet-stream",
        )

    def missing_parts(self, key: str, size: int, digests: Sequence[str]) -> list[PartRequest]:
        count = max(1, -(-size // PART_BYTES))
        if len(digests) != count or count > MOST_PARTS:
            raise InvalidRequestError(
                f"a file of {size:,} bytes has {count} parts of {PART_BYTES:,} bytes, of which "
                f"there can be {MOST_PARTS:,}; {len(digests)} digests were sent",
                param="files",
            )
        with self._asking():
            if self._size(key) == size:
                return []
            if count == 1:
                return [self._request("put_object", key, 0, size, digests[0])]
            return self._missing_of_several(key, size, digests)

    def _missing_of_several(self, key: str, size: int, digests: Sequence[str]) -> list[PartRequest]:
        sizes = [PART_BYTES] * (len(digests) - 1)
        sizes.append(size - sum(sizes))
        upload_id = self._upload_of(key)
        if upload_id is None:
            if self._size(key) == size:  # another request has completed it since
                return []
            upload_id = self._begin(key)
        parts = self._parts(key, upload_id)
        if any(n > len(sizes) or sizes[n - 1] != part["Size"] for n, part in parts.items()):
            self._abort(key, upload_id)
            upload_id, parts = self._begin(key), {}
        missing = [n for n in range(1, len(sizes) + 1) if n not in parts]
        if not missing:
            self._complete(key, size, upload_id, parts, digests)
        return [
            self._request(
                "upload_part",
                key,
                (n - 1) * PART_BYTES,
                sizes[n - 1],
                digests[n - 1],
                UploadId=upload_id,
                PartNumber=n,
            )
            for n in missing[:MOST_REQUESTS]
        ]

    def refuses_false_digests(self) -> bool:
        """Whether the store compares content with the digest that is sent with it.

        Raises:
            ServiceUnavailableError: It does not answer, or refuses what it must allow.
        """
        false = {"Body": b"1", "ChecksumSHA256": _base64("00" * 32)}
        with self._asking():
            upload_id = self._begin(PROBE)
            try:
                return all(
                    self._is_refused(call, **self._at(PROBE), **more, **false)
                    for call, more in (
                        (self._client.put_object, {}),
                        (self._client.upload_part, {"UploadId": upload_id, "PartNumber": 1}),
                    )
                )
            finally:
                self._abort(PROBE, upload_id)

    def _is_refused(self, call: Any, **arguments: Any) -> bool:  # noqa: ANN401 - a method of botocore
        try:
            call(**arguments)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in REFUSED:
                return True
            raise
        with contextlib.suppress(ClientError):
            self._client.delete_object(**self._at(PROBE))
        return False

    def unfinished(self, prefix: str) -> Iterator[tuple[str, datetime]]:
        """Key and start of each upload of several parts below ``prefix``."""
        for key, _, begun_at in self._uploads(prefix):
            yield key, begun_at

    def uploads(self, prefix: str) -> set[str]:
        """Ids of the uploads of several parts below ``prefix``."""
        return {upload_id for _, upload_id, _ in self._uploads(prefix)}

    def abort_all(self, prefix: str, others: Collection[str] = ()) -> None:
        """End all uploads of several parts below ``prefix`` but ``others``, by their ids."""
        for key, upload_id, _ in list(self._uploads(prefix)):
            if upload_id in others:
                continue
            with self._asking():
                self._abort(key, upload_id)

    # --- requests to the store ---

    def _sign(self, method: str, key: str, **parameters: Any) -> str:  # noqa: ANN401 - botocore's
        with self._asking():
            return str(
                self._signer.generate_presigned_url(
                    method, Params=self._at(key) | parameters, ExpiresIn=URL_SECONDS
                )
            )

    def _request(
        self,
        method: str,
        key: str,
        offset: int,
        size: int,
        digest: str,
        **parameters: Any,  # noqa: ANN401 - botocore's
    ) -> PartRequest:
        checksum = _base64(digest)
        url = self._sign(method, key, ChecksumSHA256=checksum, **parameters)
        return PartRequest(offset, size, url, {DIGEST_HEADER: checksum})

    def _size(self, key: str) -> int | None:
        try:
            return int(self._client.head_object(**self._at(key))["ContentLength"])
        except ClientError as error:
            if error.response["Error"]["Code"] in GONE:
                return None
            raise

    def _begin(self, key: str) -> str:
        begun = self._client.create_multipart_upload(**self._at(key), ChecksumAlgorithm="SHA256")
        return str(begun["UploadId"])

    def _uploads(self, prefix: str) -> Iterator[tuple[str, str, datetime]]:
        where = self._at(prefix)
        own = len(where["Key"]) - len(prefix)
        with self._asking():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=where["Bucket"], Prefix=where["Key"]
            )
            found = [one for page in pages for one in page.get("Uploads") or ()]
        for one in found:
            yield one["Key"][own:], one["UploadId"], one["Initiated"]

    def _upload_of(self, key: str) -> str | None:
        """The upload of an object. Of two that began at once, all replicas take the same one."""
        ids = [upload_id for found, upload_id, _ in self._uploads(key) if found == key]
        return min(ids, default=None)

    def _parts(self, key: str, upload_id: str) -> dict[int, Any]:
        pages = self._client.get_paginator("list_parts").paginate(
            **self._at(key), UploadId=upload_id
        )
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts") or ()}

    def _complete(
        self, key: str, size: int, upload_id: str, parts: dict[int, Any], digests: Sequence[str]
    ) -> None:
        listed = [
            {
                "PartNumber": n,
                "ETag": parts[n]["ETag"],
                "ChecksumSHA256": _base64(digest),
            }
            for n, digest in enumerate(digests, start=1)
        ]
        try:
            self._client.complete_multipart_upload(
                **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": listed}
            )
        except ClientError as error:
            # Another request may have completed it.
            if error.response["Error"]["Code"] not in GONE or self._size(key) != size:
                raise

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)
        except ClientError as error:
            if error.response["Error"]["Code"] not in GONE:
                raise

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn botocore's errors into those of `dar.errors`."""
        try:
            yield
        except ClientError as error:
            raise self._failure(error) from None
        except BotoCoreError as error:
            where = f"{self._bucket.url} does not answer at {self._bucket.shown}"
            raise storage_unavailable(f"{where}: {type(error).__name__}") from None

    def _failure(self, error: ClientError) -> DARError:
        code = str(error.response["Error"]["Code"])
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return self._bucket.failure(code, status)


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()
