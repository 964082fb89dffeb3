"""Every failure a user can meet, as one tree.

A class fixes the ``code``, the HTTP status and whether trying again can help. The service renders an error with
`DARError.body`, and the SDK raises the same class again from that body (`error_from_body`). A message says what is wrong,
where, and what to do.

Add a class only where a caller would act on it differently; otherwise raise the nearest one with a better message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an input.

    Attributes:
        message: What is wrong and what to do about it.
        param: Path of the parameter, like ``method.dar.hyperparameters.alpha``.
        code: Machine-readable kind, like ``missing`` or ``finite_number``.
        row: Row number in an uploaded file, counted from 1; None outside files.
    """

    message: str
    param: str | None = None
    code: str = "invalid"
    row: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The wire form; ``row`` is present only where there is one."""
        body: dict[str, Any] = {"param": self.param, "message": self.message, "code": self.code}
        return body if self.row is None else body | {"row": self.row}


class DARError(Exception):
    """Root of the tree: something went wrong that nobody could have prevented by other input.

    Args:
        message: What is wrong, where, and what to do.
        param: Path of the offending parameter, if there is one.
        code: Replaces the class's own code where a finer one is known.
        problems: All that is wrong, when there is more than one thing.
        request_id: Id of the request that failed, to be quoted to the operator.
        retry_after_seconds: When trying again makes sense, for retryable errors.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        problems: Sequence[Problem] = (),
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.problems = tuple(problems)
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The error as every route answers it: ``{"error": {...}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.error_code,
                "errors": [problem.as_json() for problem in self.problems],
                "request_id": request_id or self.request_id,
            }
        }


class InvalidRequestError(DARError):
    """The request is malformed or asks for what cannot be."""

    code = "invalid_request"
    status = 400
    type = "invalid_request_error"
    retryable = False


class ModelNotFoundError(InvalidRequestError):
    """``model`` names neither a folder, nor a fine-tuned model, nor an allowed hub id."""

    code = "model_not_found"


class AuthenticationError(DARError):
    """No API key was sent, or it is unknown, expired or revoked."""

    code = "invalid_api_key"
    status = 401
    type = "authentication_error"
    retryable = False


class PermissionDeniedError(DARError):
    """The key is valid but its scopes do not cover this request."""

    code = "insufficient_scope"
    status = 403
    type = "permission_error"
    retryable = False


class NotFoundError(DARError):
    """There is no such route or object, or it belongs to somebody else."""

    code = "not_found"
    status = 404
    type = "not_found_error"
    retryable = False


class MethodNotAllowedError(DARError):
    """The route exists, but not with this HTTP method."""

    code = "method_not_allowed"
    status = 405
    type = "invalid_request_error"
    retryable = False


class ConflictError(DARError):
    """The object's state does not allow this."""

    code = "invalid_state"
    status = 409
    type = "conflict_error"
    retryable = False


class IdempotencyMismatchError(ConflictError):
    """An ``Idempotency-Key`` was used again with another body."""

    code = "idempotency_mismatch"


class FencedError(ConflictError):
    """A late attempt tried to write: its lease has passed to a successor, so it must stop."""

    code = "fenced"


class GoneError(DARError):
    """It was there, and nobody waits for it any more: too late, or the job has ended."""

    code = "gone"
    status = 410
    type = "invalid_request_error"
    retryable = False


class InvalidResultError(DARError):
    """What a reward service posted to a callback breaks the contract; it may be corrected and sent again."""

    code = "invalid_result"
    status = 422
    type = "invalid_request_error"
    retryable = False


class PayloadTooLargeError(DARError):
    """The body is over the limit."""

    code = "payload_too_large"
    status = 413
    type = "invalid_request_error"
    retryable = False


class UnsupportedMediaTypeError(DARError):
    """The body is in a format or encoding that this route does not read."""

    code = "unsupported_media_type"
    status = 415
    type = "invalid_request_error"
    retryable = False


class RangeNotSatisfiableError(DARError):
    """The requested byte range lies outside the file."""

    code = "range_not_satisfiable"
    status = 416
    type = "invalid_request_error"
    retryable = False


class RateLimitError(DARError):
    """Too many requests in too short a time."""

    code = "rate_limit_exceeded"
    status = 429
    type = "rate_limit_error"


class ServiceUnavailableError(DARError):
    """The service cannot answer now; the message says when to come again."""

    code = "service_unavailable"
    status = 503


class ServiceConnectionError(DARError):
    """The client could not reach the service at all. Never sent over the wire."""

    code = "connection_failed"
    status = 503


class ConfigurationError(DARError):
    """A setting is missing or contradicts another; said at start-up."""

    code = "configuration_error"
    status = 500
    retryable = False


class SecretUnreadableError(DARError):
    """A stored secret cannot be decrypted, or was stored for another endpoint."""

    code = "secret_unreadable"
    retryable = False


class RewardError(DARError):
    """A reward source could not give rewards; the message names the source and its last answer."""

    code = "reward_error"


class RewardUnavailableError(RewardError):
    """The reward service is down, overloaded or too slow: the same request may succeed later."""

    code = "reward_unavailable"
    status = 503


class RewardMisconfiguredError(RewardError):
    """The reward service refuses us for good: wrong path, wrong credentials, a redirect, a bad certificate."""

    code = "reward_misconfigured"
    status = 400
    type = "invalid_request_error"
    retryable = False


class RewardContractError(RewardError):
    """The reward service answered, and the answer breaks the contract of ``dar.reward.v1``."""

    code = "reward_contract"
    status = 400
    type = "invalid_request_error"
    retryable = False


class RewardBudgetError(RewardError):
    """Too many completions got no reward, or the reward service went away in mid-training: more than the job's policy allows.

    Args:
        message: See `DARError`.
        errors: Failed samples by kind of failure.
        sample_ids: Some of them.
        is_outage: Whether every failure was of a kind that passes, so that the service may simply come back.
        **details: See `DARError`.
    """

    code = "reward_budget_exhausted"
    status = 400
    type = "invalid_request_error"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        errors: Mapping[str, int] | None = None,
        sample_ids: Sequence[str] = (),
        is_outage: bool = False,
        **details: Any,  # noqa: ANN401 - what `DARError` takes, whatever its type
    ) -> None:
        super().__init__(message, **details)
        self.errors = dict(errors or {})
        self.sample_ids = tuple(sample_ids)
        self.is_outage = is_outage


class TrainingError(DARError):
    """Training cannot go on with this spec: bad data, an unloadable model, a loss that is no number."""

    code = "training_failed"
    status = 400
    type = "invalid_request_error"
    retryable = False


class CheckpointError(TrainingError):
    """A checkpoint is incomplete, altered or from another job."""

    code = "checkpoint_invalid"


def _classes(root: type[DARError]) -> list[type[DARError]]:
    return [root, *(sub for child in root.__subclasses__() for sub in _classes(child))]


def error_from_body(status: int, body: object, *, request_id: str | None = None) -> DARError:
    """The error that the service rendered, as the class it was raised with.

    A code this version does not know falls back to the class of the same status, then to `DARError`; nothing of what
    the service said is lost.
    """
    error: Mapping[str, Any] = {}
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        error = body["error"]
    code = error.get("code")
    message = error.get("message") or f"the server answered HTTP {status} without an error body"
    classes = [cls for cls in _classes(DARError) if cls is not ServiceConnectionError]
    by_code = [cls for cls in classes if cls.code == code and cls.status == status]
    by_status = [cls for cls in classes if cls.status == status]
    cls = (by_code or by_status or [DARError])[0]
    problems = [
        Problem(
            message=str(item.get("message", "")),
            param=item.get("param"),
            code=str(item.get("code", "invalid")),
            row=item.get("row"),
        )
        for item in error.get("errors") or ()
        if isinstance(item, Mapping)
    ]
    return cls(
        str(message),
        param=error.get("param"),
        code=str(code) if code else None,
        problems=problems,
        request_id=error.get("request_id") or request_id,
    )
