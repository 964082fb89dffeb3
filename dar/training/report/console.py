"""The output of `dar train`, all on stderr: progress, samples and a summary.

Progress is a bar on a terminal, and a line per report elsewhere.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dar.protocol.checkpoints import Manifest
from dar.protocol.events import Level
from dar.protocol.reward_stats import ComponentRequests, FailedRequest
from dar.protocol.samples import ReportedSample
from dar.protocol.worker import Phase

SHOWN_PROMPTS = 2
SHOWN_COMPLETIONS = 4
LONGEST_TEXT = 240
"""Characters of a prompt or completion in a table of samples."""
PHASES: Mapping[str, str] = {
    "starting": "starting",
    "calibrating": "choosing alpha and beta",
    "sampling": "sampling",
    "waiting_for_reward": "waiting for rewards",
    "training": "training",
    "evaluating": "evaluating",
    "checkpointing": "writing a checkpoint",
}


class TrainingConsole:
    """A sink that writes to a terminal.

    Args:
        sample_every: Steps between two tables of samples; 0: none.
        console: Target of the output; default: stderr.
    """

    def __init__(self, sample_every: int = 10, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._sample_every = sample_every
        self._next_samples = 1
        self._total = 0
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._note = ""
        self._waiting: str | None = None
        self._started = time.monotonic()
        self._first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        """The newest value of every metric."""
        self._rates: list[float] = []
        self.newest_checkpoint: Path | None = None
        self.empty_steps = 0
        """Steps without two rewards to compare, which changed nothing."""

    # --- a run, from beginning to end ------------------------------------------------------------

    def begin(self, total: int, done: int = 0) -> None:
        """Start the bar; ``done`` of ``total`` steps are done already."""
        self._total = total
        self._next_samples = done + 1
        self._started = time.monotonic()
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done, note="")
        self._progress.start()

    def end(self) -> None:
        """Remove the bar; may be called again."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    # --- as a sink -------------------------------------------------------------------------------

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting = None
        evaluated = {k.removeprefix("eval_"): v for k, v in values.items() if k.startswith("eval_")}
        if evaluated:
            self._line(f"step {step}/{self._total}  evaluation  {report_line(evaluated)}")
        if evaluated.keys() == {k.removeprefix("eval_") for k in values}:
            return
        self.last |= values
        for name, value in values.items():
            self._first.setdefault(name, value)
        if "time/tokens_per_second" in values:
            self._rates.append(values["time/tokens_per_second"])
        self._note = report_line(values)
        if self._progress is None:
            self._line(f"step {step}/{self._total}  {self._note}")
        else:
            self._progress.update(self._task, completed=step, note=self._note)

    def rewards(
        self,
        step: int,
        requests: Sequence[ComponentRequests],
        failures: Sequence[FailedRequest],
        unfinished: Mapping[str, float] | None = None,
    ) -> None:
        """Not shown: problems that matter to a user also come as events."""

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        """Show some completions of the step, every ``sample_every`` steps."""
        if not self._sample_every or step < self._next_samples:
            return
        self._next_samples = step - step % self._sample_every + self._sample_every
        self.console.print()
        self.console.print(f"[bold]samples of step {step}[/bold]")
        self.console.print(samples_table(samples))
        self.console.print()

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        self.empty_steps += (data or {}).get("kind") == "empty_step"
        colour = {"warn": "yellow", "error": "red"}.get(level, "blue")
        self.console.print(Text.assemble((f"{level}: ", colour), message), soft_wrap=True)

    def phase(self, phase: Phase, step: int, message: str | None = None) -> None:  # noqa: ARG002 - the bar shows the step
        """Show the phase in the bar; a message gets its own line."""
        if message is not None and message != self._waiting:
            self._waiting = message
            self.event("info", message)
        if self._progress is not None:
            note = self._note or f"[dim]{PHASES[phase]} …[/dim]"
            self._progress.update(self._task, note=note)

    def flush(self) -> int:
        return 0  # nothing is buffered

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:  # noqa: ARG002 - part of the Sink interface
        self.newest_checkpoint = folder
        if self._progress is None:
            self._line(f"step {step}/{self._total}  checkpoint {folder}")

    # --- the end ---------------------------------------------------------------------------------

    def summary(self, headline: str, facts: Mapping[str, str]) -> None:
        """Show the summary of a run.

        Args:
            headline: The outcome in one sentence.
            facts: Further facts beside the metrics: label and text.
        """
        self.end()
        show_facts(self.console, headline, {**self._numbers(), **facts})

    def _numbers(self) -> dict[str, str]:
        first, last = self._first.get("dar/rewards_mean"), self.last.get("dar/rewards_mean")
        shown = {}
        if first is not None and last is not None:
            shown["reward"] = f"{first:+.3f} → {last:+.3f}  (first and last report)"
        if "dar/kl_ref" in self.last:
            shown["KL"] = f"{self.last['dar/kl_ref']:.2f} nats from the reference"
        if "dar/weights_clip_fraction" in self.last:
            shown["weights"] = (
                f"{self.last['dar/weights_clip_fraction']:.1%} at the clip, "
                f"effective sample size {self.last.get('dar/effective_sample_size', math.nan):.0%}"
            )
        if self._rates:
            rate = sum(self._rates) / len(self._rates)
            shown["time"] = f"{duration(self.seconds)}, {rate:,.0f} tokens/s"
        return shown

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def show_facts(console: Console, headline: str, facts: Mapping[str, str]) -> None:
    """Print a headline, and labelled facts below it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts.items():
        table.add_row(f"  {label}", Text(text))
    console.print()
    console.print(Text(headline, style="bold"))
    console.print(table)


def report_line(values: Mapping[str, float]) -> str:
    """The most important numbers of a step, in at most 50 characters."""
    shown = []
    for name, label, form in (
        ("dar/rewards_mean", "reward", "+.3f"),
        ("dar/kl_ref", "KL", ".2f"),
        ("dar/weights_clip_fraction", "clip", ".0%"),
        ("time/tokens_per_second", "tok/s", ",.0f"),
    ):
        if name in values:
            shown.append(f"{label} {values[name]:{form}}")
    return "  ".join(shown)


def samples_table(samples: Sequence[ReportedSample]) -> Table:
    """The completions of a few prompts with rewards and weights, for any width from 60 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("reward", justify="right", no_wrap=True, style="cyan", min_width=7)
    table.add_column("weight", justify="right", no_wrap=True, min_width=6)
    table.add_column("completion", overflow="fold", ratio=1)
    for group in list(dict.fromkeys(row.group for row in samples))[:SHOWN_PROMPTS]:
        rows = [row for row in samples if row.group == group]
        table.add_row("", "", Text(f"» {plain(rows[0].prompt, from_end=True)}", style="bold"))
        for row in rows[:SHOWN_COMPLETIONS]:
            table.add_row(_number(row.reward, "+.3f"), _number(row.weight, ".2f"), _completion(row))
        if len(rows) > SHOWN_COMPLETIONS:
            table.add_row("", "", Text(f"… {len(rows) - SHOWN_COMPLETIONS} more", style="dim"))
    return table


def _completion(row: ReportedSample) -> Text:
    text = Text(plain(row.completion) or "(nothing)")
    if row.finish_reason == "length":
        text.append(" … cut", style="dim")
    if row.reward is None:
        text.append(f"  [{row.reward_message or row.reward_status}]", style="yellow")
    return text


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def plain(text: str, *, from_end: bool = False) -> str:
    """One line of printable text, cut to `LONGEST_TEXT`."""
    flat = " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())
    if len(flat) <= LONGEST_TEXT:
        return flat
    return f"…{flat[-LONGEST_TEXT:]}" if from_end else f"{flat[:LONGEST_TEXT]}…"


def duration(seconds: float) -> str:
    """Seconds in words, like ``2 h 3 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count: float) -> str:
    """Bytes in words, like ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
