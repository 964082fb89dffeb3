"""Reward functions with TRL's signature ``f(prompts, completions, **columns)`` as sources."""

import inspect
import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from typing import Any, SupportsFloat, TypeGuard

from pydantic import ValidationError

from dar.errors import ConfigurationError, InvalidRequestError, RewardContractError
from dar.protocol.rewards import MAX_REWARD, SampleResult
from dar.protocol.rows import ARGUMENTS
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardResult,
    RewardSample,
    Scored,
    Skipped,
    trl_completion,
    trl_prompt,
)
from dar.rewards.threads import carrying, in_daemon_thread

TRL_ONLY = ("log_extra", "log_metric")
"""Functions that TRL's trainer passes, for its own logs."""
DATES = ("M", "m")
"""Kinds of numpy's dates and times, which numpy converts to counts of nanoseconds."""
Returned = Sequence[float | Mapping[str, Any] | None]
RewardFunction = Callable[..., Returned | Awaitable[Returned]]
"""Takes the lists ``prompts`` and ``completions``, and columns of the data set by name.

It may also take ``completion_ids``, the token ids of each completion, and ``trainer_state``, whose
``global_step`` is the number of optimizer steps that the policy had done when it sampled: in a
trainer a copy of `transformers.TrainerState`, in a reward service a `StepState`.

Prompts that are text come with text completions; conversations are lists of messages, with the
completion as ``[{"role": "assistant", "content": …}]``. None means that the reward does not apply
to a sample. Instead of a number the function may return a mapping with the fields of
``dar.reward.v1``: ``{"reward": 0.7, "components": {"correct": 1.0}, "feedback": "why"}``,
``{"skip": True, "reason": "no maths"}`` or
``{"error": {"code": "judge_timeout", "message": "…", "retryable": True}}``.
"""


@dataclass(frozen=True, slots=True)
class StepState:
    """What a reward service knows of the state of a trainer."""

    global_step: int


def _step_state(context: RewardContext) -> object:
    return StepState(context.steps_done)


class FunctionReward:
    """A Python function as a reward source.

    A plain function runs in its own thread and may block; a coroutine function runs on the event
    loop. It is called once per `score`, and its exceptions pass unchanged. A plain function gets
    all samples of a step in one call, as in TRL; a coroutine function gets the samples of each
    prompt as soon as they are sampled.

    Args:
        function: The user's function.
        name: Component name; default: the function's.
        state_of: Makes the argument ``trainer_state`` of a call; default: a `StepState`.

    Raises:
        ConfigurationError: The function cannot take ``completions``.
    """

    def __init__(
        self,
        function: RewardFunction,
        name: str | None = None,
        *,
        state_of: Callable[[RewardContext], object] | None = None,
    ) -> None:
        self._function = function
        self._state_of = state_of or _step_state
        self._name = name or function_name(function)
        self._parameters = _parameters(function)
        self._accepted = _accepted_names(self._parameters)
        self._required = required_columns(function)
        self._bound = _bound_argument(function)
        if self._accepted is not None and "completions" not in self._accepted:
            raise ConfigurationError(
                f"reward function {self._name} has no parameter named completions; "
                "its signature should be f(prompts, completions, **columns)"
            )
        self._check_parameters()

    def _check_parameters(self) -> None:
        """Check that each argument without a default can be given.

        Raises:
            ConfigurationError: One is positional-only, or an argument of TRL's trainer.
        """
        for name, parameter in self._parameters.items():
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ConfigurationError(
                    f"reward function {self._name} has the positional-only argument {name}, but "
                    "every argument is given by its name; remove the / from its signature"
                )
            if name in TRL_ONLY and parameter.kind is not parameter.VAR_KEYWORD:
                raise ConfigurationError(
                    f"reward function {self._name} needs {name}, which only TRL's trainer gives; "
                    "give the argument a default, like None"
                )

    @property
    def name(self) -> str:
        return self._name

    @property
    def takes_whole_steps(self) -> bool:
        """Whether it is called once per step: plain functions may not be thread-safe."""
        return not inspect.iscoroutinefunction(self._function)

    @property
    def needs_completion_ids(self) -> bool:
        """Whether ``completion_ids`` is a required parameter."""
        parameter = self._parameters.get("completion_ids")
        return parameter is not None and parameter.default is parameter.empty

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        """Call the function once: one result per sample, in order.

        Raises:
            InvalidRequestError: A column has the name of another argument, or one is missing.
            RewardContractError: It did not return one number, mapping or None per sample.
            ExitRequestedError: The function raised what is no Exception.
            Exception: The function raised it.
        """
        return await carrying(self._results(samples, context))

    async def _results(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        values = await self._call(self._arguments(samples, context))
        return as_results(values, len(samples), f"reward function {self._name}")

    async def _call(self, given: dict[str, Any]) -> Returned:
        returned: Returned | Awaitable[Returned]
        if inspect.iscoroutinefunction(self._function):
            returned = self._function(**given)
        else:
            returned = await in_daemon_thread(lambda: self._function(**given))
        return await returned if inspect.isawaitable(returned) else returned

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""

    def check_columns(self, names: Iterable[str]) -> None:
        """Check that the function can be called with these columns.

        Raises:
            InvalidRequestError: One has the name of another argument, or one is missing.
        """
        given = set(names)
        for name in given:
            check_column_name(name)
            if name == self._bound:
                raise InvalidRequestError(
                    f"the column {name!r} has the name of the first argument of the reward "
                    f"function {self._name}, which Python fills in; rename the column",
                    param=name,
                    code="reserved_column",
                )
        for name in self._required:
            if name not in given:
                raise InvalidRequestError(
                    f"the reward function {self._name} needs the column {name!r}, which no sample "
                    "of this call has; send it, or give the argument a default",
                    param=name,
                    code="missing_column",
                )

    def _arguments(self, samples: Sequence[RewardSample], context: RewardContext) -> dict[str, Any]:
        names = dict.fromkeys(name for sample in samples for name in sample.columns)
        self.check_columns(names)
        arguments: dict[str, Any] = {
            **{name: [sample.columns.get(name) for sample in samples] for name in names},
            "prompts": [trl_prompt(sample) for sample in samples],
            "completions": [trl_completion(sample) for sample in samples],
            "trainer_state": self._state_of(context),
        }
        ids = [sample.completion_ids for sample in samples if sample.completion_ids is not None]
        if len(ids) == len(samples):
            arguments["completion_ids"] = [list(item) for item in ids]
        if self._accepted is None:
            return arguments
        return {name: values for name, values in arguments.items() if name in self._accepted}


def check_column_name(name: str) -> None:
    """Check that a column has not the name of another argument of a reward function.

    Raises:
        InvalidRequestError: It has.
    """
    if name in ARGUMENTS:
        raise InvalidRequestError(
            f"the column {name!r} has the name of an argument that every reward function gets; "
            "send it under another name",
            param=name,
            code="reserved_column",
        )


def function_name(function: object) -> str:
    """A component name derived from the name of a callable."""
    name = getattr(function, "__name__", type(function).__name__)
    plain = "".join(ch if ch.isascii() and ch.isalnum() else "_" for ch in name.lower()).strip("_")
    return (plain if plain[:1].isalpha() else f"reward_{plain}")[:32].rstrip("_")


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        anything = inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)
        return {anything.name: anything}


def required_columns(function: RewardFunction) -> list[str]:
    """The arguments of a reward function that only a column can fill."""
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return [
        name
        for name, parameter in _parameters(function).items()
        if parameter.kind in by_name
        and parameter.default is parameter.empty
        and name not in ARGUMENTS
    ]


def _bound_argument(function: RewardFunction) -> str | None:
    """Name of the argument that holds the object of a method, mostly ``self``."""
    plain = getattr(function, "__func__", None)
    if plain is None and not inspect.isroutine(function):
        plain = getattr(type(function), "__call__", None)  # noqa: B004 - its signature is read
    names = _parameters(plain) if callable(plain) else {}
    first = next(iter(names.values()), None)
    is_keyword = first is not None and first.kind is first.POSITIONAL_OR_KEYWORD
    return first.name if first is not None and is_keyword else None


def _accepted_names(parameters: Mapping[str, inspect.Parameter]) -> frozenset[str] | None:
    """Names accepted as keywords; None: all."""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return frozenset(name for name, parameter in parameters.items() if parameter.kind in by_name)


def as_results(values: object, expected: int, source: str) -> list[RewardResult]:
    """The return value of a reward function as results: None is a skip, NaN and infinity fail.

    Args:
        values: The return value.
        expected: Number of samples.
        source: Named in messages.

    Raises:
        RewardContractError: It is not a list, has the wrong length, or an item is neither a number,
            a mapping nor None.
    """
    if not _is_listing(values):
        raise RewardContractError(
            f"{source} returned {_kind(values)}; it must return a list with one number or None per "
            "completion",
            code="contract.type",
        )
    is_whole = isinstance(values, Sized)
    found = list(values if is_whole else itertools.islice(values, expected + 1))
    if len(found) != expected:
        count = f"{len(found)}" if is_whole or len(found) < expected else f"more than {expected}"
        raise RewardContractError(
            f"{source} returned {count} reward{'' if count == '1' else 's'} for {expected} "
            "completions",
            code="contract.length",
        )
    return [_as_result(value, source) for value in found]


def _is_listing(values: object) -> TypeGuard[Iterable[object]]:
    """Whether ``values`` has one item after another; the order of a set means nothing."""
    is_one = isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set)
    is_table = hasattr(values, "columns")  # it would be read as the names of its columns
    if is_one or is_table or not isinstance(values, Iterable):
        return False
    try:
        iter(values)
    except TypeError:  # also an array or a tensor without dimensions
        return False
    return True


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of the type {type(value).__name__}"


def _as_number(value: object) -> float | None:
    """A real number as a float; None for anything else.

    As in TRL, booleans, numpy scalars, and arrays and tensors of one element are numbers; texts are
    not, also not numpy's, and dates and times neither. A complex number would lose its imaginary
    part.

    Raises:
        OverflowError: It is beyond the range of a float.
    """
    if getattr(getattr(value, "dtype", None), "kind", "") in DATES:
        return None
    try:
        read = getattr(value, "item", None)
        item = read() if callable(read) else value
        if isinstance(item, str | bytes | bytearray | complex) or not isinstance(
            item, SupportsFloat
        ):
            return None
        return float(item)
    except (TypeError, ValueError, RuntimeError):
        return None


def _as_result(value: object, source: str) -> RewardResult:
    if value is None:
        return Skipped()
    if isinstance(value, Mapping):
        return _of_mapping(value, source)
    try:
        reward = _as_number(value)
    except OverflowError:
        message = f"{source} returned a number too large for a float, beyond ±{MAX_REWARD:g}"
        return Failed("out_of_range", message, is_transient=False)
    if reward is None:
        raise RewardContractError(
            f"{source} returned {_kind(value)} as a reward; it must be a number or None",
            code="contract.type",
        )
    if not math.isfinite(reward):
        return Failed("nonfinite", f"{source} returned {reward}", is_transient=False)
    if abs(reward) > MAX_REWARD:
        message = f"{source} returned {reward:g}, beyond ±{MAX_REWARD:g}"
        return Failed("out_of_range", message, is_transient=False)
    return Scored(reward)


_FIELDS = frozenset(SampleResult.model_fields) - {"id"}
_BAD_NUMBERS = {
    "finite_number": "nonfinite",
    "less_than_equal": "out_of_range",
    "greater_than_equal": "out_of_range",
}
"""These errors fail only their sample; any other error rejects the whole call."""


def _of_mapping(value: Mapping[str, Any], source: str) -> RewardResult:
    unknown = [str(name)[:80] for name in value if name not in _FIELDS]
    if unknown:
        raise RewardContractError(
            f"{source} returned a mapping with {unknown[0]!r}; it may have {', '.join(sorted(_FIELDS))}",
            code="contract.form",
        )
    given = {name: item for name, item in value.items() if item is not None or name == "reward"}
    if "reward" in given:
        given["reward"] = _plain(given["reward"])
    if isinstance(given.get("components"), Mapping):
        given["components"] = {name: _plain(part) for name, part in given["components"].items()}
    if isinstance(given.get("error"), str):
        given["error"] = {"message": given["error"]}
    try:
        result = SampleResult.model_validate({**given, "id": ""})
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "".join(f"{one}: " for one in [".".join(map(str, first["loc"]))] if one)
        what = f"{source} returned a mapping: {place}{first['msg']}"
        if first["type"] in _BAD_NUMBERS:
            return Failed(_BAD_NUMBERS[first["type"]], what, is_transient=False)
        raise RewardContractError(what, code="contract.form") from None
    if result.error is not None:
        error = result.error
        return Failed(error.code, error.message, is_transient=error.retryable)
    if result.reward is None:
        return Skipped(result.reason)
    return Scored(result.reward, dict(result.components), result.feedback)


def _plain(value: object) -> object:
    """A real number of any type as a float; other values unchanged."""
    try:
        number = _as_number(value)
    except OverflowError:
        return sys.float_info.max  # out of range as well, and so never used
    return value if number is None else number
