"""Graders in OpenAI's shape, of the one type that is run here: a registered reward endpoint."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from dar.errors import (
    DARError,
    InvalidRequestError,
    NotFoundError,
    RewardError,
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
from dar.protocol.reward_spec import RewardComponent, RewardRetry, Rewards, RewardTimeouts
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardContext, RewardSample, SampleReward
from dar.rewards.from_spec import scorer_from_spec
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.http.redaction import Redactor
from service.api.reward_endpoints import component_of
from service.http.auth import Submitter, User
from service.http.bodies import body_of, schema_of
from service.rewards import endpoints
from service.runtime import CurrentRuntime, Runtime
from service.store import reward_endpoints

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])
NAME = "endpoint"
SECONDS = 30.0
"""What a run may take, all attempts together."""
ROW_FIELDS = frozenset({"prompt", "messages", "ground_truth", "reference_answer"})
RunBody = Annotated[RunGrader, Depends(body_of(RunGrader))]
ValidateBody = Annotated[ValidateGrader, Depends(body_of(ValidateGrader))]


@router.post("/run", openapi_extra=schema_of(RunGrader))
def run_grader(runtime: CurrentRuntime, user: Submitter, body: RunBody) -> GraderRun:
    """Score one completion with a registered reward endpoint. A failure is told in ``metadata.errors``, never as a number."""
    component, access = _found(runtime, user, body.grader)
    sample = _sample(body)
    runtime.gradings.take(user.key_id)
    started = time.perf_counter()
    guard = EgressPolicy.from_settings(runtime.settings)
    rewards = Rewards(components=[component])
    failure: DARError | None = None
    scored: SampleReward | None = None
    try:
        with scorer_from_spec(
            rewards, access={NAME: access}, secret=None, guard=guard, job_id=None
        ) as scorer:
            [scored] = scorer.score([sample], RewardContext(step=1, mode="validate"))
    except RewardError as error:
        failure = error
    seconds = time.perf_counter() - started
    said = None if scored is None else scored.message
    if failure is not None:
        said = failure.message
    if said is not None:
        said = Redactor(access.secrets, access.headers.values(), access.url)(said)
    return _answer(body.grader, scored, failure, said, seconds)


@router.post("/validate", openapi_extra=schema_of(ValidateGrader))
def validate_grader(runtime: CurrentRuntime, user: Submitter, body: ValidateBody) -> ValidGrader:
    """Whether a grader can be run here; it is not asked for anything."""
    _found(runtime, user, body.grader)
    return ValidGrader(grader=body.grader)


def _found(
    runtime: Runtime, user: User, grader: EndpointGrader
) -> tuple[RewardComponent, ComponentAccess]:
    with runtime.database.read() as transaction:
        try:
            endpoint = reward_endpoints.get(transaction, user.project_id, grader.endpoint)
        except NotFoundError as error:
            raise InvalidRequestError(
                error.message, param="grader.endpoint", code="endpoint_not_found"
            ) from None
        access = endpoints.access_to(transaction, runtime.secrets, endpoint)
    component = component_of(endpoint)
    limits = component.timeouts.model_dump()
    timeouts = RewardTimeouts(**{name: min(value, SECONDS) for name, value in limits.items()})
    changes = {"timeouts": timeouts, "retry": RewardRetry(attempts=2)}
    return component.model_copy(update=changes), access


def _sample(body: RunGrader) -> RewardSample:
    item: dict[str, Any] = body.item if isinstance(body.item, dict) else {}
    messages, prompt = item.get("messages"), item.get("prompt", "")
    is_conversation = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    truth = item.get("ground_truth", item.get("reference_answer"))
    return RewardSample(
        id="s0",
        group_id="g0",
        index=0,
        prompt=None if is_conversation else str(prompt),
        messages=messages if is_conversation else None,
        completion=body.model_sample,
        finish_reason="stop",
        completion_tokens=len(body.model_sample.split()),
        columns={
            **{name: value for name, value in item.items() if name not in ROW_FIELDS},
            "ground_truth": truth,
        },
    )


def _answer(
    grader: EndpointGrader,
    scored: SampleReward | None,
    failure: DARError | None,
    said: str | None,
    seconds: float,
) -> GraderRun:
    reward = None if scored is None else scored.reward
    parts = {} if scored is None else scored.components
    is_error = failure is not None or (scored is not None and scored.status == "error")
    is_silent = isinstance(failure, RewardUnavailableError)
    errors = GraderErrors(
        formula_parse_error=False,
        invalid_variable_error=False,
        model_grader_parse_error=False,
        model_grader_refusal_error=False,
        model_grader_server_error=False,
        model_grader_server_error_details=None,
        other_error=is_error and not is_silent,
        python_grader_runtime_error=False,
        python_grader_runtime_error_details=None,
        python_grader_server_error=False,
        python_grader_server_error_type=None,
        sample_parse_error=False,
        truncated_observation_error=False,
        unresponsive_reward_error=is_silent,
        endpoint_error_code=None if failure is None else failure.error_code,
        endpoint_error_details=said,
    )
    metadata = GraderMetadata(
        name=grader.name,
        type="endpoint",
        execution_time=round(seconds, 6),
        scores={} if reward is None else {grader.name: reward},
        token_usage=None,
        sampled_model_name=None,
        status="error" if is_error else "skip" if reward is None else "reward",
        errors=errors,
    )
    return GraderRun(
        reward=reward,
        sub_rewards={
            name.partition("/")[2]: value
            for name, value in parts.items()
            if "/" in name and value is not None
        },
        model_grader_token_usage_per_model={},
        metadata=metadata,
    )
