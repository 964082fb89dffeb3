"""The reward sources of a training run: functions, services and models, as its user gave them."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from dar.errors import InvalidRequestError
from dar.protocol.reward_spec import FailurePolicy, RewardComponent, RewardLimits, Rewards
from dar.rewards.base import RewardContext, RewardObserver
from dar.rewards.builtins.registry import make_builtin
from dar.rewards.cache.cache import CachePlace
from dar.rewards.from_spec import RewardAccess, scorer_from_spec
from dar.rewards.functions import RewardFunction, function_name, required_columns
from dar.rewards.scoring.failures import FailureBudget
from dar.rewards.scoring.scorer import RewardScorer, scorer_from_functions
from dar.rewards.scoring.step_report import StepObserver
from dar.training.checkpoint.fingerprint import reward_terms
from dar.training.config.config import DARConfig
from dar.training.data.rows import ColumnUse
from dar.training.model.reward_model import RewardModel, RewardModels, as_list, make_reward_models
from dar.training.parallel.ranks import Ranks
from dar.training.report.capacity import Capacity
from dar.training.run_context import RunContext
from dar.training.step.metrics import Reporter
from dar.training.step.records import is_streamable
from dar.training.step.reward_feed import Scoring

MAX_WEIGHT = 1e6
"""Largest factor of a reward in their sum, as in a job spec."""
RewardFunctions = RewardFunction | str | Sequence[RewardFunction | str] | Rewards
"""A callable of TRL's signature, the URL of a reward service, a list of these, or the rewards of a
job spec."""


@dataclass(frozen=True, slots=True)
class GivenRewards:
    """Reward sources as they were given; see `dar.DARTrainer` for the fields."""

    functions: RewardFunctions | None
    models: Sequence[str | Path | PreTrainedModel]
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None
    weights: Sequence[float] | None
    access: RewardAccess
    names: Sequence[str] | None
    """Component names of the models; None: numbered names."""
    variables: Mapping[str, Any] | None = None
    """Variables of the chat templates of the models."""
    hub_token: str | None = field(default=None, repr=False)
    """Token of the hub, for models that are given by their hub id."""

    @classmethod
    def of(
        cls,
        functions: RewardFunctions | None,
        models: RewardModels | Mapping[str, str | Path | PreTrainedModel] | None,
        tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
        weights: Sequence[float] | None,
        access: RewardAccess,
        config: DARConfig,
    ) -> "GivenRewards":
        """Combine what was given.

        Raises:
            InvalidRequestError: A reward model was given twice, or one that the rewards of a job
                spec do not name; or there are weights and no reward, or one is too large or no
                number.
        """
        path = config.reward_model_path
        if models is not None and path is not None:
            raise InvalidRequestError(
                "reward_model and args.reward_model_path both name a reward model; give one of "
                "them, or a list as reward_model",
                param="reward_model_path",
            )
        if isinstance(functions, Rewards):
            places = _models_of_spec(functions, path if models is None else models)
            given, names = list(places.values()), list(places)
        elif isinstance(models, Mapping):
            raise InvalidRequestError(
                "reward models are named only by the rewards of a job spec; give a list as "
                "reward_model",
                param="reward_model",
            )
        else:
            given, names = as_list(path if models is None else models), None
        if weights is not None and (
            isinstance(functions, Rewards) or (functions is None and not given)
        ):
            why = "there is no reward" if functions is None else "a job spec brings its own weights"
            raise InvalidRequestError(
                f"reward_weights has no effect, as {why}; leave it out", param="reward_weights"
            )
        _check_weights(weights)
        if access.cache is None:
            here = CachePlace(Path(config.output_dir or ".") / "reward-cache")
            access = replace(access, cache=here)
        return cls(
            functions,
            given,
            tokenizers,
            weights,
            access,
            names,
            config.template_variables,
            config.hub_token,
        )

    @property
    def is_online(self) -> bool:
        """Whether completions are sampled and scored; otherwise the data hold them with rewards."""
        return self.functions is not None or bool(self.models)

    @property
    def columns(self) -> ColumnUse:
        """The columns of rows that these sources read."""
        functions = self.functions
        if isinstance(functions, Rewards):
            return _columns_of_spec(functions)
        given = [functions] if isinstance(functions, str) or callable(functions) else functions
        has_service = any(isinstance(one, str) for one in given or ())
        needed = {
            name: f"the reward function {function_name(one)}"
            for one in given or ()
            if not isinstance(one, str)
            for name in required_columns(one)
        }
        return ColumnUse(["ground_truth"] if has_service else [], needed)

    def load(self, ranks: Ranks, device: torch.device, *, is_offline: bool) -> "LoadedRewards":
        """Load the reward models, on the main process alone.

        Raises:
            InvalidRequestError: A model does not have exactly one label, or the number of
                tokenizers is wrong.
            TrainingError: A model cannot be loaded.
        """
        models: list[RewardModel] = []

        def load() -> list[str]:
            models[:] = make_reward_models(
                self.models,
                self.tokenizers,
                device=device,
                is_offline=is_offline,
                token=self.hub_token,
                names=self.names,
                variables=self.variables,
            )
            return [model.sketch() for model in models]

        return LoadedRewards(self, models, ranks.from_main(load))


@dataclass(frozen=True, slots=True)
class LoadedRewards:
    """Reward sources with their models in memory."""

    given: GivenRewards
    models: Sequence[RewardModel]
    """Models of the main process; the others have none."""
    sketches: Sequence[str]
    """Digest of each model's weights, on all processes."""

    def terms(self) -> list[dict[str, object]]:
        """Name and weight of each reward, and digests of models: what decides their sum."""
        weights = self.given.weights
        if isinstance(self.given.functions, Rewards):
            sketches = dict(zip(self.given.names or (), self.sketches, strict=True))
            return [
                term
                | ({"model": sketches[name]} if (name := str(term["name"])) in sketches else {})
                for term in reward_terms(self.given.functions, None)
            ]
        split = None if weights is None else len(weights) - len(self.sketches)
        functions = reward_terms(
            self.given.functions, None if weights is None or split is None else weights[:split]
        )
        factors = [1.0] * len(self.sketches) if weights is None else weights[split:]
        return functions + [
            {"name": "reward_model", "weight": float(factor), "model": sketch}
            for factor, sketch in zip(factors, self.sketches, strict=False)
        ]

    @property
    def failure(self) -> FailurePolicy | None:
        """The failure policy of a job spec; None for other rewards."""
        functions = self.given.functions
        return functions.failure if isinstance(functions, Rewards) else None

    def concurrency(self) -> dict[str, int]:
        """Most requests in flight, for each reward service."""
        functions = self.given.functions
        if isinstance(functions, Rewards):
            return {c.name: c.limits.concurrency for c in functions.components if c.kind == "http"}
        names = [str(term["name"]) for term in reward_terms(functions, None)]
        given = [functions] if isinstance(functions, str) or callable(functions) else functions
        return {
            name: RewardLimits().concurrency
            for name, one in zip(names, given or (), strict=False)
            if isinstance(one, str)
        }

    def open(
        self,
        *,
        job_id: str | None,
        on_wait: Callable[[str], None],
        observer: RewardObserver,
        state_of: Callable[[RewardContext], object],
    ) -> RewardScorer | None:
        """The scorer of these rewards; None where there are none.

        Args:
            job_id: Sent to reward services.
            on_wait: See `RewardScorer`.
            observer: See `RewardScorer`.
            state_of: Makes ``trainer_state`` for the reward functions.

        Raises:
            ConfigurationError: The secret is malformed, the number of weights is wrong, or a
                function cannot take ``completions``.
            InvalidRequestError: A text is not a usable URL.
        """
        given = self.given
        if not given.is_online:
            return None
        if isinstance(given.functions, Rewards):
            return scorer_from_spec(
                given.functions,
                given.access,
                job_id=job_id,
                on_wait=on_wait,
                observer=observer,
                models={model.name: model for model in self.models},
            )
        return scorer_from_functions(
            given.functions or [],
            weights=given.weights,
            sources=self.models,
            secret=given.access.secret,
            on_wait=on_wait,
            observer=observer,
            state_of=state_of,
        )


class RewardSession:
    """The scorer of a run, open while it trains, evaluates or previews; on the main process only.

    Args:
        run: The training run.
        rewards: The reward sources.
        reporter: Reports the requests to reward services.
    """

    def __init__(self, run: RunContext, rewards: LoadedRewards, reporter: Reporter) -> None:
        self.loaded = rewards
        self._run = run
        self._reporter = reporter
        self._scorer: RewardScorer | None = None
        self._closed_state: dict[str, Any] | None = None
        """The last scorer's state when it was closed. A failed step closes it, and then a
        checkpoint of the step before is written."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the scorer, unless it is open, and close it afterwards."""
        with contextlib.ExitStack() as stack:
            if self._scorer is None and self._run.ranks.is_main:
                observer = self._reporter.observer = StepObserver(
                    self._run.sink.event, self._report_wait, concurrency=self.loaded.concurrency()
                )
                scorer = self.loaded.open(
                    job_id=self._run.job_id,
                    on_wait=self._report_wait,
                    observer=observer,
                    state_of=self._state_at,
                )
                if scorer is not None:
                    stack.callback(self._report_requests)
                    self._scorer = stack.enter_context(scorer)
                    stack.callback(self._keep_state, scorer)
            yield

    def scoring(self, *, is_training: bool = False) -> Scoring:
        """How completions are scored while the session is open.

        Args:
            is_training: Whether failures count towards the budget of a training run.
        """
        trainer, policy = self._run.trainer, self.loaded.failure
        is_watched = is_training and self._run.ranks.is_main
        return Scoring(
            self._scorer,
            overlap=trainer.args.overlap,
            order=trainer.args.order,
            # DeepSpeed keeps gradients where they cannot be scaled afterwards, so the number of
            # completions that count must be known before the first pass.
            is_streamable=is_streamable(trainer.args) and not trainer.is_deepspeed_enabled,
            policy=policy,
            budget=FailureBudget(policy) if policy is not None and is_watched else None,
            capacity=Capacity(self.loaded.concurrency(), self._run.sink) if is_watched else None,
        )

    def state(self) -> dict[str, Any]:
        """What the scorer has cached, and learned about its services."""
        if self._scorer is None:
            return {"rewards": self._closed_state}
        return {"rewards": self._scorer.state(self._run.trainer.state.global_step)}

    def restore(self, state: dict[str, Any]) -> None:
        if self._scorer is not None and state.get("rewards") is not None:
            self._scorer.restore(state["rewards"])

    def _state_at(self, context: RewardContext) -> TrainerState:
        """The trainer's state, at the step at which the policy sampled.

        A copy: reward functions run in other threads, while the trainer changes its own.
        """
        state: TrainerState = copy.copy(self._run.trainer.state)
        state.global_step = context.steps_done
        state.log_history = list(state.log_history)
        return state

    def _keep_state(self, scorer: RewardScorer) -> None:
        self._closed_state = scorer.state(self._run.trainer.state.global_step)
        self._scorer = None

    def _report_requests(self) -> None:
        trainer = self._run.trainer
        step = min(trainer.state.global_step + 1, max(1, trainer.args.max_steps))
        self._reporter.report_requests(self._run.sink, step)

    def _report_wait(self, message: str) -> None:
        self._run.phase("waiting_for_reward", message)


def _columns_of_spec(rewards: Rewards) -> ColumnUse:
    services = [one for one in rewards.components if one.kind == "http"]
    further = [name for service in services for name in service.columns or ()]
    needed = {
        name: f"the component {one.name!r}" for one in rewards.components for name in _read_by(one)
    }
    return ColumnUse(["ground_truth", *further] if services else [], needed)


def _read_by(component: RewardComponent) -> Sequence[str]:
    if component.kind == "builtin":
        return list(make_builtin(component.fn or "", component.params).columns)
    return component.columns or ()


def _check_weights(weights: object) -> None:
    """Reject weights that no sum of rewards can have.

    Raises:
        InvalidRequestError: One is no number, not finite or too large.
    """
    if weights is None:
        return
    is_list = isinstance(weights, Iterable) and not isinstance(weights, str | bytes)
    for weight in weights if isinstance(weights, Iterable) else [weights]:
        is_number = is_list and not isinstance(weight, bool)
        if is_number and isinstance(weight, SupportsFloat) and abs(float(weight)) <= MAX_WEIGHT:
            continue
        raise InvalidRequestError(
            f"reward_weights has {weight!r}, but must be a list of numbers from "
            f"-{MAX_WEIGHT:,.0f} to {MAX_WEIGHT:,.0f}",
            param="reward_weights",
        )


def _models_of_spec(
    rewards: Rewards, given: RewardModels | Mapping[str, str | Path | PreTrainedModel] | None
) -> dict[str, str | Path | PreTrainedModel]:
    """Folder or hub id of each reward model of a job spec, by component name.

    Raises:
        InvalidRequestError: A model was given that the spec does not name.
    """
    named = {c.name: c.model or "" for c in rewards.components if c.kind == "hf_model"}
    places = {} if given is None else given
    if not isinstance(places, Mapping):
        raise InvalidRequestError(
            "the rewards of a job spec name their own reward models; give reward_model by "
            "component name, or functions and URLs instead of the spec",
            param="reward_model",
        )
    if unknown := sorted(places.keys() - named.keys()):
        raise InvalidRequestError(
            f"reward_model names {unknown[0]!r}, which is no component of kind hf_model; there are "
            f"{sorted(named)}",
            param="reward_model",
        )
    return {**named, **places}
