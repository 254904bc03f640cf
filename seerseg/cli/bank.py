"""seerseg_bank: look at a skill bank and change it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Command, Fault, json_option, option, print_json
from seerseg.errors import SeerSegError

if TYPE_CHECKING:
    from seerseg.skills.base import Skill
    from seerseg.skills.store import BankFolder


class Group(click.Group):
    """A group whose commands read nnU-Net's spelling and turn faults into sentences."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run; a SeerSegError becomes its sentence and its exit code."""
        try:
            return super().invoke(ctx)
        except SeerSegError as error:
            raise Fault(error) from error


@click.group("seerseg_bank", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def bank() -> None:
    """Look at a skill bank and change it. Every change is a new state; none is lost.

    BANK is the folder of a bank, for instance that of a trained model: .../fold_0/bank.
    """


def _folder() -> Any:
    return click.argument("folder", metavar="BANK", type=click.Path(path_type=Path))


@bank.command("list")
@_folder()
@option("--state", type=int, metavar="N", help="An earlier state. Default: the newest.")
@option("--status", type=click.Choice(["accepted", "candidate", "retired", "all"]), default="accepted", help="Which skills.")
@json_option
def list_skills(folder: Path, state: int | None, status: str, as_json: bool) -> None:
    """List the skills: id, tag, target, what it did, the words it answers to."""
    skills = [s for s in _open(folder).skills(state).values() if status in (s.status, "all")]
    if as_json:
        print_json([s.to_json() for s in skills])
        return
    rows = [(s.id, s.tag, s.target or "-", _fate(s), _short("; ".join(s.words) or s.when, 60)) for s in skills]
    _table(("id", "tag", "target", "uses, gain, drop", "words"), rows)
    click.echo(f"{len(skills)} skills ({status}) in {folder}.")


@bank.command("show")
@_folder()
@click.argument("ids", nargs=-1, required=True, metavar="ID ...")
@json_option
def show(folder: Path, ids: tuple[str, ...], as_json: bool) -> None:
    """Show everything about some skills."""
    skills = _open(folder).skills()
    chosen = [_find(skills, key) for key in ids]
    if as_json:
        print_json([s.to_json() for s in chosen])
        return
    for skill in chosen:
        for name, value in skill.to_json().items():
            if name != "audit":
                click.echo(f"{name:>10}: {'; '.join(value) if isinstance(value, list) else value}")
        test = skill.audit.accepted
        click.echo(f"{'made by':>10}: {skill.audit.origin}, from {len(skill.audit.sources)} requests")
        click.echo(f"{'fate':>10}: {_fate(skill)}")
        if test is not None:
            click.echo(f"{'test':>10}: n {test.n}, mean gain {test.gain:+.3f}, lower bound {test.low:+.3f}, worst {test.worst:+.3f}")
        if skill.audit.note:
            click.echo(f"{'note':>10}: {skill.audit.note}")
        click.echo("")


@bank.command("add")
@_folder()
@option("--tag", required=True, metavar="TAG", help="Its kind, e.g. ABBR_DISAMBIGUATE.")
@option("--when", required=True, metavar="TEXT", help="When it fits, in words.")
@option("--what", required=True, metavar="TEXT", help='What to do, e.g. "answer lateral ventricles".')
@click.option("--word", "words", multiple=True, metavar="TEXT", help="A phrase of requests that it answers to; may be repeated.")
@option("--target", metavar="NAME", help="The name that it leads to.")
@click.option("--modality", "modalities", multiple=True, metavar="NAME", help="A modality that it fits; may be repeated.")
@click.option("--region", "regions", multiple=True, metavar="NAME", help="A body region that it fits; may be repeated.")
@option("--lesson", default="", metavar="TEXT", help="What went wrong before.")
def add(folder: Path, **given: Any) -> None:
    """Add a skill written by hand. It is used at once, and tested like any other in the next round of seerseg_evolve."""
    from seerseg.skills.base import Skill, check_skill

    skill = Skill(
        "",
        given["tag"],
        given["when"],
        given["what"],
        given["words"],
        given["target"],
        given["modalities"],
        given["regions"],
        lesson=given["lesson"],
    )
    check_skill(skill, "The skill")
    _open(folder, exists=False).change(
        lambda now: {**now, skill.id: now[skill.id].merged(skill) if skill.id in now else skill}, f"add {skill.id}"
    )
    click.echo(skill.id)


@bank.command("edit")
@_folder()
@click.argument("key", metavar="ID")
@click.option(
    "--set", "changes", multiple=True, required=True, metavar="FIELD=TEXT", help="e.g. --set lesson='not the aorta'; lists by ';'."
)
def edit(folder: Path, key: str, changes: tuple[str, ...]) -> None:
    """Change what a skill says. The changed skill is a new one with the old one's sources; the old one is retired."""
    from seerseg.errors import UsageError, did_you_mean
    from seerseg.skills.base import Skill
    from seerseg.skills.store import retire

    store = _open(folder)
    old = _find(store.skills(), key)
    line = old.to_json()
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in ("tag", "when", "what", "words", "target", "modalities", "regions", "pattern", "example", "lesson"):
            raise UsageError(f"--set {change!r} changes nothing.{did_you_mean(name, line)} Write FIELD=TEXT with a field of the skill.")
        line[name] = [v.strip() for v in value.split(";") if v.strip()] if name in ("words", "modalities", "regions") else value
    line |= {"id": "", "audit": {"origin": "hand", "sources": list(old.audit.sources), "note": f"edited from {old.id}"}}
    fresh = Skill.from_json(line, "The edited skill")
    if fresh.id == old.id:
        raise UsageError(f"The skill {old.id} already says that.")
    store.change(lambda now: {**now, old.id: retire(now.get(old.id, old), f"edited into {fresh.id}"), fresh.id: fresh}, f"edit {old.id}")
    click.echo(fresh.id)


@bank.command("retire")
@_folder()
@click.argument("ids", nargs=-1, required=True, metavar="ID ...")
@option("--note", default="retired by hand", metavar="TEXT", help="Why.")
def retire_skills(folder: Path, ids: tuple[str, ...], note: str) -> None:
    """Take skills out of use; their history stays."""
    from seerseg.skills.store import retire

    store = _open(folder)
    chosen = [_find(store.skills(), key).id for key in ids]
    store.change(lambda now: {k: retire(s, note) if k in chosen else s for k, s in now.items()}, f"retire {', '.join(chosen)[:80]}")
    click.echo(f"{len(chosen)} skills retired.")


@bank.command("history")
@_folder()
@json_option
def history(folder: Path, as_json: bool) -> None:
    """List the states of the bank."""
    heads = _open(folder).history()
    if as_json:
        print_json([h.to_json() for h in heads])
        return
    _table(("state", "made", "version", "message"), [(str(h.number), h.made, h.version[:12], h.message) for h in heads])


@bank.command("diff")
@_folder()
@click.argument("before", type=int, metavar="STATE")
@click.argument("after", type=int, required=False, metavar="[STATE]")
@json_option
def diff(folder: Path, before: int, after: int | None, as_json: bool) -> None:
    """Compare two states; the second is the newest unless given."""
    store = _open(folder)
    old, new = store.skills(before), store.skills(after)
    added = [s for k, s in new.items() if k not in old]
    gone = [s for k, s in old.items() if k not in new]
    changed = [(old[k], s) for k, s in new.items() if k in old and old[k].status != s.status]
    if as_json:
        print_json(
            {"added": [s.id for s in added], "removed": [s.id for s in gone], "status": {b.id: [a.status, b.status] for a, b in changed}}
        )
        return
    for sign, skills in (("+", added), ("-", gone)):
        for skill in skills:
            click.echo(f"{sign} {skill.id}  {skill.tag}  {skill.target or '-'}  {skill.status}  {_short('; '.join(skill.words), 60)}")
    for a, b in changed:
        click.echo(f"~ {b.id}  {a.status} -> {b.status}  {b.audit.note}")
    click.echo(f"{len(added)} added, {len(gone)} removed, {len(changed)} of another status.")


@bank.command("undo")
@_folder()
@option("--to", type=int, metavar="N", help="Go to this state instead of the one before.")
def undo(folder: Path, to: int | None) -> None:
    """Go back to the state before, or to any state."""
    store = _open(folder)
    head = store.undo() if to is None else store.restore(to)
    click.echo(f"State {head.number}: {head.message}, {len(store.skills())} skills.")


@bank.command("merge")
@_folder()
@click.argument("others", nargs=-1, metavar="[BANK ...]", type=click.Path(path_type=Path))
def merge(folder: Path, others: tuple[Path, ...]) -> None:
    """Take in what other banks hold, and what processes handed in. The order of the banks does not matter."""
    from seerseg.skills.store import BankFolder, merge_skills

    store = _open(folder, exists=False)
    found = [_open(other).skills().values() for other in others]
    taken = len(store.waiting())
    BankFolder(folder).change(lambda now: merge_skills(now.values(), *found), f"merge {len(others)} banks, {taken} hand-ins")
    click.echo(f"{len(store.skills())} skills after {len(others)} banks and {taken} hand-ins.")


@bank.command("export")
@_folder()
@click.argument("target", metavar="FILE.jsonl|DIR", type=click.Path(path_type=Path))
@option("--format", "form", type=click.Choice(["jsonl", "skill_md"]), default="jsonl", help="One file, or a folder of SKILL.md files.")
def export(folder: Path, target: Path, form: str) -> None:
    """Write the skills in use to a file, or to a folder in the convention of agent skills."""
    from seerseg.skills.markdown import write_folder
    from seerseg.skills.store import write_skills

    kept = [s for s in _open(folder).skills().values() if s.status == "accepted"]
    if form == "jsonl":
        write_skills(target, kept)
    else:
        write_folder(target, kept)
    click.echo(f"{len(kept)} skills are in {target}.")


@bank.command("import")
@_folder()
@click.argument("source", metavar="FILE.jsonl|DIR", type=click.Path(path_type=Path))
def import_skills(folder: Path, source: Path) -> None:
    """Take in skills from a bank file or a folder of SKILL.md files. They are candidates until they pass the test of seerseg_evolve, unless
    their audit says that they passed one."""
    from dataclasses import replace

    from seerseg.skills.markdown import read_folder
    from seerseg.skills.store import merge_skills, read_skills

    found = read_folder(source) if source.is_dir() else read_skills(source)
    taken = [replace(s, status="candidate") if s.status == "accepted" and s.audit.accepted is None else s for s in found]
    _open(folder, exists=False).change(lambda now: merge_skills(now.values(), taken), f"import {source.name}")
    click.echo(f"{len(taken)} skills taken in, {sum(s.status == 'candidate' for s in taken)} of them candidates.")


def _open(folder: Path, *, exists: bool = True) -> BankFolder:
    from seerseg.errors import BankError
    from seerseg.skills.store import BankFolder

    store = BankFolder(folder.expanduser())
    if exists and store.head() is None and not store.waiting():
        raise BankError(f"There is no skill bank in {folder}. Make one with seerseg_evolve, or with seerseg_bank add.")
    return store


def _find(skills: dict[str, Skill], key: str) -> Skill:
    from seerseg.errors import BankError, did_you_mean

    if key in skills:
        return skills[key]
    starts = [k for k in skills if k.startswith(key)]
    if len(starts) == 1:
        return skills[starts[0]]
    raise BankError(f"The bank has no skill {key!r}.{did_you_mean(key, skills)} seerseg_bank list shows them all.")


def _fate(skill: Skill) -> str:
    audit = skill.audit
    return f"{audit.uses}, {audit.gain:+.2f}, {-audit.drop:+.2f}" if audit.uses else "not used"


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
