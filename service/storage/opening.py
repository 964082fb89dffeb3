"""The storage that the settings name."""

from urllib.parse import urlsplit

from dar.settings import Settings
from service.storage.folder import FolderStorage
from service.storage.storage import Storage


def open_storage(settings: Settings) -> Storage:
    """The storage of an installation. Nothing is asked of it yet.

    Raises:
        ConfigurationError: There are no keys for it.
    """
    url = settings.storage_url
    if url is None or not url.startswith("s3://"):
        return FolderStorage(settings.artifacts_path)
    # Their libraries take 0.8 s and 45 MB, and an installation with a folder needs neither.
    from service.storage.s3 import S3Storage  # noqa: PLC0415 - slow to import, see above
    from service.storage.signing import Bucket  # noqa: PLC0415 - slow to import, see above

    parts = urlsplit(url)
    secret = settings.s3_secret_access_key
    bucket = Bucket(
        name=parts.netloc,
        prefix=parts.path.strip("/"),
        region=settings.s3_region,
        endpoint=settings.s3_endpoint,
        public_endpoint=settings.s3_public_endpoint,
        access_key_id=None
        if settings.s3_access_key_id is None
        else settings.s3_access_key_id.get_secret_value(),
        secret_access_key=None if secret is None else secret.get_secret_value(),
    )
    bucket.keys()
    return S3Storage(bucket, is_direct=settings.transfers == "direct")
