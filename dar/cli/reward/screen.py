"""A probe's report in a terminal."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dar.protocol.reward_probe import ProbeFinding, ProbeReport, ProbeStep

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
PASTED = ("limits", "timeouts", "batch")
UNQUOTED = ("contract.", "samples.")
"""Codes of errors whose text does not quote the answer."""
QUOTED = 300
"""Characters of an answer that are shown."""


class ReportScreen:
    """Prints a report to ``output``."""

    def __init__(self, output: TextIO) -> None:
        self._console = Console(file=output, highlight=False)
        self._status = Console(stderr=True, highlight=False)

    @contextlib.contextmanager
    def waiting(self, service: str) -> Iterator[None]:
        """Show progress on stderr, if it is a terminal."""
        if not self._status.is_terminal:
            yield
            return
        with self._status.status(Text(f"checking {service} …")):
            yield

    def show(self, service: str, report: ProbeReport) -> None:
        self._console.print(Text(f"Reward service {service}", style="bold"))
        self._console.print()
        self._console.print(_steps(report))
        self._show_answer(report)
        self._show_settings(report)
        self._console.print()
        self._console.print(_summary(report))

    def _show_answer(self, report: ProbeReport) -> None:
        """Quote the answer if the error is about its content."""
        steps = {one.step for one in report.errors if one.code.startswith(UNQUOTED)}
        shown = next((one for one in report.exchange if one.step in steps and one.response), None)
        if shown is None or shown.response is None:
            return
        status = shown.response.status
        body = shown.response.body[:QUOTED] or "(empty body, or not read)"
        self._console.print()
        self._console.print(Text(f"It answered HTTP {status}:", style="bold"))
        self._console.print(Padding(Text(_printable(body)), (0, 0, 0, 2)))

    def _show_settings(self, report: ProbeReport) -> None:
        settings = {name: report.suggested[name] for name in PASTED if name in report.suggested}
        if not settings:
            return
        self._console.print()
        self._console.print(Text("Settings that fit, for the component of a job:", style="bold"))
        self._console.print(Text(json.dumps(settings, indent=2)), soft_wrap=True)
        hint = report.suggested.get("hint")
        if isinstance(hint, str):
            self._console.print(Text(hint, style="dim"))


def _steps(report: ProbeReport) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for steps in _alike(report.steps):
        first, last = steps[0], steps[-1]
        number, name = str(first.step), first.name
        if len(steps) > 1:
            number, name = f"{first.step}-{last.step}", f"{first.name} … {last.name}"
        status = Text(first.status, style=STYLES[first.status])
        table.add_row(number, name, status, _found(first, report))
    return table


def _alike(steps: Sequence[ProbeStep]) -> list[list[ProbeStep]]:
    """Group consecutive steps that were skipped for the same reason."""
    runs: list[list[ProbeStep]] = []
    for step in steps:
        last = runs[-1][-1] if runs else None
        if last and step.status == last.status == "skipped" and step.detail == last.detail:
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def _found(step: ProbeStep, report: ProbeReport) -> Text:
    text = Text(_printable(step.detail), style="dim" if step.status == "skipped" else "")
    for findings, style in ((report.errors, STYLES["fail"]), (report.warnings, STYLES["warn"])):
        own = [finding for finding in findings if finding.step == step.step]
        for place, finding in enumerate(own):
            is_new = place == 0 or finding.advice != own[place - 1].advice
            _add_finding(text, finding, style, with_advice=is_new)
    return text


def _add_finding(text: Text, finding: ProbeFinding, style: str, *, with_advice: bool) -> None:
    if text:
        text.append("\n")
    text.append(finding.code, style)
    text.append(f": {_printable(finding.detail)}", "not dim")
    if finding.advice and with_advice:
        text.append(f"\n→ {finding.advice}", "not dim")


def _summary(report: ProbeReport) -> Text:
    warnings = len(report.warnings)
    counted = f"{warnings} warning{'s' * (warnings != 1)}"
    if not report.ok:
        return Text(f"Not usable: a job would get no rewards from it. {counted}.", STYLES["fail"])
    if report.warnings:
        return Text(f"Usable, with {counted}.", STYLES["warn"])
    return Text("Good: no errors, no warnings.", STYLES["ok"])


def _printable(text: str) -> str:
    """Replace control characters, which could move the cursor or change colours."""
    return "".join(ch if ch.isprintable() or ch == "\n" else " " for ch in text)
