"""The wall clock, which somebody may set, is read only where a comment of this table says why.

Durations and deadlines use a monotonic clock, or are measured between two times of the database.
"""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("dar", "service", "worker")
READS = re.compile(r"datetime\.now\(|time\.time\(|datetime\.utcnow\(|strftime\(|time_ns\(")
ALLOWED = {
    # The database's clock for SQLite. What waits by it ends when it is set back too: see
    # `service.store.transitions.has_waited` and tests/store/test_clock_jumps.py.
    "service/store/database.py": 1,
    # The estimate of a job's end, which is only shown.
    "service/api/jobs.py": 1,
    # Ages of files, in days.
    "service/storage/storage.py": 1,
    # When temporary keys of a bucket are asked for again.
    "service/storage/s3.py": 1,
    # When a backup was taken, which is only shown.
    "service/backup/backup.py": 1,
    "worker/cleanup.py": 1,
    "worker/supervisor/reward_caches.py": 1,
    "dar/rewards/cache/store.py": 1,
    # When a run began, which is only shown.
    "dar/training/script/run_lock.py": 1,
    # When a row was written, which is only shown.
    "worker/spool.py": 1,
    # Deadlines for services and workers of earlier versions, which send no seconds.
    "worker/supervisor/reward_bridge.py": 1,
    "worker/attempt/inbox.py": 1,
    "dar/rewards/probe/callbacks.py": 1,
    # The deadline that a reward service is shown, and that of an older service.
    "dar/rewards/http/async_results.py": 4,
    # A reward service and its client are on two machines: the protocol has instants.
    "dar/rewards/server/callbacks.py": 1,
    "dar/rewards/http/request.py": 3,
    "dar/rewards/http/signing.py": 1,
    # An HTTP date of another machine, and the end of a certificate.
    "dar/rewards/http/retry.py": 1,
    "dar/rewards/probe/address.py": 1,
}


def test_the_wall_clock_is_read_only_where_a_reason_is_known() -> None:
    found = Counter(
        path.relative_to(ROOT).as_posix()
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        for _ in READS.finditer(path.read_text())
    )
    assert dict(found) == ALLOWED
