"""Rewards that are remembered on this host, for longer than an attempt.

They are removed when their job has succeeded, or when nobody has used them for long: jobs that failed, were cancelled or went on
elsewhere may come back.

A file is moved away before it is removed: a process that still has it open goes on with it, and no later one finds half of it.
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
"""How long a folder stays that nobody has written to; a use is written, too."""
GOING = ".going-"


@dataclass(frozen=True, slots=True)
class RewardCaches:
    """The folders of all slots of this worker's host.

    Args:
        path: Holds them.
        max_bytes: Of each.
    """

    path: Path
    max_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> "RewardCaches":
        """Those of this installation."""
        return cls(settings.work_path / "reward-caches", settings.reward_cache_bytes)

    def place_of(self, job_id: str) -> CachePlace:
        """Where a job's rewards are remembered."""
        return CachePlace(self._folder_of(job_id), self.path, self.max_bytes)

    def forget(self, job_id: str) -> None:
        """Remove what a job alone remembers."""
        self._remove(self._folder_of(job_id))

    def sweep(self) -> None:
        """Remove what was not used for long: of jobs that went on elsewhere, of endpoints that are not named any more."""
        with contextlib.suppress(OSError):  # mostly as nothing was ever remembered here
            now = datetime.now(UTC).timestamp()
            for folder in self.path.iterdir():
                if now - _changed_at(folder) > KEPT_SECONDS:
                    log.info("removing remembered rewards that nobody uses", folder=str(folder))
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
                return  # there is none, or another slot was faster
        shutil.rmtree(going, ignore_errors=True)


def _changed_at(folder: Path) -> float:
    """When anything in ``folder`` was last written, in seconds since 1970."""
    times = [0.0]
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
