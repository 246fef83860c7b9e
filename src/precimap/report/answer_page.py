"""What a search found, for a person in a hurry: the answer in a box, then each layer with its reason.

Invariant: drops, errors, bounds and the margin stand in one unit with the same number of digits, so that they can be
compared by eye; a name is cut only where all names are alike. Everything else that was measured is in `tables.run_page`,
which `--verbose` adds. Not taken: the statistics first, in the order in which they were made.
"""

import itertools
import math
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from precimap.certificate import Certificate, worth
from precimap.layers.target import EMULATED
from precimap.report.end_to_end_table import end_to_end_page
from precimap.report.run_record import RunRecord
from precimap.report.tables import megabytes
from precimap.report.terminal import Rows, lines_of, shown
from precimap.searching.result import SearchResult

MOST_DIGITS = 9


def answer_page(run: RunRecord) -> RenderableType:
    """The page; of a run that did not finish, what it holds and how to go on."""
    result = run.result
    if result is None:
        done = ", ".join(f"{count} of {kind}" for kind, count in run.batches.items()) or "none"
        return lines_of(
            [f"This run is not finished. The same command goes on. Batches scored so far: {done}."], "yellow"
        )
    certified = result.map.not_certified is None
    shown_first = result.map.certificate or next(iter(result.certificates), None)
    digits = _digits(result.preflight.outlook[0].margin if shown_first is None else shown_first.margin)
    lines = [result.answer[:1].upper() + result.answer[1:] + "."]
    lines += _proof(shown_first, digits) + _changes(result) + _next(run, result)
    panel = Panel(
        lines_of(lines),
        title=Text("certified" if certified else "keep the model as it is"),
        title_align="left",
        border_style="green" if certified else "yellow",
        box=box.ROUNDED,
    )
    parts: list[RenderableType] = [panel, Text(), _layers(result, digits)]
    if result.end_to_end is not None:
        parts += [Text(), end_to_end_page(result.end_to_end), Text()]
    return Group(
        *parts, *_notes(result), lines_of(["--verbose prints all that was measured, with its statistics."], "dim")
    )


def _digits(margin: float) -> int:
    """Behind the point: the margin has three that count."""
    return min(MOST_DIGITS, max(1, 2 - math.floor(math.log10(margin)))) if margin > 0 else 3


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:+.{digits}f}"


def _proof(found: Certificate | None, digits: int) -> list[str]:
    """Drop, bound and margin on one line; then every guard, and what the bound cannot see."""
    if found is None:
        return []
    if found.drop is None or found.error is None:
        return [f"No map was scored: {found.verdict}."]
    sure = f"{100 * (1 - found.alpha):g} %"
    size = f"n = {found.n:,}{worth(found.n, found.clusters, found.effective)}"
    drop = f"{_number(found.drop, digits)} ± {found.error:.{digits}f}"
    lines = [
        f"The drop of {found.metric} is {drop}, and with {sure} confidence at most {_number(found.upper, digits)}; the "
        f"margin is {found.margin:.{digits}f} ({size})."
    ]
    for name, guard in found.guards.items():
        own = _digits(guard.margin)
        lines.append(
            f"The guard {name} is {guard.verdict}: {_number(guard.drop, own)} ± {guard.error:.{own}f}, at most "
            f"{_number(guard.upper, own)}; its margin is {guard.margin:.{own}f} (n = {guard.n:,})."
        )
    if not found.certified:
        lines.append(f"Why not: {found.verdict}.")
    for name, (change, error) in found.reported.items():
        lines.append(f"Reported, and deciding nothing: the drop of {name} is {change:+.5f} ± {error:.5f}.")
    return [*lines, *found.blind_spots]


def _changes(result: SearchResult) -> list[str]:
    """What deploying the map changes: bytes, and time where it was taken."""
    found = result.map
    if not found.changes:
        return []
    before, after = map(megabytes, found.shrinks)
    lines = [f"The parameters shrink from {before} to {after}."]
    if result.end_to_end is not None:  # the answer says it
        return lines
    if result.latency is None:
        return [
            *lines,
            f"The speed-up is not known: nothing is timed for the target {found.target}; gains are counted in FLOPs.",
        ]
    return [*lines, "Single layers were timed; the whole model was not."]


def _next(run: RunRecord, result: SearchResult) -> list[str]:
    """What to type, with the task that the run itself names."""
    task = str(run.asked.get("task", "TASK"))
    if result.map.not_certified is not None:
        return [
            f"Next: precimap plan {task} --margin M says how many units a margin takes. More units, or a wider margin, may "
            "be enough for a certificate."
        ]
    deploy = f"precimap deploy {task} {run.directory / 'map.json'} --output deployed.safetensors"
    if result.map.target == EMULATED.name:
        return [
            f"Next: this map is simulated: exact, and no faster. To look at it: {deploy}. For speed, search again with a "
            "target that this machine computes, such as --target cpu-int8."
        ]
    return [f"Next: {deploy}"]


def _notes(result: SearchResult) -> list[RenderableType]:
    notes = result.preflight.notes
    return [lines_of([f"Note: {note}" for note in notes], "dim")] if notes else []


def _layers(result: SearchResult, digits: int) -> RenderableType:
    """Each layer: what it runs in, what it alone costs the metric, its share of the FLOPs, and why."""
    found = result.map
    table = Rows(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("runs in", no_wrap=True)
    table.add_column("drop alone", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    common, drops = shared_prefix(found.layers), _drops(result)
    for name, decision in found.layers.items():
        runs = Text(decision.scheme or found.cast or "as it is", style="green" if decision.scheme else "")
        scheme = decision.scheme or next((one for layer, one in drops if layer == name), "")
        drop = "" if (name, scheme) not in drops else "{:+.{d}f} ± {:.{d}f}".format(*drops[name, scheme], d=digits)
        table.add_row(name[len(common) :], runs, drop, f"{found.share_of(name):.1%}", decision.reason)
    said = [
        f"Drop: how much worse {found.premise.metric} gets; above zero is worse, for every metric. Alone: with this layer "
        "in low precision and all others as they are."
    ]
    if common:
        said.insert(0, f"All names begin with {shown(common)}")
    return Group(table, lines_of(said, "dim"))


def _drops(result: SearchResult) -> dict[tuple[str, str], tuple[float, float]]:
    """By layer and scheme the drop that decided, and its error."""
    known = () if result.evidence is None else result.evidence.known
    decided = {found.key: found.decisive.drop for found in known if found.decisive is not None}
    return {key: (drop.estimate, drop.error) for key, drop in decided.items()}


def shared_prefix(names: Iterable[str]) -> str:
    """What all names begin with, up to a dot: the rest still tells them apart."""
    every = sorted(names)
    if len(every) < 2:
        return ""
    pairs = zip(every[0].split("."), every[-1].split("."), strict=False)
    return "".join(f"{part}." for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
