"""Write documentation/commands.md from the commands' own help pages: nothing there is written by hand.

python scripts/make_reference.py            write it
python scripts/make_reference.py --check    exit 1 when it differs
"""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "documentation" / "commands.md"
HEAD = """# Commands

Made from the commands' help pages by `python scripts/make_reference.py`; a test holds it equal to them.

All of them: options take nnU-Net's habits (`-d 4 5`, `-device cuda`, `_` or `-` in names); `--json` prints one JSON document on
stdout where it is offered. Exit codes: 0 done (also when all was done before), 1 fault, 2 misuse, 3 some cases failed and the rest
are written, 4 the input held nothing to do, 75 stopped by a signal, run the same command again to continue.
"""


def reference() -> str:
    """The whole page."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    pages = [HEAD]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        command = getattr(importlib.import_module(module), function)
        # with the command's own settings: click keeps the help option of its first use, so another page would depend on what ran before
        settings = {**command.context_settings, "terminal_width": 110, "max_content_width": 110}
        context = click.Context(command, info_name=name, **settings)
        pages.append(f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(pages)


if __name__ == "__main__":
    text = reference()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text else 1)
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
