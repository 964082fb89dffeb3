"""What README and CONTRIBUTING say is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_command_named_in_the_docs_exists() -> None:
    texts = [README, (ROOT / "CONTRIBUTING.md").read_text()]
    named = {name for text in texts for name in re.findall(r"\bmake ([a-z]+)`", text)}
    assert named
    assert named <= TARGETS


def test_every_make_command_is_in_the_readme() -> None:
    assert {f"make {name}" for name in TARGETS - {"help"}} <= set(
        re.findall(r"make [a-z]+", README)
    )


def test_no_page_has_a_placeholder() -> None:
    pages = [*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert [page.name for page in pages if "@@" in page.read_text()] == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    for document in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]:
        for target in re.findall(r"\]\(((?!https?://|#|mailto:)[^)]+)\)", document.read_text()):
            path = document.parent / target.partition("#")[0]
            assert path.exists(), f"{document.relative_to(ROOT)} links to {target}"
