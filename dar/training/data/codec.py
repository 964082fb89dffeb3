"""Texts and tokens of completions: exactly what follows a prompt.

Most tokenizers cannot decode or encode the middle of a text by itself. SentencePiece takes the
first space away when it decodes, and puts one before the text when it encodes. Byte-level ones may
put one before it. So a completion is decoded together with something before it, and encoded so that
its tokens, decoded after the prompt's, give its text.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import AddedToken, PreTrainedTokenizerBase

ANCHORS = ("a", "0", "(", ".")
"""Texts that may stand before a completion while it is decoded."""
LEADS = ("\n", *ANCHORS)
"""Texts that may stand before a part of a completion while it is encoded."""
TAIL = 8
"""Tokens of the prompt that are decoded before a completion."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a completion after its prompt."""

    ids: list[int]
    prompt_ids: list[int] | None = None
    """The prompt's tokens where they are not those of the prompt alone."""
    changed_text: tuple[str, str] | None = None
    """The text, and what the tokens say, where the tokenizer cannot reproduce it."""


class TextCodec:
    """Decodes completions, and encodes those of a data set.

    Args:
        tokenizer: The trained model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    # --- from tokens to texts ------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of a whole sequence; spaces before punctuation stay as they are."""
        return str(
            self._tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a completion, with its first space.

        A tokenizer that cannot reproduce any text, as one that joins words by spaces, decodes the
        completion by itself.
        """
        if self._anchor is not None:
            before, anchor = self._anchor
            text = self.decode([*before, *ids], skip_special_tokens=skip_special_tokens)
            if text.startswith(anchor):
                return text[len(anchor) :]
        return self.decode(ids, skip_special_tokens=skip_special_tokens)

    def contains(self, ids: Sequence[int], texts: Sequence[str]) -> bool:
        """Whether a completion contains one of ``texts``, special tokens read or skipped."""
        if not texts:
            return False
        shown = self.text(ids, skip_special_tokens=False)
        if any(text in shown for text in texts):
            return True
        if self._special_ids.isdisjoint(ids):
            return False
        shown = self.text(ids)
        return any(text in shown for text in texts)

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """Tokens that the tokenizer has; a model may have more logits."""
        return frozenset(self._tokenizer.get_vocab().values())

    @cached_property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """Tokens by id that are found in a text before the rest is encoded."""
        found: Mapping[int, AddedToken] = getattr(self._tokenizer, "added_tokens_decoder", {})
        return found  # Mistral's own tokenizers read none in a text

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids) | {
            token_id for token_id, token in self.added_tokens.items() if token.special
        }

    @cached_property
    def _anchor(self) -> tuple[list[int], str] | None:
        """Tokens and text to decode before a completion; None: the tokenizer changes texts."""
        for text in ANCHORS:
            probes = (text, 2 * text, f"{text} {text}", f"{text}  {text}")
            if all(self.decode(self.bare(probe)) == probe for probe in probes):
                return self.bare(text), text
        return None

    # --- from texts to tokens ------------------------------------------------------------------

    def bare(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens around it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def closing_ids(self) -> list[int]:
        """Special tokens that the tokenizer appends to a text."""
        for text in ANCHORS:
            bare = self.bare(text)
            whole: list[int] = self._tokenizer(text)["input_ids"]
            for start in range(len(whole) - len(bare) + 1):
                end = start + len(bare)
                if bare and whole[start:end] == bare:
                    return whole[end:]
        return []

    def after(self, prompt_ids: list[int], whole: list[int], text: str, whole_text: str) -> Encoded:
        """Tokens of ``text`` after a prompt.

        They are those that the whole text has there, unless the prompt's tokens are not its
        beginning or they decode to another text. Then they are encoded by parts. If the tokenizer
        cannot reproduce the text at all, they and the prompt's are those of the whole text, or,
        where words that touch would be an unknown token, the text's by itself.

        Args:
            prompt_ids: Tokens of the prompt.
            whole: Tokens of the prompt and the text, encoded as one.
            text: The completion.
            whole_text: The prompt and the completion.
        """
        count = common_length(prompt_ids, whole)
        is_open = count == len(prompt_ids)
        if is_open and (
            self._following(prompt_ids, whole[count:]) == text
            or self.decode(whole).endswith(whole_text)
        ):
            return Encoded(whole[count:])
        ids = self._exact(prompt_ids, text)
        if ids is not None:
            return Encoded(ids)
        own_prompt, ids = None, whole[count:]
        if not is_open:
            bare, unknown = self.bare(text), self._tokenizer.unk_token_id
            is_lost = whole.count(unknown) > prompt_ids.count(unknown) + bare.count(unknown)
            if is_lost or not 0 < count < len(whole):
                ids = bare
            else:
                own_prompt = whole[:count]
        return Encoded(ids, own_prompt, changed_text=(text, self.text(ids)))

    def _following(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str | None:
        """The text that ``ids`` add to the prompt's; None: they change the prompt's."""
        tail = prompt_ids[-TAIL:]
        before, both = self.decode(tail), self.decode([*tail, *ids])
        return both[len(before) :] if both.startswith(before) else None

    def _exact(self, prompt_ids: Sequence[int], text: str) -> list[int] | None:
        """Tokens that decode to ``text`` after the prompt; None if none were found."""
        ids: list[int] = []
        for part in self._parts(text):
            added = self._added_ids.get(part)
            if added is not None:
                ids.append(added)
                continue
            before = [*prompt_ids, *ids]
            found = next(
                (one for one in self._encodings(part) if self._following(before, one) == part),
                None,
            )
            if found is None:
                return None
            ids += found
        return ids if self._following(prompt_ids, ids) == text else None

    def _encodings(self, part: str) -> Iterator[list[int]]:
        """Tokens that a part may have inside a text."""
        yield self.bare(part)
        for lead in LEADS:
            before, both = self.bare(lead), self.bare(lead + part)
            if both[: len(before)] == before:
                yield both[len(before) :]

    def _parts(self, text: str) -> list[str]:
        """A text, cut before and after each added token."""
        if not self._added_ids:
            return [text]
        longest_first = sorted(self._added_ids, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
        return [part for part in re.split(pattern, text) if part]

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        """Ids of `added_tokens` by their text, without those that stand only between words."""
        return {
            token.content: token_id
            for token_id, token in self.added_tokens.items()
            if token.content and not token.single_word
        }


def common_length(one: Iterable[int], other: Iterable[int]) -> int:
    """Number of leading items that two sequences share."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
