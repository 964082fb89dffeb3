"""The trackers of ``report_to``: their names, and errors of their start as one sentence."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from dar.errors import InvalidRequestError

PARAM = "report_to"
NOT_LISTED = frozenset({"azure_ml", "flyte"})
"""Trackers whose libraries transformers does not list, though they may be installed."""


def check_trackers(names: object) -> None:
    """Reject trackers that transformers does not know, or whose library is missing.

    Args:
        names: The value of ``report_to``.

    Raises:
        InvalidRequestError: There is such a tracker.
    """
    given = [names] if names is None or isinstance(names, str) else names
    known = {None, "none", "all", *INTEGRATION_TO_CALLBACK}
    if not isinstance(given, list | tuple) or not all(name in known for name in given):
        raise InvalidRequestError(
            f"report_to is {names!r}, but must be none, all, or of "
            f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
            param=PARAM,
        )
    wanted = [name for name in given if name not in {None, "none", "all", *NOT_LISTED}]
    if not wanted:
        return  # transformers imports some of the libraries to see whether they are there
    present = get_available_reporting_integrations()
    for name in wanted:
        if name not in present:
            raise InvalidRequestError(
                f"report_to names {name}, whose library is not installed here; install it, or "
                f"leave {name} out",
                param=PARAM,
            )


def name_start_errors(callbacks: Iterable[TrainerCallback]) -> None:
    """Have an error at the start of a tracker, such as a missing key, name the tracker."""
    names = {made: name for name, made in INTEGRATION_TO_CALLBACK.items()}
    for callback in callbacks:
        name = names.get(type(callback))
        if name is not None:
            start: Any = _naming(name, callback.on_train_begin)
            callback.on_train_begin = start  # type: ignore[method-assign]  # of this one object


def _naming(name: str, start: Callable[..., Any]) -> Callable[..., Any]:
    def begin(*arguments: Any, **more: Any) -> Any:  # noqa: ANN401 - those of transformers
        try:
            return start(*arguments, **more)
        except Exception as error:
            raise InvalidRequestError(
                f"the tracker {name} cannot start: {error}; set it up, or leave it out of "
                "report_to",
                param=PARAM,
            ) from error

    return begin
