"""The two languages of the demo, without torch: reviews and brackets.

A review is one sentence about a thing, often with a second clause about one of its parts, and
sometimes a closing sentence. Two in five are positive, two in five negative, one in five neutral,
so that a reward for sentiment can rise and fall. All texts are drawn from one seed. A small model
learns to write reviews fluently in under a minute.

The task of the brackets is to balance them. Its exact mathematics: `dar.training.demo.brackets`.
"""

import random
from collections.abc import Iterator, Sequence

# --- reviews -----------------------------------------------------------------------------------

THINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "food": (
        ("soup", "pizza", "cake", "curry", "salad", "bread"),
        ("sauce", "portion", "smell", "texture", "price", "waiter"),
    ),
    "show": (
        ("film", "book", "play", "concert", "series", "song"),
        ("ending", "story", "cast", "pace", "humour", "sound"),
    ),
    "place": (
        ("hotel", "garden", "museum", "cafe", "beach", "train"),
        ("staff", "view", "room", "service", "entrance", "seat"),
    ),
    "object": (
        ("phone", "bike", "lamp", "chair", "radio", "coat"),
        ("colour", "handle", "design", "weight", "manual", "box"),
    ),
}
"""Kind -> the things of a review, and the parts that it mentions."""

ADJECTIVES: dict[int, tuple[str, ...]] = {
    1: (
        "great", "lovely", "excellent", "superb", "delightful", "wonderful", "brilliant",
        "charming", "beautiful", "fantastic", "pleasant", "perfect", "good", "impressive",
        "amazing", "nice",
    ),
    -1: (
        "awful", "terrible", "horrible", "ugly", "boring", "disappointing", "bad", "dreadful",
        "poor", "annoying", "nasty", "miserable", "disgusting", "worthless", "sad", "painful",
    ),
    0: (
        "ordinary", "old", "small", "plain", "quiet", "usual", "long", "new", "average", "large",
        "brown",
    ),
}  # fmt: skip
"""Mood (1 positive, -1 negative, 0 neutral) -> adjectives."""

CLOSINGS: dict[int, tuple[str, ...]] = {
    1: (
        "I loved it.", "It made me smile.", "I enjoyed every minute.", "My friends liked it.",
        "We were so happy.", "I recommend it.", "What a treat.",
    ),
    -1: (
        "I hated it.", "It ruined our day.", "I was angry.", "What a waste.",
        "We left in a bad mood.", "I regret it.", "My friends complained.",
    ),
    0: (
        "We went on Monday.", "It was our second visit.", "I paid in cash.", "My sister came too.",
        "It took an hour.", "We sat by the door.", "I saw it last week.",
    ),
}  # fmt: skip
"""Mood -> closing sentences."""

INTENSIFIERS = ("", "", "", "very ", "rather ", "really ")
OPENINGS = tuple(f"The {thing} was" for things, _ in THINGS.values() for thing in things)
"""The demo's prompts: the first words of every review."""


def review(rng: random.Random) -> str:
    things, parts = THINGS[rng.choice(tuple(THINGS))]
    mood = rng.choices((1, -1, 0), weights=(2, 2, 1))[0]
    text = f"The {rng.choice(things)} was {rng.choice(INTENSIFIERS)}{rng.choice(ADJECTIVES[mood])}"
    if rng.random() < 0.6:
        is_turning = rng.random() < 0.2
        other = -mood if is_turning else mood
        text += (
            f" {'but' if is_turning else 'and'} the {rng.choice(parts)} was "
            f"{rng.choice(INTENSIFIERS)}{rng.choice(ADJECTIVES[other])}"
        )
    text += "."
    return f"{text} {rng.choice(CLOSINGS[mood])}" if rng.random() < 0.5 else text


def reviews(count: int, seed: int) -> Iterator[str]:
    """``count`` reviews, the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - a text generator, not a secret
    return (review(rng) for _ in range(count))


# --- brackets ----------------------------------------------------------------------------------

SYMBOLS = "()"
"""The whole language, in the order of the token ids."""
PROMPTS = ("(((", "(()", "()(")
"""Of 32 continuations 4, 5 and 5 balance them, so a random model earns 0.15."""
NEW_TOKENS = 5


def is_balanced(text: str) -> bool:
    """Whether every bracket is closed, and none before it is opened."""
    depth = 0
    for symbol in text:
        depth += 1 if symbol == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def balanced(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """The reward: 1 if prompt and completion together are balanced, else 0."""
    return [
        float(is_balanced(prompt + completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
