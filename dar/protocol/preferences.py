"""Where the prompt ends in two texts of which one is preferred."""

from unicodedata import east_asian_width


def common_prompt_length(one: str, other: str) -> int:
    """Length of the common prompt of two texts: the longest that ends between two words and leaves something of both."""
    most = min(len(one.rstrip()), len(other.rstrip())) - 1
    length = next((i for i in range(most) if one[i] != other[i]), max(most, 0))
    cuts = range(length, 0, -1)
    return next((cut for cut in cuts if _is_boundary(one, cut) and _is_boundary(other, cut)), 0)


def _is_boundary(text: str, cut: int) -> bool:
    """Whether a prompt may end at ``cut``.

    It may before white space, which then begins the completion, as it does inside a text; after a mark like ``<|assistant|>``; and
    anywhere in a script that is written without spaces.
    """
    before, after = text[cut - 1], text[cut]
    if before.isspace():
        return False
    return after.isspace() or before in ">]" or "W" in map(east_asian_width, (before, after))
