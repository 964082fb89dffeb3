r"""A reward that can be verified: 1 if the completion's answer is the row's ``ground_truth``, else 0.

python examples/answer_reward.py

The answer is what stands in the last ``\boxed{…}``, or the last number. It is compared as a fraction: 0.5 is 1/2, and 0.3333 is
not 1/3.
"""

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from dar.rewards.builtins.numbers import answer_in
from dar.rewards.server import serve


def text_of(completion: Any) -> str:  # noqa: ANN401 - what TRL's signature gives: a text, or messages in a conversation
    """The text of a completion."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def wanted(ground_truth: object) -> Fraction | None:
    """The number in a row's ``ground_truth``: 42, 0.5, "3/4", "… #### 42"; None: it holds none."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, int | float | str):
        return None
    return answer_in(str(ground_truth))


def reward(completion: str, ground_truth: object) -> float | None:
    """The reward of one completion; None: it does not apply; NaN: it cannot be told, so the sample fails."""
    if ground_truth is None:
        return None  # left out: a 0 would punish the model for a row that has no answer
    right = wanted(ground_truth)
    if right is None:
        return math.nan  # a broken row shows as a failure, not as a model that is always wrong
    return 1.0 if answer_in(completion) == right else 0.0


def verifiable_answer(
    completions: Sequence[Any], ground_truth: Sequence[Any], **_: object
) -> list[float | None]:
    """The reward function. ``ground_truth`` has the value of each completion's row, None where the row has none."""
    return [
        reward(text_of(completion), truth)
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--secret-file", default="~/.local/share/dar/reward_secret")
    arguments = parser.parse_args()
    serve(verifiable_answer, port=arguments.port, secret_file=arguments.secret_file)


if __name__ == "__main__":
    main()
