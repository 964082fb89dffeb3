"""Runs the chaos suite: ``python -m chaos`` with ``tests`` on the path, or ``make chaos``."""

import argparse
import sys

from chaos import (
    buckets,
    freezes,
    histories,
    instants,
    kills,
    latencies,
    outages,
    scoreboard,
    submissions,
    training,
)

ROWS = [
    *submissions.rows(),
    *kills.rows(),
    *instants.rows(),
    *freezes.rows(),
    *outages.rows(),
    *buckets.rows(),
    *latencies.rows(),
    *training.rows(),
    *histories.rows(),
]


def say(text: str) -> None:
    """Write a line at once: a row takes minutes."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run rows and print their results. Returns 1 if one does not hold."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(names)}"
    )
    parser.add_argument("--again", action="store_true", help="also rows that this version has run")
    chosen = parser.parse_args()
    if unknown := set(chosen.rows) - set(names):
        parser.error(f"there is no row {min(unknown)!r}; the rows are {', '.join(names)}")
    failed = []
    for row in ROWS:
        if chosen.rows and row.name not in chosen.rows:
            continue
        found = scoreboard.kept(row)
        is_known = found is not None and found["version"] == scoreboard.version()
        if is_known and not chosen.again and not chosen.rows:
            say(f"{row.name}: kept from an earlier run of this version")
            if found is not None and not found["holds"] and not found["skipped"]:
                failed.append(row.name)
            continue
        say(f"{row.name}: {row.title} …")
        result = scoreboard.run(row)
        said = result.skipped or ", ".join(
            f"{key} {value}" for key, value in result.figures.items()
        )
        verdict = "skipped" if result.skipped else "holds" if result.holds else "DOES NOT HOLD"
        say("\n  - ".join([f"  {verdict}: {said}", *result.problems[:10]]))
        if not result.holds and not result.skipped:
            failed.append(row.name)
        scoreboard.write_page(ROWS)
    say(f"{len(failed)} rows do not hold: {', '.join(failed)}" if failed else "every row holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
