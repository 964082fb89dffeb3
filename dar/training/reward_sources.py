"""Everything that gives rewards in a training run: functions, services and models, as its user gave them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.protocol.reward_spec import Rewards
from dar.rewards.asynchronous import Inbox
from dar.rewards.functions import RewardFunction
from dar.rewards.scorer import RewardScorer, scorer_from_functions, scorer_from_spec
from dar.training.config import DARConfig
from dar.training.fingerprint import reward_terms
from dar.training.ranks import Ranks
from dar.training.reward_model import RewardModel, RewardModels, as_list, make_reward_models

RewardFunctions = RewardFunction | str | Sequence[RewardFunction | str] | Rewards
"""A callable of TRL's signature, the URL of a reward service, a list of these, or the rewards of a job spec."""


@dataclass(frozen=True, slots=True)
class GivenRewards:
    """What gives rewards, not yet opened; see `dar.DARTrainer` for the fields."""

    functions: RewardFunctions | None
    models: Sequence[str | Path | PreTrainedModel]
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None
    weights: Sequence[float] | None
    secret: str | None
    inbox: Inbox | None = None

    @classmethod
    def of(
        cls,
        functions: RewardFunctions | None,
        models: RewardModels | None,
        tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
        weights: Sequence[float] | None,
        secret: str | None,
        config: DARConfig,
        inbox: Inbox | None = None,
    ) -> "GivenRewards":
        """Bring together what was given.

        Raises:
            InvalidRequestError: A reward model was given twice, or beside the rewards of a job spec.
        """
        path = config.reward_model_path
        if models is not None and path is not None:
            raise InvalidRequestError(
                "reward_model and args.reward_model_path both name a reward model; give one of them, or a list as reward_model",
                param="reward_model_path",
            )
        given = as_list(path if models is None else models)
        if given and isinstance(functions, Rewards):
            raise InvalidRequestError(
                "the rewards of a job spec cannot be combined with reward_model; give functions and URLs instead",
                param="reward_model",
            )
        return cls(functions, given, tokenizers, weights, secret, inbox)

    @property
    def is_online(self) -> bool:
        """Whether there is anything that scores fresh completions; otherwise the data hold them with their rewards."""
        return self.functions is not None or bool(self.models)

    def load(self, ranks: Ranks, device: torch.device, *, is_offline: bool) -> "LoadedRewards":
        """Load the reward models, on the main process alone.

        Raises:
            InvalidRequestError: A model has not exactly one label, or the number of tokenizers is another.
            TrainingError: A model cannot be loaded.
        """
        models: list[RewardModel] = []

        def load() -> list[str]:
            models.extend(
                make_reward_models(
                    self.models, self.tokenizers, device=device, is_offline=is_offline
                )
            )
            return [model.sketch() for model in models]

        return LoadedRewards(self, models, ranks.from_main(load))


@dataclass(frozen=True, slots=True)
class LoadedRewards:
    """What gives rewards, with the models in memory."""

    given: GivenRewards
    models: Sequence[RewardModel]
    """Of the main process; the others have none."""
    sketches: Sequence[str]
    """Tell the weights of each model from others, on all processes."""

    def terms(self) -> list[dict[str, object]]:
        """Name and weight of each reward, and the weights of models: what decides their sum."""
        weights = self.given.weights
        split = None if weights is None else len(weights) - len(self.sketches)
        functions = reward_terms(
            self.given.functions, None if weights is None or split is None else weights[:split]
        )
        factors = [1.0] * len(self.sketches) if weights is None else weights[split:]
        return functions + [
            {"name": "reward_model", "weight": float(factor), "model": sketch}
            for factor, sketch in zip(factors, self.sketches, strict=False)
        ]

    def open(self, *, job_id: str | None, on_wait: Callable[[str], None]) -> RewardScorer | None:
        """The scorer of these rewards; None where there are none.

        Raises:
            ConfigurationError: The secret is malformed, the number of weights is another, or a function cannot take
                ``completions``.
            InvalidRequestError: A text is no usable URL.
        """
        given = self.given
        if not given.is_online:
            return None
        if isinstance(given.functions, Rewards):
            return scorer_from_spec(
                given.functions,
                secret=given.secret,
                job_id=job_id,
                on_wait=on_wait,
                inbox=given.inbox,
            )
        return scorer_from_functions(
            given.functions or [],
            weights=given.weights,
            sources=self.models,
            secret=given.secret,
            on_wait=on_wait,
        )
