"""The storage that the settings name."""

import re
from urllib.parse import urlsplit

from dar.errors import ConfigurationError
from dar.setting_kinds import web_url
from dar.settings import Settings
from service.storage.folder import FolderStorage
from service.storage.storage import Storage


def open_storage(settings: Settings) -> Storage:
    """The storage of an installation. Nothing is asked of it yet.

    Raises:
        ConfigurationError: There are no keys for it, or its endpoint or region is none.
    """
    url = settings.storage_url
    if url is None or not url.startswith("s3://"):
        return FolderStorage(settings.artifacts_path)
    # Their libraries take 0.8 s and 45 MB, and an installation with a folder needs neither.
    from service.storage.s3 import S3Storage  # noqa: PLC0415 - slow to import, see above
    from service.storage.signing import Bucket  # noqa: PLC0415 - slow to import, see above

    parts = urlsplit(url)
    secret = settings.s3_secret_access_key
    if (settings.s3_access_key_id is None) != (secret is None):
        lacks = "DAR_S3_SECRET_ACCESS_KEY" if secret is None else "DAR_S3_ACCESS_KEY_ID"
        raise ConfigurationError(
            f"{lacks} is not set, but the other half of the key to the bucket is; set or unset both"
        )
    bucket = Bucket(
        name=parts.netloc,
        prefix=parts.path.strip("/"),
        region=_region(settings),
        endpoint=_endpoint(settings),
        public_endpoint=settings.s3_public_endpoint,
        access_key_id=None
        if settings.s3_access_key_id is None
        else settings.s3_access_key_id.get_secret_value(),
        secret_access_key=None if secret is None else secret.get_secret_value(),
    )
    bucket.keys()
    return S3Storage(bucket, is_direct=settings.transfers == "direct")


def _endpoint(settings: Settings) -> str | None:
    """URL of the store. It may come from variables of AWS, so others than a bucket's do not ask."""
    if not settings.s3_endpoint:
        return None
    try:
        return web_url(settings.s3_endpoint)
    except ValueError as error:
        raise ConfigurationError(
            f"DAR_S3_ENDPOINT (else AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL) {error}"
        ) from None


def _region(settings: Settings) -> str:
    region = settings.s3_region or "us-east-1"
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise ConfigurationError(
            "DAR_S3_REGION (else AWS_REGION, else AWS_DEFAULT_REGION) must be a name like "
            "eu-central-1, of small letters, digits and hyphens"
        )
    return region
