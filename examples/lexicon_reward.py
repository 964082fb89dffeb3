"""A reward from a list of words: more liked than disliked words give more, between -1 and 1.

python examples/lexicon_reward.py --lexicon my-words.txt

A file has one word and its weight on each line, like ``great 2`` or ``awful -1.5``; lines that
start with # are skipped.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dar.rewards.server import serve

LIKED = (
    "amazing delicious delightful excellent fresh friendly good great happy love loved perfect "
    "pleasant wonderful"
)
DISLIKED = (
    "awful bad bland cold dirty disappointing hate hated horrible poor rude sad slow terrible"
)
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


def read_lexicon(path: Path) -> dict[str, float]:
    """Words and their weights.

    Raises:
        SystemExit: A line is not a word and a number.
    """
    lexicon = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, *weights = line.split()
        try:
            [weight] = map(float, weights)
        except ValueError:
            weight = math.nan
        if not WORD.fullmatch(word) or not math.isfinite(weight):
            raise SystemExit(f"{path}:{number}: expected one word and its weight, like: great 2")
        lexicon[word.casefold()] = weight
    return lexicon


def text_of(completion: Any) -> str:  # noqa: ANN401 - TRL: a text, or messages
    """The text of a completion."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def lexicon_reward(lexicon: Mapping[str, float]) -> Callable[..., list[float]]:
    """The reward function: sum of the found weights, divided by the sum of their sizes plus 1.

    Without the 1, the first liked word would already give the highest reward. A text without any
    word of the lexicon gets the reward 0, which is not a missing reward.
    """

    def lexicon_words(completions: Sequence[Any], **_: object) -> list[float]:
        rewards = []
        for completion in completions:
            words = WORD.findall(text_of(completion).casefold())
            found = [lexicon[word] for word in words if word in lexicon]
            rewards.append(sum(found) / (sum(map(abs, found)) + 1))
        return rewards

    return lexicon_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lexicon", type=Path, help="file of words and weights; default: a few")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--secret-file", default="~/.local/share/dar/reward_secret")
    arguments = parser.parse_args()
    lexicon = {**dict.fromkeys(LIKED.split(), 1.0), **dict.fromkeys(DISLIKED.split(), -1.0)}
    if arguments.lexicon is not None:
        lexicon = read_lexicon(arguments.lexicon)
    serve(lexicon_reward(lexicon), port=arguments.port, secret_file=arguments.secret_file)


if __name__ == "__main__":
    main()
