"""The pages in docs/: their commands run, their tables are complete, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, run_bash

from kiem.core.errors import ExitCode
from kiem.reference import reference

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: str) -> str:
    """Returns the commands of a page, in a size for which a test has time."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    script = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    script = re.sub(r"--max-minutes \d+", "--max-minutes 0.02", script)
    return script.replace("train:16384", "train:2048")


@pytest.mark.slow
def test_getting_started(checkout: Path) -> None:
    done = run_bash(commands("getting-started.md"), checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nederland is" in done.stdout
    assert (checkout / "comparison.html").is_file()
    assert (checkout / "trained_models" / "third" / "final_model").is_dir()


@pytest.mark.slow
def test_your_own_language(checkout: Path, trained_run: Path, sample_texts: list[str]) -> None:
    """As printed, with Dutch text for Frisian: what is tried here is the way."""
    (checkout / "frysk").mkdir()
    for number, text in enumerate(sample_texts):
        (checkout / "frysk" / f"{number}.txt").write_text(text, encoding="utf-8")
    (checkout / "trained_models").mkdir()
    (checkout / "trained_models" / "dutch").symlink_to(trained_run)
    done = run_bash(commands("your-own-language.md"), checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    card = checkout / "trained_models" / "frysk-2" / "final_model" / "README.md"
    assert "language:\n- fy\n" in card.read_text(encoding="utf-8")
    assert "De haadstêd fan" in (checkout / "frysk.html").read_text(encoding="utf-8")


def test_the_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference(), "run: make reference"


def test_every_exit_code_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = [int(code) for code in re.findall(r"^\| (\d+) \| ", page, re.MULTILINE)]
    assert explained == [code.value for code in ExitCode]


def test_links_lead_somewhere() -> None:
    num_links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                num_links += 1
    assert num_links > 10
