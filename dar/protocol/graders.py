"""Graders like OpenAI's: one completion, scored at once by a registered reward endpoint."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from dar.protocol.base import FreeValue, Input, Output
from dar.protocol.reward_spec import ENDPOINT_ID


def _check_type(given: object) -> object:
    if given != "endpoint":
        raise PydanticCustomError(
            "unsupported_grader",
            "only graders of type 'endpoint' are supported; register your scorer at POST /v1/reward_endpoints and name it: "
            '{"type": "endpoint", "name": …, "endpoint": "rwe_…"}',
        )
    return given


class EndpointGrader(Input):
    """A grader that is a registered reward endpoint."""

    type: Annotated[Literal["endpoint"], BeforeValidator(_check_type)]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    """Name of its score in the answer."""
    endpoint: Annotated[str, Field(pattern=ENDPOINT_ID)]
    """The endpoint's id."""


class RunGrader(Input):
    """Body of ``POST /v1/fine_tuning/alpha/graders/run``."""

    grader: EndpointGrader
    model_sample: str
    """The completion."""
    item: FreeValue = None
    """The row: ``prompt`` (a text or a list of messages) or ``messages``, ``ground_truth`` or
    ``reference_answer``, and columns."""


class ValidateGrader(Input):
    """Body of ``POST /v1/fine_tuning/alpha/graders/validate``."""

    grader: EndpointGrader


class GraderErrors(Output):
    """OpenAI's error flags. Used here are ``unresponsive_reward_error`` and ``other_error``."""

    formula_parse_error: bool
    invalid_variable_error: bool
    model_grader_parse_error: bool
    model_grader_refusal_error: bool
    model_grader_server_error: bool
    model_grader_server_error_details: str | None
    other_error: bool
    """The answer is not a reward, or the endpoint rejects requests."""
    python_grader_runtime_error: bool
    python_grader_runtime_error_details: str | None
    python_grader_server_error: bool
    python_grader_server_error_type: str | None
    sample_parse_error: bool
    truncated_observation_error: bool
    unresponsive_reward_error: bool
    """The endpoint could not be reached, or did not answer in time."""
    endpoint_error_code: str | None
    endpoint_error_details: str | None
    """Description of the endpoint's failure."""


class GraderMetadata(Output):
    """Details of a grader run."""

    name: str
    type: Literal["endpoint"]
    execution_time: float
    """Seconds."""
    scores: dict[str, float]
    token_usage: int | None
    sampled_model_name: str | None
    status: Literal["reward", "skip", "error"]
    errors: GraderErrors


class GraderRun(Output):
    """Result of a grader run."""

    reward: float | None
    """Null: there is none; a failure is never a number."""
    sub_rewards: dict[str, float]
    """Parts of the reward."""
    model_grader_token_usage_per_model: dict[str, Any]
    metadata: GraderMetadata


class ValidGrader(Output):
    """A valid grader."""

    grader: EndpointGrader
