"""All errors that a user can see, as one class tree.

A class sets the ``code``, the HTTP status and whether a retry can help. The service renders an
error with `DARError.body`, and the SDK raises the same class from that body (`error_from_body`). A
message says what is wrong, where, and what to do.

Add a class only if a caller would handle it differently. Otherwise raise the nearest class with a
better message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of an input.

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
        """The JSON form; ``row`` is present only if it is set."""
        body: dict[str, Any] = {"param": self.param, "message": self.message, "code": self.code}
        return body if self.row is None else body | {"row": self.row}


class DARError(Exception):
    """Base of all errors. Raised itself, it is a fault inside the service: retry, or report it.

    Args:
        message: What is wrong, where, and what to do.
        param: Path of the wrong parameter, if there is one.
        code: A more specific code than that of the class.
        problems: All problems, when there are several.
        request_id: Id of the failed request, for the operator.
        retry_after_seconds: When to retry, for retryable errors.
    """

    code: ClassVar[str] = "internal_error"
    status: int = 500
    type: ClassVar[str] = "server_error"
    retryable: bool = True

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
        """The error as every route returns it: ``{"error": {...}}``."""
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


class _Rejected:
    """What most errors of a request share: the same request fails again."""

    status: int = 400
    type: ClassVar[str] = "invalid_request_error"
    retryable: bool = False


class InvalidRequestError(_Rejected, DARError):
    """The request is malformed, or a value is invalid."""

    code = "invalid_request"


class ModelNotFoundError(InvalidRequestError):
    """``model`` is not a folder, a fine-tuned model or an allowed hub id."""

    code = "model_not_found"


class AuthenticationError(_Rejected, DARError):
    """The API key is missing, unknown, expired or revoked."""

    code = "invalid_api_key"
    status = 401
    type = "authentication_error"


class PermissionDeniedError(_Rejected, DARError):
    """The key is valid, but its scopes do not allow this request."""

    code = "insufficient_scope"
    status = 403
    type = "permission_error"


class NotFoundError(_Rejected, DARError):
    """There is no such route or object, or it belongs to another project."""

    code = "not_found"
    status = 404
    type = "not_found_error"


class MethodNotAllowedError(_Rejected, DARError):
    """The route exists, but not with this HTTP method."""

    code = "method_not_allowed"
    status = 405


class RequestTimeoutError(DARError):
    """The body of the request did not arrive in time. Send it again."""

    code = "request_timeout"
    status = 408
    type = "invalid_request_error"


class ConflictError(_Rejected, DARError):
    """The state of the object does not allow this request."""

    code = "invalid_state"
    status = 409
    type = "conflict_error"


class IdempotencyMismatchError(ConflictError):
    """An ``Idempotency-Key`` was used again with another body."""

    code = "idempotency_mismatch"


class FencedError(ConflictError):
    """An attempt wrote after its lease had ended. Its trainer must stop."""

    code = "fenced"


class GoneError(_Rejected, DARError):
    """The request is too late: its deadline has passed, or the job has ended."""

    code = "gone"
    status = 410


class PreconditionFailedError(_Rejected, DARError):
    """The object is no longer the one that ``If-Match`` names. Read it again."""

    code = "precondition_failed"
    status = 412


class InvalidResultError(_Rejected, DARError):
    """A result posted to a callback violates the contract. Correct it and send it again."""

    code = "invalid_result"
    status = 422


class PayloadTooLargeError(_Rejected, DARError):
    """The body is larger than the limit."""

    code = "payload_too_large"
    status = 413


class UnsupportedMediaTypeError(_Rejected, DARError):
    """The route does not support the format or encoding of the body."""

    code = "unsupported_media_type"
    status = 415


class RangeNotSatisfiableError(_Rejected, DARError):
    """The requested byte range is outside the file."""

    code = "range_not_satisfiable"
    status = 416


class RateLimitError(DARError):
    """Too many requests in a short time. Wait for ``Retry-After``."""

    code = "rate_limit_exceeded"
    status = 429
    type = "rate_limit_error"


class ServiceUnavailableError(DARError):
    """The service cannot respond now. Retry after ``Retry-After``."""

    code = "service_unavailable"
    status = 503


class HubUnreachableError(ServiceUnavailableError):
    """The model hub does not respond. Give a local folder or file, or retry with a connection."""

    code = "hub_unreachable"


class ServiceConnectionError(DARError):
    """The client could not reach the service. No response has this code."""

    code = "connection_failed"
    status = 503


class ConfigurationError(DARError):
    """A setting is missing or contradicts another one. It is reported at start-up."""

    code = "configuration_error"
    status = 500
    retryable = False


class SecretUnreadableError(DARError):
    """A stored secret cannot be decrypted, or was stored for another endpoint."""

    code = "secret_unreadable"
    retryable = False


class RewardError(DARError):
    """A reward source returned no rewards. The message names the source and its last response."""

    code = "reward_error"


class RewardUnavailableError(RewardError):
    """The reward service is down, overloaded or too slow. The same request may succeed later."""

    code = "reward_unavailable"
    status = 503


class RewardMisconfiguredError(_Rejected, RewardError):
    """The reward service rejects all requests: bad path, credentials or TLS, or a redirect."""

    code = "reward_misconfigured"


class RewardContractError(_Rejected, RewardError):
    """A response of the reward service violates the contract ``dar.reward.v1``."""

    code = "reward_contract"


class RewardBudgetError(_Rejected, RewardError):
    """Too many rewards are missing: more than the failure policy of the job allows.

    Args:
        message: See `DARError`.
        errors: Failed samples by kind of failure.
        sample_ids: Ids of some of them.
        is_outage: Whether every failure was of a kind that may pass by itself.
        **details: See `DARError`.
    """

    code = "reward_budget_exhausted"

    def __init__(
        self,
        message: str,
        *,
        errors: Mapping[str, int] | None = None,
        sample_ids: Sequence[str] = (),
        is_outage: bool = False,
        **details: Any,  # noqa: ANN401 - passed on to `DARError`
    ) -> None:
        super().__init__(message, **details)
        self.errors = dict(errors or {})
        self.sample_ids = tuple(sample_ids)
        self.is_outage = is_outage


class TrainingError(_Rejected, DARError):
    """Training with this spec failed: invalid data, a model that does not load, a loss of NaN."""

    code = "training_failed"


class CheckpointError(TrainingError):
    """A checkpoint is incomplete, altered or from another job."""

    code = "checkpoint_invalid"


def _classes(root: type[DARError]) -> list[type[DARError]]:
    return [root, *(sub for child in root.__subclasses__() for sub in _classes(child))]


def error_from_body(status: int, body: object, *, request_id: str | None = None) -> DARError:
    """The error in a response body, as the class with which the service raised it.

    For an unknown code, it is the class with the same status, else `DARError`. All fields are kept.
    """
    error: Mapping[str, Any] = {}
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        error = body["error"]
    code = error.get("code")
    message = error.get("message") or f"the server returned HTTP {status} without an error body"
    classes = [cls for cls in _classes(DARError) if cls is not ServiceConnectionError]
    by_code = [cls for cls in classes if cls.code == code and cls.status == status]
    by_status = [cls for cls in classes if cls.status == status]
    cls = (by_code or by_status or [DARError])[0]
    listed = error.get("errors")
    problems = [
        Problem(
            message=str(item.get("message", "")),
            param=_text(item.get("param")),
            code=str(item.get("code", "invalid")),
            row=row if isinstance(row := item.get("row"), int) else None,
        )
        for item in (listed if isinstance(listed, list) else ())
        if isinstance(item, Mapping)
    ]
    return cls(
        str(message),
        param=_text(error.get("param")),
        code=str(code) if code else None,
        problems=problems,
        request_id=_text(error.get("request_id")) or request_id,
    )


def _text(value: object) -> str | None:
    """``value`` if it is a text: a proxy may send anything under the names of an error."""
    return value if isinstance(value, str) else None
