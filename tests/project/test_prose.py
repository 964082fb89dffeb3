"""Prose wraps at 100 columns and uses the words of CONTRIBUTING.md."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from project.measure import Tree

ROOT = Path(__file__).parents[2]


def test_paragraphs_of_markdown_wrap_at_100_columns(
    measure: ModuleType, source_tree: "Tree"
) -> None:
    violations = measure.wide_violations(source_tree, ".md")
    assert not violations, "\n".join(violations)


def test_docstrings_comments_and_markdown_use_plain_words(
    measure: ModuleType, source_tree: "Tree"
) -> None:
    violations = measure.word_violations(source_tree)
    assert not violations, "\n".join(violations)


def test_contributing_lists_each_word_that_the_check_rejects(measure: ModuleType) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [word for word in measure.DIALECT if f"`{word}`" not in text] == []


WORDS = " ".join(["word"] * 25)


def test_a_long_paragraph_is_found_and_a_table_link_or_code_block_is_not(
    measure: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "page.md").write_text(
        f"# {WORDS}\n\n{WORDS}\n\n- {WORDS}\n\n| {WORDS} |\n\n```\n{WORDS}\n```\n\n"
        f"[{WORDS}](https://example.org)\n\n`{WORDS}`\n"
    )
    tree = measure.Tree(tmp_path)
    assert measure.wide_violations(tree, ".md") == [
        "page.md:3: over 100 columns",
        "page.md:5: over 100 columns",
    ]


def test_listed_words_are_found_in_prose_and_not_in_code(
    measure: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "dar").mkdir()
    (tmp_path / "dar" / "file.py").write_text('"""Is told."""\n\ntold = "told"  # for\n# «ever»\n')
    (tmp_path / "page.md").write_text("Want\nof `law` in law.\n")
    assert measure.word_violations(measure.Tree(tmp_path)) == [
        "dar/file.py:1: told",
        "dar/file.py:4: guillemets",
        "page.md:2: law",
    ]
