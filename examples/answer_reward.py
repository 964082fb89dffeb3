r"""A verifiable reward: 1 if the completion's answer is the row's ``ground_truth``, else 0.

python examples/answer_reward.py

The answer is the content of the last ``\boxed{…}``, or the last number. It is compared as a
fraction: 0.5 equals 1/2, and 0.3333 does not equal 1/3.
"""

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from dar.rewards.builtins.numbers import answer_in
from dar.rewards.server import serve


def text_of(completion: Any) -> str:  # noqa: ANN401 - TRL: a text, or messages
    """The text of a completion."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def wanted(ground_truth: object) -> Fraction | None:
    """The number in a row's ``ground_truth``: 42, 0.5, "3/4", "… #### 42"; None: there is none."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, int | float | str):
        return None
    return answer_in(str(ground_truth))


def reward(completion: str, ground_truth: object) -> float | None:
    """The reward of one completion; None: it does not apply; NaN: unknown, so the sample fails."""
    if ground_truth is None:
        return None  # skipped: a 0 would punish the model for a row without an answer
    right = wanted(ground_truth)
    if right is None:
        return math.nan  # a broken row is a failure, not a wrong completion
    return 1.0 if answer_in(completion) == right else 0.0


def verifiable_answer(
    completions: Sequence[Any], ground_truth: Sequence[Any], **_: object
) -> list[float | None]:
    """The reward function. ``ground_truth`` has the value of each row, None if the row has none."""
    return [
        reward(text_of(completion), truth)
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--secret-file", default="~/.local/share/dar/reward_secret")
    arguments = parser.parse_args()
    serve(verifiable_answer, port=arguments.port, secret_file=arguments.secret_file)


if __name__ == "__main__":
    main()
