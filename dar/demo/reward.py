"""The demo's reward service: the sentiment of a review by the VADER lexicon, or balanced brackets.

It is an ordinary reward service, made of one function, as a user would write it.
"""

import argparse
from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dar.rewards.http.signing import secrets_in
from dar.rewards.server import serve
from dar.settings import load_settings
from dar.training.demo.languages import balanced

analyzer = SentimentIntensityAnalyzer()


def positivity(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """VADER's compound score, from -1 to 1, of each review with its opening."""
    return [
        float(analyzer.polarity_scores(prompt + completion)["compound"])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


REWARDS = {"reviews": positivity, "brackets": balanced}


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m dar.demo.reward", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--task", choices=REWARDS, default="reviews")
    arguments = parser.parse_args()
    settings = load_settings()
    text = settings.secret_from(settings.reward_secret, "reward_secret")
    secret = None if text is None else secrets_in(text)
    serve(REWARDS[arguments.task], host="127.0.0.1", port=arguments.port, secret=secret)


if __name__ == "__main__":
    main()
