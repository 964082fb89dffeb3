"""The brackets task without torch: its symbols, prompts and reward, which the reward service uses.

Its exact mathematics: `dar.training.demo.brackets`.
"""

from collections.abc import Sequence

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
