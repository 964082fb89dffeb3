"""Evaluation: between steps, the policy is measured on rows of their own.

An evaluation is one large step without an update. K completions of every prompt are sampled with
the noise of step 0 (training counts from 1), so every evaluation draws the same random numbers.
They are scored, compared and weighed as in training, and all statistics span the whole data set.
Rows that hold completions and rewards are used as they are. Training continues as if there had been
no evaluation: nothing is drawn from its random generators.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from dar.errors import InvalidRequestError
from dar.protocol.metrics import EVALUATION
from dar.training.data.rows import NO_COLUMNS, ColumnUse, Rows, TokenPair, check_rows
from dar.training.run_context import RunContext
from dar.training.step.metrics import step_metrics
from dar.training.step.records import ScoredStep, StepSource

ComputeMetrics = Callable[["Predictions"], Mapping[str, float]]
"""A user's metrics of an evaluation: names without prefix, and values."""
Measure = Callable[[Sequence[TokenPair]], Tensor]
"""Log-probabilities and summed entropies ``[2, B]`` of completions under the current policy."""
LEFT_OUT = frozenset({"dar/staleness", "time/reference_seconds"})
"""Metrics without meaning in an evaluation."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """The argument of ``compute_metrics``: B completions of P prompts.

    They are in the order of the rows, and completions of a prompt are together.
    """

    prompts: list[Any]
    """``[B]``: a text or a list of messages, repeated for each completion."""
    completions: list[str]
    """``[B]`` texts without special tokens."""
    rewards: list[float | None]
    """``[B]`` sums over all reward sources; None: missing."""
    counts: list[int]
    """``[P]`` completions of each prompt; B in all."""
    columns: dict[str, list[Any]]
    """``[B]`` values of every other column of the rows; None where a row lacks it."""


def predictions(step: ScoredStep) -> Predictions:
    """An evaluated step as the argument of ``compute_metrics``."""
    of_row = [step.prompts[prompt] for prompt, _ in step.places]
    names = dict.fromkeys(name for prompt in step.prompts for name in prompt.columns)
    return Predictions(
        prompts=[prompt.messages or prompt.text for prompt in of_row],
        completions=list(step.texts),
        rewards=[reward.reward for reward in step.rewards],
        counts=list(step.counts),
        columns={name: [prompt.columns.get(name) for prompt in of_row] for name in names},
    )


def checked(values: object, taken: Collection[str] = ()) -> dict[str, float]:
    """The metrics of a user's ``compute_metrics``, without those that are not finite.

    Args:
        values: What it returned.
        taken: Names of the evaluation's own metrics.

    Raises:
        InvalidRequestError: They are not numbers by name, or two metrics have one name.
    """
    items = list(values.items()) if isinstance(values, Mapping) else [(None, None)]
    numbers: dict[str, float] = {}
    for name, value in items:
        number = _as_number(value)
        if not isinstance(name, str) or number is None:
            raise InvalidRequestError(
                f"compute_metrics must return a dictionary of numbers by name, not {values!r:.200}",
                param="compute_metrics",
            )
        plain = name.removeprefix(EVALUATION)
        if plain in taken or plain in numbers:
            raise InvalidRequestError(
                f"compute_metrics returned {name!r}, but there is a metric of this name; give it "
                "another one",
                param="compute_metrics",
            )
        numbers[plain] = number
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _as_number(value: object) -> float | None:
    """A real number, also one of numpy or a tensor of one element; None for anything else."""
    if isinstance(value, np.complexfloating | np.timedelta64):
        return None
    try:
        return float(value) if isinstance(value, Real | np.number | Tensor) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def named(rows: Rows | Mapping[str, Rows]) -> dict[str, Rows]:
    """Data sets by name; the name of a single one is empty."""
    return dict(rows) if isinstance(rows, Mapping) else {"": rows}


def _check_names(rows: Mapping[Any, Rows], *, is_needed: bool) -> None:
    if is_needed and not rows:
        raise InvalidRequestError(
            "eval_dataset is a dict without a data set, so there is nothing to evaluate on",
            param="eval_dataset",
        )
    for name in rows:
        if not isinstance(name, str):
            raise InvalidRequestError(
                f"eval_dataset has the name {name!r:.80} for a data set, but it must be a text",
                param="eval_dataset",
            )


def check_evaluation_rows(
    rows: Rows | Mapping[str, Rows] | None,
    *,
    is_replay: bool,
    is_needed: bool,
    columns: ColumnUse = NO_COLUMNS,
) -> None:
    """Reject data sets that cannot be evaluated on.

    Args:
        rows: One or several data sets.
        is_replay: Whether rows hold their completions and rewards, as in offline training.
        is_needed: Whether training evaluates on them.
        columns: What rewards read.

    Raises:
        InvalidRequestError: There is none, or one has no rows, or a row cannot be used; the message
            names data set, row and column.
    """
    if rows is None and is_needed:
        raise InvalidRequestError(
            "eval_strategy and eval_on_start need data to evaluate on: give eval_dataset",
            param="eval_dataset",
        )
    if isinstance(rows, Mapping):
        _check_names(rows, is_needed=is_needed)
    for name, one in named({} if rows is None else rows).items():
        with naming_evaluation(name):
            check_rows(one, is_replay=is_replay, columns=columns)


@contextlib.contextmanager
def naming_evaluation(name: str) -> Iterator[None]:
    """Turn an error about the training data into one about this data set.

    Raises:
        InvalidRequestError: It was raised inside.
    """
    try:
        yield
    except InvalidRequestError as error:
        if error.param != "training_file":
            raise
        which = f"eval_dataset {name!r}" if name else "eval_dataset"
        raise InvalidRequestError(
            f"{which}: {error}", param="validation_file", problems=error.problems
        ) from error


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore every random generator afterwards: rewards and ``compute_metrics`` may draw."""
    python, numpy_state = random.getstate(), np.random.get_state(legacy=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


class RunEvaluation:
    """Evaluates the policy between two steps, at most once at the same one.

    If a stop interrupts an evaluation, the checkpoint says that one is due, and the resumed run
    begins with it.

    Args:
        run: The training run.
        source_of: Makes the step source of a data set.
        opened: Keeps the rewards open.
        measure: Measures completions under the current policy.
        compute_metrics: Returns further metrics.
        is_replay: Whether rows hold their completions and rewards.
        columns: What rewards read.
    """

    def __init__(
        self,
        run: RunContext,
        *,
        source_of: Callable[[Rows], StepSource],
        opened: Callable[[], AbstractContextManager[None]],
        measure: Measure,
        compute_metrics: ComputeMetrics | None,
        is_replay: bool,
        columns: ColumnUse,
    ) -> None:
        self.is_due = False
        """Whether an evaluation was begun and did not end."""
        self._run = run
        self._source_of = source_of
        self._opened = opened
        self._measure = measure
        self._compute_metrics = compute_metrics
        self._is_replay = is_replay
        self._columns = columns
        self._sources: Mapping[str, StepSource] | None = None
        """Step sources of the current training run, by the name of the data set."""
        self._last_step = -1

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Prepare for a training run, so that unusable data fail before its first step."""
        self._last_step, self.is_due = -1, False
        try:
            is_given = self._run.trainer.eval_dataset is not None
            self._sources = self._sources_of(None) if is_given else {}
            yield
        finally:
            self._sources = None

    def evaluate(
        self, eval_dataset: Rows | Mapping[str, Rows] | None, prefix: str
    ) -> dict[str, float]:
        """Metrics of all data sets; see `dar.DARTrainer.evaluate`."""
        with contextlib.ExitStack() as stack:
            if self._sources is None:  # training keeps the processes together itself
                stack.enter_context(self._run.ranks.together())
            stack.enter_context(undisturbed(self._run.trainer.args.device))
            stack.enter_context(self._opened())
            sources = self._sources
            if sources is None or eval_dataset is not None:
                sources = self._sources_of(eval_dataset)
            return {
                "_".join(filter(None, (prefix, dataset, name))): value
                for dataset, source in sources.items()
                for name, value in self._metrics_on(source).items()
            }

    def _metrics_on(self, source: StepSource) -> dict[str, float]:
        """Metrics of the current policy on one data set, by their names in training.

        Raises:
            RewardError: No completion could be scored.
            StopRequestedError: A stop was requested meanwhile.
            TrainingError: A reward is missing and may not be, or a probability is not finite.
        """
        started = time.monotonic()
        step = source(self._run.trainer.state.global_step)
        rows = step.valid_rows
        if rows:
            measured = self._measure([step.pairs[row] for row in rows])
            step.policy_logps_B[rows], step.entropies_B[rows] = measured.to(step.weights_B.dtype)
        values = step_metrics(step)
        values |= {f"time/{name}_seconds": seconds for name, seconds in step.seconds.items()}
        values["time/step_seconds"] = time.monotonic() - started
        values = {name: value for name, value in values.items() if name not in LEFT_OUT}
        if (compute := self._compute_metrics) is not None:  # only on the main process
            values |= self._run.ranks.from_main(lambda: checked(compute(predictions(step)), values))
        return values

    def evaluate_step(
        self, evaluate: Callable[[], dict[str, float]], *, is_start: bool
    ) -> dict[str, float]:
        """Evaluate by ``evaluate``, unless it was done at this step.

        Args:
            evaluate: Evaluates.
            is_start: Whether the first step is still to come. A resumed run has evaluated before.
        """
        step = self._run.trainer.state.global_step
        is_resume = is_start and step > 0 and not self.is_due
        if is_resume or step == self._last_step:
            return {}
        self.is_due = True
        values = evaluate()
        self.is_due = False
        self._last_step = step
        return values

    def _sources_of(self, eval_dataset: Rows | Mapping[str, Rows] | None) -> dict[str, StepSource]:
        """Step sources of these data sets; default: those of the constructor."""
        rows: Any = self._run.trainer.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise InvalidRequestError("there is nothing to evaluate on: give eval_dataset")
        if eval_dataset is not None:
            check_evaluation_rows(
                rows, is_replay=self._is_replay, is_needed=True, columns=self._columns
            )
        sources = {}
        for name, one in named(rows).items():
            with naming_evaluation(name):
                sources[name] = self._source_of(one)
        return sources

    # --- when an evaluation is due -------------------------------------------------------------

    def end_step(self, step: ScoredStep) -> None:
        """Request an evaluation if a pass over the training data has ended within this step."""
        trainer = self._run.trainer
        if (
            trainer.args.eval_strategy == IntervalStrategy.EPOCH
            and self._ends_pass(step.number)
            and trainer.args.eval_delay <= step.epoch
        ):
            trainer.control.should_evaluate = True

    def _ends_pass(self, number: int) -> bool:
        trainer = self._run.trainer
        rows = len(trainer.train_dataset)
        plan = trainer.args.step_plan(rows, is_replay=self._is_replay)
        return plan.end(number) // rows > plan.end(number - 1) // rows

    def end_loop(self) -> None:
        """Withdraw the evaluation that transformers requests when a stop has ended its loop.

        transformers takes the end of its loop for the end of an epoch.
        """
        trainer = self._run.trainer
        if trainer.state.global_step < trainer.state.max_steps:
            trainer.control.should_evaluate = False

    # --- resuming ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Whether an evaluation is due."""
        return {"is_evaluation_due": self.is_due}

    def restore(self, state: dict[str, Any]) -> None:
        is_given = self._run.trainer.eval_dataset is not None
        self.is_due = is_given and state["is_evaluation_due"]
