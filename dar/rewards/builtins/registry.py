"""All builtins by name, and their construction from parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dar.errors import InvalidRequestError, Problem
from dar.rewards.builtins.base import Builtin
from dar.rewards.builtins.lengths import LengthPenalty, OverlongPenalty, RepetitionPenalty
from dar.rewards.builtins.numbers import NumericAnswer
from dar.rewards.builtins.texts import Contains, ExactMatch, FormatTags, JsonValid, RegexMatch

BUILTINS: Mapping[str, type[Builtin]] = {
    builtin.fn: builtin
    for builtin in (
        Contains, ExactMatch, FormatTags, JsonValid, LengthPenalty, NumericAnswer, OverlongPenalty, RegexMatch, RepetitionPenalty,
    )
}  # fmt: skip


def make_builtin(fn: str, params: Mapping[str, Any]) -> Builtin:
    """The builtin ``fn`` with its parameters.

    Raises:
        InvalidRequestError: The function or a parameter does not exist, or a value is out of
            bounds. ``problems`` has each with its path below the component: ``fn`` or
            ``params.<name>``.
    """
    kind = BUILTINS.get(fn)
    if kind is None:
        known = ", ".join(sorted(BUILTINS))
        what = f"there is no builtin {fn!r}; there are {known}"
        raise _invalid([Problem(what, "fn", "unknown_builtin")])
    try:
        return kind.model_validate(params)
    except ValidationError as error:
        names = ", ".join(kind.model_fields)
        problems: list[Problem] = []
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            is_about_names = item["type"] in {"extra_forbidden", "missing"}
            more = f"; parameters of {fn}: {names}" if is_about_names else ""
            problems.append(Problem(item["msg"] + more, _path(item["loc"]), item["type"]))
        raise _invalid(problems) from None


def _path(location: Sequence[int | str]) -> str:
    path = "params"
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _invalid(problems: list[Problem]) -> InvalidRequestError:
    first = problems[0]
    return InvalidRequestError(first.message, param=first.param, code=first.code, problems=problems)
