"""Caches of rewards on this host that outlive an attempt.

A job's cache is removed when the job succeeds. Any cache is removed when it was not used for 14
days, because jobs that failed, were cancelled or moved to another host may come back.

A folder is renamed before it is removed. A process that still has its files open can continue, and
no later process finds half of them.
"""

import contextlib
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import structlog

from dar.rewards.cache.cache import CachePlace
from dar.settings import Settings

log = structlog.get_logger(__name__)

KEPT_SECONDS = 14 * 86_400.0
"""How long an unused folder stays. A use writes to the folder too."""
GOING = ".going-"


@dataclass(frozen=True, slots=True)
class RewardCaches:
    """The caches of all slots of this host.

    Args:
        path: Folder that holds them.
        max_bytes: Size limit of each.
    """

    path: Path
    max_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> "RewardCaches":
        return cls(settings.work_path / "reward-caches", settings.reward_cache_bytes)

    def place_of(self, job_id: str) -> CachePlace:
        """Where the rewards of a job are cached."""
        return CachePlace(self._folder_of(job_id), self.path, self.max_bytes)

    def forget(self, job_id: str) -> None:
        """Remove the cache of one job."""
        self._remove(self._folder_of(job_id))

    def sweep(self) -> None:
        """Remove caches that were not used for 14 days."""
        with contextlib.suppress(OSError):  # usually because no reward was ever cached here
            now = datetime.now(UTC).timestamp()
            for folder in self.path.iterdir():
                if now - _changed_at(folder) > KEPT_SECONDS:
                    log.info("removing unused cached rewards", folder=str(folder))
                    self._remove(folder)

    def _folder_of(self, job_id: str) -> Path:
        return self.path / f"job-{quote(job_id, safe='')}"

    def _remove(self, folder: Path) -> None:
        going = folder
        if not folder.name.startswith(GOING):
            going = folder.with_name(f"{GOING}{folder.name}-{time.monotonic_ns()}")
            try:
                folder.rename(going)
            except OSError:
                return  # there is none, or another slot renamed it first
        shutil.rmtree(going, ignore_errors=True)


def _changed_at(folder: Path) -> float:
    """When anything in ``folder`` was last written, in seconds since 1970."""
    times = [0.0]
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
