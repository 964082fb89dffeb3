"""Evaluation: between steps, the policy is tried on rows of their own, with the same random numbers every time.

An evaluation is one large step without an update: K completions of every prompt, sampled with the noise of step 0 (training
counts from 1), scored, compared and weighed as in training, all statistics over the whole data set. Rows that hold completions
and rewards are taken as they stand. Training goes on as if nothing had been tried: nothing is drawn from its random numbers.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from dar.errors import InvalidRequestError
from dar.protocol.metrics import EVALUATION
from dar.training.data.rows import Rows, TokenPair, check_rows
from dar.training.model.logprobs import Collator, autocast, forward_batches, logps_and_entropies
from dar.training.step.loop import StepTrainer
from dar.training.step.metrics import step_metrics
from dar.training.step.records import Mode, ScoredStep, StepSource

ComputeMetrics = Callable[["Predictions"], Mapping[str, float]]
"""What a user measures on an evaluation: names without prefix, and their values."""
Measure = Callable[[Sequence[TokenPair]], Tensor]
"""Log-probabilities and summed entropies ``[2, B]`` of completions under the policy as it is."""
LEFT_OUT = frozenset({"dar/staleness", "time/reference_seconds"})
"""What says nothing here."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What ``compute_metrics`` is given: B completions of P prompts, those of a prompt together, in the order of the rows."""

    prompts: list[Any]
    """``[B]``: a text or a list of messages, repeated for each of its completions."""
    completions: list[str]
    """``[B]`` texts without special tokens."""
    rewards: list[float | None]
    """``[B]`` sums over all reward sources; None: missing."""
    counts: list[int]
    """``[P]`` completions of each prompt; B in all."""
    columns: dict[str, list[Any]]
    """``[B]`` values of every other column of the rows, None where a row has it not."""


class Evaluator:
    """Evaluates the policy on one data set.

    Args:
        source: Gives all its completions as one step.
        measure: Measures them under the policy.
        compute_metrics: Gives further metrics.
    """

    def __init__(
        self, source: StepSource, measure: Measure, compute_metrics: ComputeMetrics | None
    ) -> None:
        self._source = source
        self._measure = measure
        self._compute_metrics = compute_metrics

    def __call__(self, steps_done: int) -> dict[str, float]:
        """Metrics of the policy as it is, by their names in training; those of ``compute_metrics`` by the names it gives.

        Raises:
            RewardError: No completion could be scored.
            StopRequestedError: A stop was requested meanwhile.
            TrainingError: A reward is missing and may not be, or the policy gives probabilities that are no numbers.
        """
        started = time.monotonic()
        step = self._source(steps_done)
        rows = step.valid_rows
        if rows:
            measured = self._measure([step.pairs[row] for row in rows])
            step.policy_logps_B[rows], step.entropies_B[rows] = measured.to(step.weights_B.dtype)
        values = step_metrics(step)
        values |= {f"time/{name}_seconds": seconds for name, seconds in step.seconds.items()}
        values["time/step_seconds"] = time.monotonic() - started
        values = {name: value for name, value in values.items() if name not in LEFT_OUT}
        if self._compute_metrics is not None:
            values |= self._compute_metrics(predictions(step))
        return values


def predictions(step: ScoredStep) -> Predictions:
    """An evaluated step as ``compute_metrics`` sees it."""
    of_row = [step.prompts[prompt] for prompt, _ in step.places]
    names = dict.fromkeys(name for prompt in step.prompts for name in prompt.columns)
    return Predictions(
        prompts=[prompt.messages or prompt.text for prompt in of_row],
        completions=list(step.texts),
        rewards=[reward.reward for reward in step.rewards],
        counts=list(step.counts),
        columns={name: [prompt.columns.get(name) for prompt in of_row] for name in names},
    )


def checked(values: object) -> dict[str, float]:
    """What a user's ``compute_metrics`` gave, without the values that are no numbers.

    Raises:
        InvalidRequestError: It is something else than numbers by name.
    """
    is_right = isinstance(values, Mapping) and all(
        isinstance(name, str) and isinstance(value, Real | np.number | Tensor)
        for name, value in values.items()
    )
    if not is_right:
        raise InvalidRequestError(
            f"compute_metrics must return a dictionary of numbers by name, not {values!r:.200}",
            param="compute_metrics",
        )
    assert isinstance(values, Mapping)
    numbers = {name.removeprefix(EVALUATION): float(value) for name, value in values.items()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def named(rows: Rows | Mapping[str, Rows]) -> dict[str, Rows]:
    """Data sets by name; the name of a single one is empty."""
    return dict(rows) if isinstance(rows, Mapping) else {"": rows}


def check_evaluation_rows(
    rows: Rows | Mapping[str, Rows] | None, *, is_replay: bool, is_needed: bool
) -> None:
    """Refuse data sets that could not be evaluated on.

    Args:
        rows: One or several data sets.
        is_replay: Whether rows hold their completions and rewards, as in offline training.
        is_needed: Whether training is to evaluate on them.

    Raises:
        InvalidRequestError: There is none, or one has no rows, or a row cannot be used; the message names data set, row and
            column.
    """
    if rows is None and is_needed:
        raise InvalidRequestError(
            "eval_strategy and eval_on_start need data to evaluate on: give eval_dataset",
            param="eval_dataset",
        )
    for name, one in named({} if rows is None else rows).items():
        with naming_evaluation(name):
            check_rows(one, is_replay=is_replay)


@contextlib.contextmanager
def naming_evaluation(name: str) -> Iterator[None]:
    """Say that it is the evaluation's data that are wrong.

    Raises:
        InvalidRequestError: For one about the training data inside.
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


@torch.no_grad()
def measured(
    model: nn.Module,
    pairs: Sequence[TokenPair],
    *,
    collate: Collator,
    vocabulary: int,
    half: torch.dtype | None,
    before_each: Callable[[], None],
) -> Tensor:
    """Log-probabilities and summed entropies of completions, without gradients and without dropout.

    Args:
        model: A causal language model; it is left in evaluation mode.
        pairs: B sequences.
        collate: Lays out the sequences of a forward pass.
        vocabulary: Size of the model's vocabulary.
        half: What forward passes are cast to; None: nothing.
        before_each: Called before each forward pass; may raise to stop.

    Returns:
        ``[2, B]`` on the CPU, in nats; float64 for a float64 model, else float32.
    """
    model.eval()
    parameter = next(model.parameters())
    values = torch.zeros(2, len(pairs), dtype=torch.promote_types(parameter.dtype, torch.float32))
    for rows in forward_batches(pairs, vocabulary):
        before_each()
        batch = collate([pairs[i] for i in rows])
        batch = {name: tensor.to(parameter.device) for name, tensor in batch.items()}
        with autocast(parameter.device, half):
            values[:, rows] = torch.stack(logps_and_entropies(model, batch)).cpu()
    return values


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put every random generator back afterwards: a reward function may draw, and ``compute_metrics`` too."""
    python, numpy_state = random.getstate(), np.random.get_state(legacy=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


class EvaluatingTrainer(StepTrainer):
    """Tries the policy on ``eval_dataset`` between two steps, never twice at the same one.

    An evaluation that a stop breaks off is made up for at the beginning of the resumed run: the checkpoint says so.
    """

    _compute: ComputeMetrics | None = None
    _evaluators: Mapping[str, Evaluator] | None = None
    """Of the training run under way, by the name of the data set."""
    _evaluated_step: int = -1
    _is_evaluation_due: bool = False

    # Given by `dar.DARTrainer`:

    @property
    def _is_replay(self) -> bool:
        raise NotImplementedError

    def _source_of(self, rows: Rows, mode: Mode) -> StepSource:
        raise NotImplementedError

    def _scoring(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _measured(self, pairs: Sequence[TokenPair]) -> Tensor:
        raise NotImplementedError

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ANN401 - the signature of transformers
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = EVALUATION.removesuffix("_"),
    ) -> dict[str, float]:
        """Sample completions of every prompt of the evaluation data, score them, and measure; nothing is trained.

        Every evaluation draws the same random numbers: those of step 0, so that a prompt's depend on the seed, its row and the
        completion's number alone. Rewards get ``mode="eval"``. Data sets that hold completions and rewards are taken as they are.

        Args:
            eval_dataset: Rows, or several data sets by name, whose name then stands in the names of their metrics; default: those
                of the constructor.
            ignore_keys: Not used; a model's outputs are no metrics here.
            metric_key_prefix: Stands before the name of every metric, with a ``_``.

        Returns:
            What training reports of a step (``eval_dar/rewards_mean``, …), and what ``compute_metrics`` gives, for the whole data
            set. The sink, ``on_log`` and ``on_evaluate`` of the callbacks are told the same; values that are no numbers are left
            out.

        Raises:
            InvalidRequestError: There are no evaluation data, or a row cannot be used.
            RewardError: No completion could be scored.
            StopRequestedError: A stop was requested meanwhile.
            TrainingError: A reward is missing and may not be, or the policy gives probabilities that are no numbers.
        """
        if ignore_keys:
            raise InvalidRequestError("a model's outputs are no metrics here", param="ignore_keys")
        with contextlib.ExitStack() as stack:
            if self._evaluators is None:  # training keeps the processes together itself
                stack.enter_context(self.ranks.together())
            stack.enter_context(undisturbed(self.args.device))
            stack.enter_context(self._scoring())
            evaluators = self._evaluators
            if evaluators is None or eval_dataset is not None:
                evaluators = self._evaluators_of(eval_dataset)
            values = {
                "_".join(filter(None, (metric_key_prefix, dataset, name))): value
                for dataset, evaluator in evaluators.items()
                for name, value in evaluator(self.state.global_step).items()
            }
        self.log_evaluation(values)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, values
        )
        return values

    def _evaluators_of(
        self, eval_dataset: Rows | Mapping[str, Rows] | None
    ) -> dict[str, Evaluator]:
        """Evaluators of these data sets, or else of the constructor's."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise InvalidRequestError("there is nothing to evaluate on: give eval_dataset")
        if eval_dataset is not None:
            check_evaluation_rows(rows, is_replay=self._is_replay, is_needed=True)
        evaluators = {}
        for name, one in named(rows).items():
            with naming_evaluation(name):
                source = self._source_of(one, "eval")
            evaluators[name] = Evaluator(source, self._measured, self._computing())
        return evaluators

    def _computing(self) -> ComputeMetrics | None:
        """The user's ``compute_metrics``, asked by the main process alone."""
        compute = self._compute
        if compute is None:
            return None
        return lambda found: self.ranks.from_main(lambda: checked(compute(found)))

    def _evaluate(
        self,
        trial: Any,  # noqa: ANN401, ARG002 - as transformers
        ignore_keys_for_eval: list[str] | None,
        skip_scheduler: bool = False,
    ) -> dict[str, float]:
        """Called by transformers where ``control.should_evaluate`` is set, and with ``skip_scheduler`` before the first step."""
        step = self.state.global_step
        is_resume = skip_scheduler and step > 0 and not self._is_evaluation_due
        if is_resume or step == self._evaluated_step:
            return {}
        self._is_evaluation_due = True
        values = self.evaluate(ignore_keys=ignore_keys_for_eval)
        self._is_evaluation_due = False
        self._evaluated_step = step
        return values

    # --- when ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Make everything ready before the first step, so that data which cannot be evaluated on fail there."""
        self._evaluated_step, self._is_evaluation_due = -1, False
        try:
            self._evaluators = {} if self.eval_dataset is None else self._evaluators_of(None)
            yield
        finally:
            self._evaluators = None

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401 - as transformers
        num_batches: int,
        device: torch.device,
    ) -> tuple[list[Any], None]:
        """Make up for what a stop broke off, then begin the step."""
        if self._is_evaluation_due:
            self._evaluate(None, None)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _end_step(self, step: ScoredStep, grad_norm: float, learning_rate: float) -> None:
        super()._end_step(step, grad_norm, learning_rate)
        if (
            self.args.eval_strategy == IntervalStrategy.EPOCH
            and self._ends_pass(step.number)
            and self.args.eval_delay <= step.epoch
        ):
            self.control.should_evaluate = True

    def _ends_pass(self, number: int) -> bool:
        """Whether a pass over the training data ends within step ``number``."""
        count, rows = self.args.prompts_per_step, len(self.train_dataset)
        return number * count // rows > (number - 1) * count // rows

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as transformers
        is_within_step = self._step is not None
        if not is_within_step and self.state.global_step < self.state.max_steps:
            # transformers takes the end of its loop for that of an epoch, and a stop may have ended it
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # --- what a resume needs of it ---------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """That of training, and whether an evaluation is still due."""
        return {**super().own_state(), "is_evaluation_due": self._is_evaluation_due}

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        super().restore_own_state(state)
        self._is_evaluation_due = self.eval_dataset is not None and state["is_evaluation_due"]

    def catch_up(self, state: dict[str, Any]) -> None:
        """Make up for what a stop broke off at the last step."""
        self.restore_own_state(state)
        if self._is_evaluation_due:
            self._evaluate(None, None)
