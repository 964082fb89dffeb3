"""The formats of a row of a data set: one set of rules for the trainer and for uploaded files.

`dar.protocol.row_values` has the rules over values, and `dar.protocol.row_files` applies all.

A row holds a prompt alone (`prompts`: completions are sampled), or also completions to train on
(offline):

- `preferences`: ``chosen`` and ``rejected``, which get the rewards 1 and 0. Without a ``prompt``,
  their common beginning is the prompt.
- `completions`: ``completion`` or ``completions``, with ``reward`` or ``rewards``, and optionally
  ``behavior_logps``.
- `tokens`: the same with ``completion_ids``, and ``prompt_ids`` if the prompt is given as tokens.

A text prompt goes with texts. A conversation (a list of messages) goes with messages or texts of
the assistant. A null counts as an absent column, except for rewards: a null reward is missing.
``chat_template_kwargs`` are variables of the chat template that renders the row's conversations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from dar.errors import InvalidRequestError
from dar.protocol.rewards import MAX_REWARD
from dar.protocol.shared_start import common_prompt_length

Row = Mapping[str, Any]
Message = Mapping[str, Any]
Kind = Literal["prompts", "preferences", "completions", "tokens"]
Completion = str | Message | list[int]

KINDS: Mapping[str, Kind] = {
    "completion": "completions",
    "completions": "completions",
    "completion_ids": "tokens",
    "chosen": "preferences",
    "rejected": "preferences",
}
"""Columns that hold completions, and the kind of row they make."""
LIKE_PROMPT = ("prompt", "prompts", "question", "query", "instruction", "input", "problem", "text")
"""Columns that other data sets have in place of a prompt, in small letters."""
REWARD_COLUMNS = ("reward", "rewards")
OFFLINE_COLUMNS = frozenset({"prompt", "prompt_ids", "behavior_logps", *KINDS, *REWARD_COLUMNS})
"""Columns that offline training reads; all others belong to the user."""
TEMPLATE_COLUMN = "chat_template_kwargs"
"""Column with variables of the chat template."""
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state")
"""Arguments that every reward function gets besides the columns."""
ROLES = ("system", "user", "assistant", "tool")
MAX_NATS = 1_000_000
"""Largest size of a completion's log-probability: 10 nats for each of 100,000 tokens."""
ROUNDING_NATS = 1e-4
"""A sum of log-probabilities may exceed 0 by this much, through rounding."""
TAKEN = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "messages", "max_length", "padding", "return_assistant_tokens_mask", "return_dict",
        "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
"""Arguments of a tokenizer's ``apply_chat_template`` that are not variables of the template."""


class RowError(InvalidRequestError):
    """A row cannot be used.

    Args:
        message: What is wrong, and what to do.
        param: The column, with the position in it.
        code: Machine-readable kind.
    """

    code = "invalid_row"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)


@dataclass(frozen=True, slots=True)
class OfflineRow:
    """A row with K completions, in one common form."""

    kind: Kind
    prompt: str | list[Message] | None
    """None if ``prompt_ids`` replace it."""
    prompt_ids: list[int] | None
    completions: list[Completion]
    """``[K]`` texts for a text prompt, assistant messages for a conversation, or token ids."""
    rewards: list[float | None]
    """``[K]``; None: missing."""
    behavior_logps: list[float] | None
    """``[K]`` sums of log-probabilities, in nats; None: unknown."""


def kind_of(row: Row) -> Kind:
    """The kind of a row.

    Raises:
        RowError: It has completions of two kinds.
    """
    there = completions_of(row)
    kinds = {KINDS[name] for name in there}
    if len(kinds) > 1:
        raise RowError(
            f"the row has {' and '.join(map(repr, there))}: keep the columns of one format",
            there[-1],
            "mixed_format",
        )
    return kinds.pop() if kinds else "prompts"


def completions_of(row: Row) -> list[str]:
    """Names of the columns that hold completions."""
    return [name for name in KINDS if row.get(name) is not None]


def form_of(row: Row) -> tuple[str, ...]:
    """Names of the columns that define the format; all rows of a data set have the same ones.

    Without completions all columns but the prompt belong to the user, so there are none.
    """
    if not completions_of(row):
        return ()
    filled = (*KINDS, "behavior_logps")
    return (
        *(name for name in filled if row.get(name) is not None),
        *(name for name in REWARD_COLUMNS if name in row),  # null is a missing reward
    )


def read_prompt(row: Row) -> str | list[Message]:
    """The prompt: a text or a conversation.

    Raises:
        RowError: There is no prompt, or it is something else.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if prompt is None:
        raise RowError(_instead_of_prompt(row), "prompt", "missing")
    return read_messages(prompt, "prompt")


def _instead_of_prompt(row: Row) -> str:
    """What a row without a prompt has, and how to name it."""
    if "prompt" in row:
        return "the prompt is null; give it a text or a list of messages, or remove the row"
    if row.get("messages") is not None:
        return (
            "the row has no 'prompt', but 'messages': rename the column to 'prompt', and leave out "
            "the assistant's answer at its end"
        )
    there = ", ".join(map(str, list(row)[:10])) or "none"
    lack = f"the row has no 'prompt'; its columns: {there}"
    names = {str(name).lower(): name for name in row if isinstance(row[name], str | Sequence)}
    for name in LIKE_PROMPT:
        if name in names:
            return f"{lack}; rename the column {names[name]!r} to 'prompt'"
    return lack


def check_format(row: Row) -> OfflineRow | None:
    """Check a row by the rules of its format, whatever it is used for.

    Returns:
        The completions of the row, if it has any.

    Raises:
        RowError: It breaks one of them.
    """
    if row.get("tools") is not None:
        raise RowError(
            "the row has 'tools', but nothing here executes tools; remove the column, or rename it "
            "if a reward function reads it",
            "tools",
            "unsupported_column",
        )
    template_kwargs(row.get(TEMPLATE_COLUMN), TEMPLATE_COLUMN)
    if kind_of(row) == "prompts":
        if read_prompt(row) == "":
            raise RowError("the prompt is empty", "prompt")
        return None
    return read_offline(row)


def check_use(row: Row, *, is_replay: bool) -> None:
    """Check that a row has completions exactly where they are read from the data.

    Args:
        row: The row.
        is_replay: Whether there is no reward source, so that they are.

    Raises:
        RowError: They are missing, or there are some though completions are sampled.
    """
    given = completions_of(row)
    if given and not is_replay:
        raise RowError(
            f"the row has the column {given[0]!r}, but with a reward source completions are "
            "sampled and scored; remove the column, or leave the reward source out to train "
            "on the completions of the rows",
            given[0],
            "unexpected_column",
        )
    if is_replay and not given:
        raise _no_completions()


def template_kwargs(value: object, name: str) -> dict[str, Any]:
    """Variables of a chat template, without those that are null.

    Args:
        value: An object, or None.
        name: Where it stands, for the error.

    Raises:
        RowError: It is something else, or a name in it is an argument of the tokenizer.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(
            f"{name} must be an object with the variables of the chat template, but it is "
            f"{kind_of_value(value)}",
            name,
        )
    given = _without_nulls(value)
    if "tools" in given:
        raise RowError(
            f"{name} has 'tools', but nothing here executes tools; leave them out",
            name,
            "unsupported_column",
        )
    for key in given:
        if key in TAKEN:
            raise RowError(
                f"{name} has {key!r}, which is not a variable of a chat template but an "
                "argument that the trainer sets; leave it out",
                name,
                "reserved_name",
            )
    return given


def is_conversation(row: Row) -> bool:
    """Whether a row holds messages, which a chat template renders."""
    prompt = row.get("chosen") if row.get("prompt") is None else row["prompt"]
    return as_list(prompt) is not None


def read_offline(row: Row, vocabulary: int | None = None) -> OfflineRow:
    """Convert a row with completions and rewards to the common form.

    Args:
        row: The row.
        vocabulary: Token ids must be smaller than this; None: not checked.

    Raises:
        RowError: It cannot be trained on.
    """
    kind, prompt_ids = kind_of(row), row.get("prompt_ids")
    if kind == "prompts":
        raise _no_completions()
    if kind == "tokens":
        return _read_tokens(row, vocabulary)
    if prompt_ids is not None:
        raise RowError(
            "'prompt_ids' go with 'completion_ids'; remove the column", "prompt_ids", "mixed_format"
        )
    prompt, completions = _read_preference(row) if kind == "preferences" else _read_texts(row)
    count = len(completions)
    rewards: list[float | None] = [1.0, 0.0]
    if kind != "preferences":
        rewards = _rewards(row, count)
    return OfflineRow(kind, prompt, None, completions, rewards, _behavior_logps(row, count))


def _no_completions() -> RowError:
    return RowError(
        "the row has no completions to train on; give reward_funcs, or rows with 'completion' "
        "or 'completion_ids' and 'reward', or with 'chosen' and 'rejected'",
        "completion",
        "missing",
    )


# --- completions ----------------------------------------------------------------------------------


def _read_texts(row: Row) -> tuple[str | list[Message], list[Completion]]:
    name = _one_of(row, ("completion", "completions"))
    value, prompt = row[name], read_prompt(row)
    items: list[Any] = [value] if isinstance(value, str) else _list(value, name, "a text")
    places = [name] if isinstance(value, str) else [f"{name}[{i}]" for i in range(len(items))]
    if all(isinstance(item, Mapping) for item in items):
        items, places = [items], [name]
    if not items or not all(isinstance(item, str | list | tuple) for item in items):
        raise RowError(
            f"{name} must be a text, a message list of the assistant, or a list of either, "
            f"but it is {value!r:.80}",
            name,
        )
    if len({isinstance(item, str) for item in items}) > 1:
        raise RowError(f"{name} mixes texts and messages", name, "mixed_format")
    pairs = zip(items, places, strict=True)
    return prompt, [_completion_of(item, prompt, place) for item, place in pairs]


def _completion_of(
    value: str | Sequence[Any], prompt: str | Sequence[Message], name: str
) -> Completion:
    if isinstance(value, str):
        return value if isinstance(prompt, str) else {"role": "assistant", "content": value}
    messages = read_messages(value, name)
    if isinstance(prompt, str):
        raise RowError(f"prompt is a text, but {name} is a conversation", name, "mixed_format")
    return _answer(messages, name)


def _answer(messages: Sequence[Message], name: str) -> Message:
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise RowError(
            f"{name} must hold one message of the assistant after the prompt, "
            f"but holds: {', '.join(roles) or 'none'}",
            name,
        )
    return messages[0]


def _read_tokens(row: Row, vocabulary: int | None) -> OfflineRow:
    name = "completion_ids"
    value = _list(row[name], name, "a list of token ids, or a list of such lists")
    is_single = bool(value) and isinstance(value[0], Integral)
    completions: list[Completion] = [
        _tokens(ids, name, vocabulary) for ids in ([value] if is_single else value)
    ]
    prompt_ids = row.get("prompt_ids")
    return OfflineRow(
        kind="tokens",
        prompt=read_prompt(row) if prompt_ids is None else None,
        prompt_ids=None if prompt_ids is None else _tokens(prompt_ids, "prompt_ids", vocabulary),
        completions=completions,
        rewards=_rewards(row, len(completions)),
        behavior_logps=_behavior_logps(row, len(completions)),
    )


def _tokens(value: object, name: str, vocabulary: int | None) -> list[int]:
    ids = _list(value, name, "a list of token ids")
    most = math.inf if vocabulary is None else vocabulary - 1
    if not all(
        is_number(token) and isinstance(token, Integral) and 0 <= int(token) <= most
        for token in ids
    ):
        bound = "0 up" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise RowError(f"{name} must be a list of token ids from {bound}, not {ids!r:.80}", name)
    return [int(token) for token in ids]


# --- preferences ----------------------------------------------------------------------------------


def _read_preference(row: Row) -> tuple[str | list[Message], list[Completion]]:
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if row.get(name) is None:
            raise RowError(f"the row has {other!r} but no {name!r}", name, "missing")
    if _is_same_answer(row["chosen"], row["rejected"]):
        raise RowError(
            "chosen and rejected are the same, so the pair says nothing; remove the row", "rejected"
        )
    for name in REWARD_COLUMNS:
        if row.get(name) is not None:
            raise RowError(
                f"'chosen' and 'rejected' have the rewards 1 and 0; remove the column {name!r}, "
                "or send 'completions' with it",
                name,
                "mixed_format",
            )
    pair = [row["chosen"], row["rejected"]]
    if all(isinstance(value, str) for value in pair):
        return _texts_of_preference(row, *pair)
    if any(isinstance(value, str) for value in pair):
        raise RowError("one of chosen and rejected is a text, but the other is not", "rejected")
    chosen, rejected = (read_messages(row[name], name) for name in ("chosen", "rejected"))
    prompt = _prompt_of_conversations(row, chosen, rejected)
    answers = ((_after(prompt, chosen), "chosen"), (_after(prompt, rejected), "rejected"))
    return prompt, _not_empty([_answer(messages, name) for messages, name in answers])


def _is_same_answer(chosen: object, rejected: object) -> bool:
    """Whether two answers of a pair are equal, as texts or message by message."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        return chosen == rejected
    one, other = as_list(chosen), as_list(rejected)
    if one is None or other is None or len(one) != len(other):
        return False
    return all(
        _is_same(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _not_empty(pair: Sequence[Completion]) -> list[Completion]:
    """A chosen and a rejected completion, both with a text.

    Raises:
        RowError: One is empty: training on it would teach the policy to write nothing.
    """
    for name, answer in zip(("chosen", "rejected"), pair, strict=True):
        if answer == "" or (isinstance(answer, Mapping) and answer.get("content") == ""):
            raise RowError(f"{name} is empty after the prompt; remove the row", name)
    return list(pair)


def _texts_of_preference(
    row: Row, chosen: str, rejected: str
) -> tuple[str | list[Message], list[Completion]]:
    if row.get("prompt") is not None:
        prompt = read_prompt(row)
        texts = (chosen, rejected)
        return prompt, _not_empty([_completion_of(text, prompt, "chosen") for text in texts])
    cut = common_prompt_length(chosen, rejected)
    if cut == 0:
        raise RowError(
            "chosen and rejected have no common beginning that could be the prompt; "
            "add a column 'prompt'",
            "prompt",
            "missing",
        )
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _prompt_of_conversations(
    row: Row, chosen: Sequence[Message], rejected: Sequence[Message]
) -> list[Message]:
    given = row.get("prompt")
    if given is not None and not isinstance(given, str):
        return read_messages(given, "prompt")
    shared = min(len(chosen), len(rejected)) - 1
    pairs = zip(chosen[:shared], rejected[:shared], strict=True)
    count = next((i for i, (a, b) in enumerate(pairs) if not _is_same(a, b)), shared)
    if count == 0:
        raise RowError(
            "chosen and rejected have no common first message that could be the prompt; "
            "add a column 'prompt'",
            "prompt",
            "missing",
        )
    if given is not None and given.strip() != str(chosen[count - 1].get("content")).strip():
        raise RowError(
            "prompt is a text, but chosen and rejected are conversations in which it is not the "
            "last common message",
            "prompt",
            "mixed_format",
        )
    return list(chosen[:count])


def _after(prompt: Sequence[Message], messages: Sequence[Message]) -> Sequence[Message]:
    """The messages of a conversation after the prompt, which it may or may not repeat."""
    count = len(prompt)
    is_repeating = len(messages) > count and all(
        _is_same(a, b) for a, b in zip(prompt, messages[:count], strict=True)
    )
    return messages[count:] if is_repeating else messages


def _is_same(one: Message, other: Message) -> bool:
    return _without_nulls(one) == _without_nulls(other)


def _without_nulls(message: Message) -> dict[str, Any]:
    # A table gives every message the columns of all messages.
    return {name: value for name, value in message.items() if value is not None}


# --- numbers --------------------------------------------------------------------------------------


def _rewards(row: Row, count: int) -> list[float | None]:
    if not any(name in row for name in REWARD_COLUMNS):
        raise RowError(
            "the row has completions but no rewards; add 'reward' or 'rewards' (null where one is "
            f"missing), or remove {completions_of(row)[0]!r} to have completions sampled",
            "reward",
            "missing",
        )
    name = _one_of(row, REWARD_COLUMNS)
    if row.get(name) is None:
        return [None] * count
    values = _numbers(row[name], name, count)
    if not all(value is None or is_number(value) for value in values):
        raise RowError(f"{name} must be numbers or null, not {row[name]!r:.80}", name)
    missing = [v is None or (not isinstance(v, int) and not math.isfinite(v)) for v in values]
    known = [value for value, lacks in zip(values, missing, strict=True) if not lacks]
    if too_large := [value for value in known if abs(value) > MAX_REWARD]:
        raise RowError(
            f"{name} must lie within ±{MAX_REWARD:,.0f}, as larger ones cannot be told apart in "
            f"float32, but one is {too_large[0]!r:.40}; scale them down",
            name,
            "out_of_range",
        )
    pairs = zip(values, missing, strict=True)
    return [None if lacks else float(value) for value, lacks in pairs]


def _behavior_logps(row: Row, count: int) -> list[float] | None:
    name = "behavior_logps"
    if row.get(name) is None:
        return None
    values = _numbers(row[name], name, count)
    if not all(is_number(value) and _is_finite(value) for value in values):
        raise RowError(
            f"{name} must be finite numbers, or left out for the whole row, not {row[name]!r:.80}",
            name,
        )
    if too_large := [value for value in values if value > ROUNDING_NATS]:
        raise RowError(
            f"{name} must be at most 0, as a probability is at most 1, but one is "
            f"{too_large[0]!r:.40}; send sums of log-probabilities in nats",
            name,
            "out_of_range",
        )
    if too_small := [value for value in values if value < -MAX_NATS]:
        raise RowError(
            f"{name} must be at least -{MAX_NATS:,}, but one is {too_small[0]!r:.40}; send sums of "
            "log-probabilities in nats, or leave the column out",
            name,
            "out_of_range",
        )
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:  # noqa: ANN401 - any number
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def _numbers(value: Any, name: str, count: int) -> list[Any]:  # noqa: ANN401 - any cell of a table
    value = _unboxed(value)
    if count == 1 and is_number(value):
        return [value]
    values = None if isinstance(value, str | Mapping) else as_list(value)
    values = None if values is None else [_unboxed(one) for one in values]
    if values is None and count == 1:
        raise RowError(f"{name} must be a number or null, not {value!r:.80}", name)
    if values is None or len(values) != count:
        raise RowError(
            f"needs {count} {name}, one for each completion, but has {value!r:.80}",
            name,
            "wrong_length",
        )
    return values


# --- columns and lists ----------------------------------------------------------------------------


def _one_of(row: Row, names: Sequence[str]) -> str:
    """Of two alternative columns the one that has a value, else the one that exists."""
    given = [name for name in names if row.get(name) is not None]
    if len(given) > 1:
        raise RowError(
            f"the row has both {given[0]!r} and {given[1]!r}; remove one", given[1], "mixed_format"
        )
    return (given or [name for name in names if name in row])[0]


def _list(value: object, name: str, wanted: str) -> list[Any]:
    found = as_list(value)
    if not found:
        empty = found is not None
        if empty and name in ("prompt_ids", "completion_ids"):
            which = "prompt_ids is empty" if name == "prompt_ids" else "a completion has 0 tokens"
            raise RowError(which, name)
        raise RowError(f"{name} must be {wanted}, but it is {kind_of_value(value)}", name)
    return found


def read_messages(
    value: object, name: str, wanted: str = "a text or a list of messages"
) -> list[Message]:
    """A conversation.

    Args:
        value: From a row.
        name: Its column, for the error.
        wanted: What the column may hold, for the error.

    Raises:
        RowError: It is something else.
    """
    messages = _list(value, name, wanted)
    for index, message in enumerate(messages):
        _check_message(message, f"{name}[{index}]")
    return [_without_nulls(message) for message in messages]


def _check_message(message: object, path: str) -> None:
    there = _without_nulls(message) if isinstance(message, Mapping) else {}
    if "tool_calls" in there:
        raise RowError(
            f"{path} has tool_calls, but nothing here executes tools; remove them",
            f"{path}.tool_calls",
            "unsupported_column",
        )
    if "role" in there and "content" not in there:
        raise RowError(f"{path} has no content; send a text that is not empty", f"{path}.content")
    if set(there) != {"role", "content"}:
        raise RowError(
            f"{path} must be a message: an object with exactly 'role' and 'content', but it is "
            + (
                f"one with {', '.join(map(repr, list(there)[:6]))}"
                if there
                else kind_of_value(message)
            ),
            path,
        )
    role, content = there["role"], there["content"]
    if role not in ROLES:
        raise RowError(
            f"{path}.role must be one of {', '.join(ROLES)}, but it is {role!r:.80}",
            f"{path}.role",
        )
    if not isinstance(content, str):
        hint = "; parts of a list are not read" if as_list(content) is not None else ""
        raise RowError(
            f"{path}.content must be a text, but it is {kind_of_value(content)}{hint}",
            f"{path}.content",
        )
    if not content:
        raise RowError(f"{path}.content must be a text that is not empty", f"{path}.content")


# --- cells ----------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    """Whether it is a number; a boolean, and a time span of numpy, are none."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if isinstance(value, bool) or kind == "m":
        return False
    return isinstance(value, Real)


def _unboxed(value: object) -> object:
    """The value of an array or a tensor without dimensions; anything else as it is."""
    plain = getattr(value, "tolist", None)
    is_boxed = getattr(value, "ndim", None) == 0 and not isinstance(value, Real)
    return plain() if is_boxed and callable(plain) else value


def as_list(value: object) -> list[Any] | None:
    """The items of a list or of an array; None: it is neither."""
    if isinstance(value, str | bytes | Mapping):
        return None
    if isinstance(value, Sequence):
        return list(value)
    plain = getattr(value, "tolist", None)
    made = plain() if callable(plain) else None
    return made if isinstance(made, list) else None


def kind_of_value(value: object) -> str:
    """The type of a value, in words."""
    if value is None:
        return "null"
    kinds = ((str, "a text"), (bool, "a boolean"), (Real, "a number"))
    for kind, words in kinds:
        if isinstance(value, kind):
            return words
    if isinstance(value, Mapping):
        return "an object"
    items = as_list(value)
    if items is not None:
        return "a list" if items else "an empty list"
    return f"of the type {type(value).__name__}"
