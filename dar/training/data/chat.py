"""Conversations as a model reads them: laid out by its tokenizer's chat template.

A template is a program of the model's author, so it may raise anything, and write anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.protocol.row_files import MAX_ROW_BYTES
from dar.protocol.rows import Message
from dar.training.data.load_errors import first_line

MAX_RENDERED = 2 * MAX_ROW_BYTES
"""Most characters of a conversation as the model reads it; encoding takes about 130 bytes each."""


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    whose: str,
    **options: Any,  # noqa: ANN401 - those of transformers
) -> str:
    """A conversation as ``tokenizer`` lays it out.

    Args:
        tokenizer: It has a chat template.
        messages: The conversation.
        variables: Variables of the template.
        whose: Whose template it is, for errors, such as ``the model``.
        options: Further arguments of ``apply_chat_template``.

    Raises:
        InvalidRequestError: The template refuses the conversation or fails, or its text cannot be
            encoded or is too long.
    """
    failed = f"the chat template of {whose}"
    try:
        text = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **options, **variables
            )
        )
    except Exception as error:  # a template is a program and raises anything
        raise InvalidRequestError(
            f"{failed} refuses the conversation: {first_line(error):.500}"
        ) from error
    if len(text) > MAX_RENDERED:
        raise InvalidRequestError(
            f"{failed} makes {len(text):,} characters of the conversation, but at most "
            f"{MAX_RENDERED:,} can be read; shorten the conversation, or correct the template"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{failed} writes half a character (U+{ord(text[error.start]):04X}), which no tokenizer "
            "can encode; correct the template"
        ) from error
    return text
