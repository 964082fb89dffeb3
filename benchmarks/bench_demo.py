"""Wall time of the demo, from an empty cache and a second time."""

import json
import subprocess
import sys
import tempfile
from typing import Any

from stack import report

from dar.settings import environment


def demo(home: str, cache: str) -> dict[str, Any]:
    """Run the demo; returns what it printed."""
    command = [sys.executable, "-m", "dar.cli", "demo", "--json", "--home", home]
    result = subprocess.run(
        command, env={**environment(), "XDG_CACHE_HOME": cache}, stdout=subprocess.PIPE, check=True
    )
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def main() -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as cache:
        first, second = demo(home, cache), demo(home, cache)
    report(
        "demo",
        first_seconds=first["seconds"]["total"],
        second_seconds=second["seconds"]["total"],
        base_seconds=first["seconds"]["base"],
        job_seconds=[first["seconds"]["job"], second["seconds"]["job"]],
        reward_before=first["reward_before"],
        reward_after=[first["reward_after"], second["reward_after"]],
    )


if __name__ == "__main__":
    main()
