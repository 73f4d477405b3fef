"""The Python examples of a guide run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def find_blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["coming_from_higher.md"])
def test_examples_of_a_page(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    blocks = find_blocks(page, "python")
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, example {number}", "exec"), namespace)


def test_the_output_that_the_guide_shows(capsys: pytest.CaptureFixture[str]):
    page = "coming_from_higher.md"
    (shown,) = find_blocks(page, "text")
    exec(compile("\n".join(find_blocks(page, "python")), page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_in_the_table_of_contents(page: Path):
    index = (DOCS / "index.md").read_text("utf-8")
    assert page.name == "index.md" or f"\n{page.stem}\n" in index
