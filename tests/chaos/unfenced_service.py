"""A service without the fence: whatever an attempt says is taken, also when it has lost its job.

The suite must find something wrong with it. Otherwise a row of zeros would prove nothing.
"""

import sys

from service.store import fence
from service.store.tables import AttemptRow, JobRow


def _take_all(_held: fence.Held, _number: int) -> None:
    """In the place of `service.store.fence.check_fence`."""


def _is_always_live(_attempt: AttemptRow, _job: JobRow) -> bool:
    """In the place of `service.store.fence.is_live`."""
    return True


fence.check_fence = _take_all
fence.is_live = _is_always_live

from service.__main__ import main  # noqa: E402 - modules that import the fence must find it replaced

if __name__ == "__main__":
    sys.exit(main())
