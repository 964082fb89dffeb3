"""The scorer of a job spec, and the checks of its ``rewards`` at submission."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic_core import PydanticCustomError

from dar.errors import ConfigurationError, InvalidRequestError, Problem, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardComponent, Rewards, check_pointer
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardObserver, RewardSource
from dar.rewards.builtins.base import Builtin, BuiltinReward
from dar.rewards.builtins.registry import make_builtin
from dar.rewards.cache.cache import CachePlace, Caches, ResultCache
from dar.rewards.http.async_results import Inbox
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.http_reward import HttpReward, http_options
from dar.rewards.protocols.plain import check_template
from dar.rewards.scoring.combine import Combination, WeightedSource
from dar.rewards.scoring.scorer import RewardScorer

PATH = "method.dar.rewards"


@dataclass(frozen=True, slots=True)
class RewardAccess:
    """How the reward services of a job spec are reached; a training service sets it."""

    endpoints: Mapping[str, ComponentAccess] = field(default_factory=dict, repr=False)
    """URL and secrets of the components that name a registered endpoint."""
    guard: EgressPolicy | None = None
    """Which addresses requests may reach; None: all."""
    inbox: Inbox | None = None
    """Receives rewards that arrive later by callback."""
    cache: CachePlace | None = None
    """Where rewards are cached; None: a training run uses its own folder, and a scorer alone has
    no cache."""
    secret: str | None = field(default=None, repr=False)
    """Signs requests to services that are given by their URL; None: they are unsigned."""


def scorer_from_spec(
    rewards: Rewards,
    access: RewardAccess,
    *,
    job_id: str | None = None,
    on_wait: Callable[[str], None] | None = None,
    models: Mapping[str, RewardSource] | None = None,
    observer: RewardObserver | None = None,
) -> RewardScorer:
    """The scorer of a job.

    Args:
        rewards: The spec's ``rewards``.
        access: How its reward services are reached.
        job_id: Sent in the requests.
        on_wait: See `RewardScorer`.
        models: Loaded reward models, by component name.
        observer: See `RewardScorer`.

    Raises:
        ConfigurationError: The secret is malformed, or a reward model was not loaded.
        RewardMisconfiguredError: A registered endpoint is unknown.
        InvalidRequestError: A builtin has invalid parameters.
    """
    caches = None if access.cache is None else Caches(access.cache)
    reached = access.endpoints
    terms = [
        _term(
            component,
            _local_source(component, models or {})
            if component.kind != "http"
            else http_source(
                component,
                reached.get(component.name),
                secret=access.secret,
                guard=access.guard,
                inbox=access.inbox,
                cache=None if caches is None else caches.of(component, reached.get(component.name)),
            ),
        )
        for component in rewards.components
    ]
    is_zeroing = rewards.combine.on_partial_skip == "zero"
    combination = Combination(terms, clip=_bounds(rewards.combine.clip), is_zeroing=is_zeroing)
    return RewardScorer(
        terms, on_wait=on_wait, job_id=job_id, observer=observer, combination=combination
    )


def _term(component: RewardComponent, source: RewardSource) -> WeightedSource:
    return WeightedSource(
        source,
        component.weight,
        _bounds(component.clip),
        component.normalize,
        component.required,
        is_gate=component.role == "gate",
    )


def _local_source(component: RewardComponent, models: Mapping[str, RewardSource]) -> RewardSource:
    if component.kind == "builtin":
        return BuiltinReward(
            component.name, _builtin(component), strip_thinking=component.strip_thinking
        )
    if component.name not in models:
        raise ConfigurationError(
            f"the reward model {component.model!r} of component {component.name} was not loaded"
        )
    return models[component.name]


def http_source(
    component: RewardComponent,
    access: ComponentAccess | None,
    *,
    secret: str | None,
    guard: EgressPolicy | None,
    inbox: Inbox | None = None,
    cache: ResultCache | None = None,
) -> HttpReward:
    """The source of an http component.

    Args:
        component: From a job spec.
        access: URL and credentials of its registered endpoint; None for an inline URL.
        secret: Signs requests to an inline URL.
        guard: Which addresses may be reached; None: all.
        inbox: Receives its callbacks.
        cache: Rewards of earlier requests.

    Raises:
        ConfigurationError: A secret is malformed.
        RewardMisconfiguredError: The registered endpoint is unknown, or the URL cannot be used.
    """
    url = component.url if access is None else access.url
    if url is None:
        raise RewardMisconfiguredError(
            f"the reward endpoint {component.endpoint} of component {component.name} is not known here; it may have been deleted",
            code="config.endpoint",
        )
    options = http_options(component, access, guard=guard)
    secrets = (() if secret is None else (secret,)) if access is None else access.secrets
    return HttpReward(
        component.name, url, secrets=secrets, options=options, inbox=inbox, cache=cache
    )


def _builtin(component: RewardComponent) -> Builtin:
    return make_builtin(component.fn or "", component.params)


def _bounds(bounds: Sequence[float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (bounds[0], bounds[1])


# --- checks at submission -------------------------------------------------------------------------


def check_rewards(rewards: Rewards) -> list[Problem]:
    """Problems that the types of the spec cannot express, each with its path in a job spec."""
    problems = [
        problem
        for index, component in enumerate(rewards.components)
        for problem in _problems_of(component, f"{PATH}.components[{index}]")
    ]
    terms = [component for component in rewards.components if component.role == "term"]
    if not any(component.weight for component in terms):
        why = "every component has weight 0" if terms else "there are only gates"
        problems.append(
            Problem(
                f"{why}, so no sample would get a reward; {'give one of them another weight' if terms else 'add a term'}",
                f"{PATH}.components",
                "no_reward",
            )
        )
    return problems


def _problems_of(component: RewardComponent, path: str) -> Iterator[Problem]:
    try:
        if component.kind == "builtin":
            _builtin(component)
        elif component.protocol == "plain" and component.template is not None:
            check_template(component.template, frozenset(component.columns or ()))
    except InvalidRequestError as error:
        for problem in error.problems or [
            Problem(error.message, f"template{error.param or ''}", "invalid_template")
        ]:
            yield Problem(problem.message, f"{path}.{problem.param}", problem.code)
    try:
        check_pointer(component.pointer or "")
    except PydanticCustomError as error:
        yield Problem(error.message(), f"{path}.pointer", error.type)
    if component.cache.scope == "endpoint" and component.kind == "http" and not component.endpoint:
        yield Problem(
            "only jobs with the same registered endpoint can share cached rewards; register one, or send scope job",
            f"{path}.cache.scope",
            "unsupported_value",
        )
    if component.coerce and component.protocol == "dar.reward.v1":
        yield Problem(
            "coerce is for services of other protocols; dar.reward.v1 accepts numbers alone",
            f"{path}.coerce",
            "unsupported_value",
        )
