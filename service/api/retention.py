"""What the service deletes by itself, before it does."""

from fastapi import APIRouter

from dar.protocol.retention import RetentionItem, RetentionPreview
from service.http.auth import Administrator
from service.runtime import CurrentRuntime
from service.store import retention

router = APIRouter(prefix="/v1/retention", tags=["retention"])


@router.get("")
def preview_retention(runtime: CurrentRuntime, _user: Administrator) -> RetentionPreview:
    """What would go now by the settings' ages and sizes, over all projects. Deletes nothing."""
    settings = runtime.settings
    with runtime.database.read() as transaction:
        items = [
            RetentionItem(
                what=one.what,
                setting=one.setting,
                limit=getattr(settings, one.setting),
                rows=one.rows,
                bytes=one.bytes,
            )
            for one in retention.surpluses(transaction, settings)
        ]
        return RetentionPreview(
            object="retention.preview",
            items=items,
            deleted_jobs=len(retention.deleted_jobs(transaction)),
            samples_bytes=retention.samples_bytes(transaction),
            rows=dict(retention.row_counts(transaction)),
        )
