"""What the README of the examples says is so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dar.protocol.reward_spec import RewardComponent

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text()
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_every_example_is_described_and_started() -> None:
    started = {text.split()[2] for text in blocks("console") if text.startswith("$ python ")}
    assert started == {f"examples/{name}" for name in NAMES}
    for name in NAMES:
        assert f"`{name}`" in README


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_it_takes_and_the_readme_too(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}:
        assert option in README, option


def test_every_component_is_one() -> None:
    components = [RewardComponent.model_validate(json.loads(text)) for text in blocks("json")]
    assert [component.name for component in components] == ["words", "judge", "answer"]


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(((?!https?://|#)[^)]+)\)", README):
        assert (EXAMPLES / target).exists(), target
