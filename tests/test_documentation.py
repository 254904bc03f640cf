"""Documents that cannot drift: the command reference, links, the README's commands, paths that are named."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "documentation").rglob("*.md"), *(ROOT / "seerseg").rglob("*.md")])


def test_the_command_reference_is_the_commands_own_help() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))["reference"]()
    assert (ROOT / "documentation" / "commands.md").read_text(encoding="utf-8") == made, "run: python scripts/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readme_names_both_set_up_commands_and_they_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert f"bash {script}" in text
        assert (ROOT / script).is_file()


def options_of_all_commands() -> set[str]:
    text = (ROOT / "documentation" / "commands.md").read_text(encoding="utf-8")
    return set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", text))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ("commands.md", "CHANGELOG.md", "experiments.md")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_seerseg_lines_in_the_documents_use_options_that_exist(page: Path) -> None:
    known = options_of_all_commands()
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("seerseg_"):
                for option in re.findall(r"(?<=\s)(--?[a-z][\w-]*)", line):
                    assert option in known, f"{page.name}: {line.strip()!r} uses {option}"
