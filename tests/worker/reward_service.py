"""A reward service that takes its time: the reward of a completion is the share of its words that are even."""

import sys
import time

from dar.rewards.server import serve


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    time.sleep(0.2)
    rewards: list[float | None] = []
    for text in completions:
        numbers = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
        rewards.append(
            sum(number % 2 == 0 for number in numbers) / len(numbers) if numbers else None
        )
    return rewards


if __name__ == "__main__":
    serve(reward, port=int(sys.argv[1]), secret_file=sys.argv[2])
