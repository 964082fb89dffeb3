"""Rows of the suite, their kept results, and the page that shows them."""

import hashlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "chaos.md"
MARK = "<!-- make chaos writes what follows -->"


@dataclass(frozen=True, slots=True)
class Result:
    """What a row found."""

    holds: bool
    figures: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None
    """Why the row cannot run on this machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One experiment."""

    name: str
    title: str
    promise: str
    run: Callable[[], Result]


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed, in hundredths."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(len(ordered) * share) - 1)], 2)


def version() -> str:
    """A digest of the product and the suite: a result of another version is run again."""
    digest = hashlib.sha256()
    for folder in ("dar", "service", "worker", "migrations", "tests/chaos", "tests/fakes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit that this version was made from, for people; with a mark if files differ."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def kept(row: Row) -> dict[str, Any] | None:
    """The last result of a row, or None."""
    path = RESULTS / f"{row.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def run(row: Row) -> Result:
    """Run a row and keep its result."""
    start = time.monotonic()
    try:
        result = row.run()
    except (TimeoutError, RuntimeError) as error:
        result = Result(holds=False, figures={}, problems=[f"{type(error).__name__}: {error}"])
    RESULTS.mkdir(exist_ok=True)
    said = {"version": version(), "commit": commit()}
    said |= {"seconds": round(time.monotonic() - start), **asdict(result)}
    (RESULTS / f"{row.name}.json").write_text(json.dumps(said, indent=1) + "\n")
    return result


def write_page(rows: Iterable[Row]) -> None:
    """Write the results that are kept into docs/chaos.md, below its mark."""
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n\n{results_of(rows)}\n")


def results_of(rows: Iterable[Row]) -> str:
    """The table of results, and what did not hold. A result of other code says so."""
    now = version()
    lines = [
        f"The code has the version `{now}`, a digest of its files, and is that of the commit",
        f"`{commit()}`. A row that has run on other code says so.",
        "",
        "| row | promise | figures | holds |",
        "|---|---|---|---|",
    ]
    problems = []
    for row in rows:
        found = kept(row)
        if found is None:
            lines.append(f"| `{row.name}` | {row.title}: {row.promise} | not run | |")
            continue
        figures = ", ".join(f"{name} {value}" for name, value in found["figures"].items())
        shown = found["skipped"] or f"{figures}; {found['seconds']} s"
        if found["version"] != now:
            of = found.get("commit", "unknown")
            shown += f"; **run on other code**: version `{found['version']}`, commit `{of}`"
        verdict = "" if found["skipped"] else "yes" if found["holds"] else "**no**"
        lines.append(f"| `{row.name}` | {row.title}: {row.promise} | {shown} | {verdict} |")
        problems += [f"- `{row.name}`: {problem}" for problem in found["problems"][:10]]
    if problems:
        lines += ["", "What did not hold:", "", *problems]
    return "\n".join(lines)
