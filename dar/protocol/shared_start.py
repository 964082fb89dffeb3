"""The common beginning of two texts that may be a prompt: whole words, and whole characters.

What a reader sees as one character may be several code points: a letter with its accents, an emoji
with a skin tone, a family joined by U+200D, a flag, a Hangul syllable. A prompt that ended inside
one would show another character, and its completions would begin with half of one.
"""

from unicodedata import category, east_asian_width

JOINER, NON_JOINER = "\u200d", "\u200c"
TONES = range(0x1F3FB, 0x1F400)
"""Skin tones of emoji."""
TAGS = range(0xE0020, 0xE0080)
"""Letters of the flags of regions."""
REGIONS = range(0x1F1E6, 0x1F200)
"""Letters of flags; two make one flag."""
VOICED = "\uff9e\uff9f"
"""Marks of Katakana of half width."""
LEADS = (range(0x1100, 0x1160), range(0xA960, 0xA97D))
VOWELS = (range(0x1160, 0x11A8), range(0xD7B0, 0xD7C7))
TAILS = (range(0x11A8, 0x1200), range(0xD7CB, 0xD7FC))
"""Parts of Hangul syllables, in this order."""
SYLLABLES = range(0xAC00, 0xD7A4)
"""Whole Hangul syllables, which may take a tail."""


def common_prompt_length(one: str, other: str) -> int:
    """Length of the longest common beginning that ends between words and is shorter than both."""
    most = min(len(one.rstrip()), len(other.rstrip())) - 1
    length = next((i for i in range(most) if one[i] != other[i]), max(most, 0))
    cuts = range(length, 0, -1)
    return next((cut for cut in cuts if _is_boundary(one, cut) and _is_boundary(other, cut)), 0)


def _is_boundary(text: str, cut: int) -> bool:
    """Whether a prompt may end at ``cut``.

    It may end before white space, which then begins the completion as it does inside a text; after
    a mark like ``<|assistant|>``; and anywhere in a script that is written without spaces.
    """
    before, after = text[cut - 1], text[cut]
    if before.isspace() or _is_inside_character(text, cut):
        return False
    return after.isspace() or before in ">]" or "W" in map(east_asian_width, (before, after))


def _is_inside_character(text: str, cut: int) -> bool:
    """Whether the code points around ``cut`` are shown as one character."""
    before, after = text[cut - 1], text[cut]
    if before.isascii() and after.isascii():
        return False
    return (
        category(after)[0] == "M"
        or JOINER in (before, after)
        or after == NON_JOINER
        or after in VOICED
        or ord(after) in TONES
        or ord(after) in TAGS
        or _is_inside_flag(text, cut)
        or _is_inside_syllable(ord(before), ord(after))
    )


def _is_inside_flag(text: str, cut: int) -> bool:
    if ord(text[cut]) not in REGIONS:
        return False
    start = cut
    while start > 0 and ord(text[start - 1]) in REGIONS:
        start -= 1
    return (cut - start) % 2 == 1


def _is_inside_syllable(before: int, after: int) -> bool:
    def is_in(code: int, parts: tuple[range, ...]) -> bool:
        return any(code in part for part in parts)

    if is_in(before, LEADS):
        return is_in(after, (*LEADS, *VOWELS, SYLLABLES))
    has_no_tail = is_in(before, VOWELS) or (before in SYLLABLES and (before - 0xAC00) % 28 == 0)
    if has_no_tail and is_in(after, VOWELS):
        return True
    may_take_tail = is_in(before, (*VOWELS, *TAILS, SYLLABLES))
    return may_take_tail and is_in(after, TAILS)
