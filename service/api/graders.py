"""Graders in OpenAI's format. The only type that runs here is a registered reward endpoint."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool

from dar.errors import (
    InvalidRequestError,
    NotFoundError,
    RewardMisconfiguredError,
    RewardUnavailableError,
)
from dar.protocol.graders import (
    EndpointGrader,
    GraderErrors,
    GraderMetadata,
    GraderRun,
    RunGrader,
    ValidateGrader,
    ValidGrader,
)
from dar.protocol.reward_spec import RewardRetry, RewardTimeouts
from dar.protocol.row_values import check_values
from dar.protocol.rows import Message, Row, RowError, kind_of_value, read_messages, read_prompt
from dar.rewards.base import Failed, RewardResult, RewardSample, Scored
from dar.rewards.probe.client import ProbeClient, ProbeTarget
from service.http.auth import Submitter, User
from service.http.bodies import body_of, schema_of
from service.http.errors import may_answer
from service.rewards import endpoints
from service.runtime import CurrentRuntime, Runtime
from service.store import reward_endpoints

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])
SECONDS = 30.0
"""Time limit of a run, over all attempts."""
ROW_FIELDS = frozenset({"prompt", "messages", "ground_truth", "reference_answer"})
RunBody = Annotated[RunGrader, Depends(body_of(RunGrader))]
ValidateBody = Annotated[ValidateGrader, Depends(body_of(ValidateGrader))]


@router.post("/run", openapi_extra=schema_of(RunGrader), responses=may_answer(429))
async def run_grader(runtime: CurrentRuntime, user: Submitter, body: RunBody) -> GraderRun:
    """Score one completion with a registered reward endpoint.

    A failure is reported in ``metadata.errors``, never as a number.
    """
    sample = _sample(body)
    target = await run_in_threadpool(_target, runtime, user, body.grader)
    runtime.gradings.take(user.key_id)
    started = time.perf_counter()
    result = await _result(target, sample)
    return _answer(body.grader, result, time.perf_counter() - started)


@router.post("/validate", openapi_extra=schema_of(ValidateGrader))
def validate_grader(runtime: CurrentRuntime, user: Submitter, body: ValidateBody) -> ValidGrader:
    """Check whether a grader can be run here; no request is sent to it."""
    _target(runtime, user, body.grader)
    return ValidGrader(grader=body.grader)


def _target(runtime: Runtime, user: User, grader: EndpointGrader) -> ProbeTarget:
    with runtime.database.read() as transaction:
        try:
            endpoint = reward_endpoints.get(transaction, user.project_id, grader.endpoint)
        except NotFoundError as error:
            raise InvalidRequestError(
                error.message, param="grader.endpoint", code="endpoint_not_found"
            ) from None
        access = endpoints.access_to(transaction, runtime.secrets, endpoint)
    component = endpoints.component_of(endpoint)
    limits = component.timeouts.model_dump()
    timeouts = RewardTimeouts(**{name: min(value, SECONDS) for name, value in limits.items()})
    component = component.model_copy(update={"timeouts": timeouts})
    return endpoints.probe_target(runtime.settings, component, access)


async def _result(target: ProbeTarget, sample: RewardSample) -> RewardResult:
    try:
        async with ProbeClient(target) as client:
            call = await client.send([sample], retry=RewardRetry(attempts=2))
    except RewardMisconfiguredError as error:
        return Failed(error.error_code, error.message, is_transient=False)
    return call.results[0]


def _sample(body: RunGrader) -> RewardSample:
    """The completion with the row in ``item``.

    Raises:
        InvalidRequestError: The item is not as a row may be; no part of it is dropped or changed.
    """
    item: object = {} if body.item is None else body.item
    if not isinstance(item, dict):
        raise InvalidRequestError(
            f"item must be an object with the columns of a row, but it is {kind_of_value(item)}",
            param="item",
        )
    try:
        check_values(item)
        prompt, messages = _prompt_of(item)
        truth = _truth_of(item)
    except RowError as error:
        raise InvalidRequestError(
            f"item: {error.message}", param=f"item.{error.param}", code=error.error_code
        ) from None
    return RewardSample(
        id="s0",
        group_id="g0",
        index=0,
        prompt=prompt,
        messages=messages,
        completion=body.model_sample,
        finish_reason="stop",
        completion_tokens=len(body.model_sample.split()),
        columns={
            **{name: value for name, value in item.items() if name not in ROW_FIELDS},
            "ground_truth": truth,
        },
    )


def _prompt_of(item: Row) -> tuple[str | None, list[Message] | None]:
    """The prompt as a text or as a conversation; an empty text if the item has none.

    Raises:
        RowError: It is neither, or there are two.
    """
    messages = item.get("messages")
    if messages is not None:
        if item.get("prompt") is not None:
            raise RowError("it has prompt and messages; give one of them", "prompt")
        return None, read_messages(messages, "messages", "a list of messages")
    prompt = read_prompt(item) if "prompt" in item else ""
    return (prompt, None) if isinstance(prompt, str) else (None, prompt)


def _truth_of(item: Row) -> object:
    """``ground_truth``, which OpenAI's graders call ``reference_answer``.

    Raises:
        RowError: The item has both, and they differ.
    """
    given = [item[name] for name in ("ground_truth", "reference_answer") if name in item]
    if len(given) == 2 and given[0] != given[1]:
        raise RowError(
            "ground_truth and reference_answer are the same column, but differ; give one of them",
            "reference_answer",
        )
    return given[0] if given else None


def _answer(grader: EndpointGrader, result: RewardResult, seconds: float) -> GraderRun:
    failed = result if isinstance(result, Failed) else None
    scored = result if isinstance(result, Scored) else None
    is_unresponsive = failed is not None and failed.is_transient
    code = None if failed is None else failed.code
    errors = GraderErrors(
        formula_parse_error=False,
        invalid_variable_error=False,
        model_grader_parse_error=False,
        model_grader_refusal_error=False,
        model_grader_server_error=False,
        model_grader_server_error_details=None,
        other_error=failed is not None and not is_unresponsive,
        python_grader_runtime_error=False,
        python_grader_runtime_error_details=None,
        python_grader_server_error=False,
        python_grader_server_error_type=None,
        sample_parse_error=False,
        truncated_observation_error=False,
        unresponsive_reward_error=is_unresponsive,
        endpoint_error_code=RewardUnavailableError.code if is_unresponsive else code,
        endpoint_error_details=None if failed is None else f"{failed.message} ({failed.code})",
    )
    metadata = GraderMetadata(
        name=grader.name,
        type="endpoint",
        execution_time=round(seconds, 6),
        scores={} if scored is None else {grader.name: scored.reward},
        token_usage=None,
        sampled_model_name=None,
        status="error" if failed is not None else "skip" if scored is None else "reward",
        errors=errors,
    )
    return GraderRun(
        reward=None if scored is None else scored.reward,
        sub_rewards={} if scored is None else dict(scored.components),
        model_grader_token_usage_per_model={},
        metadata=metadata,
    )
