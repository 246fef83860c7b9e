"""Time the layers of a model on the target, each distinct (module, dtype, rows) once.

Invariant: a time is in the journal before it is used, so that a run that is taken up again times nothing again and decides
the same; and all times of one run are from one machine.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from precimap.errors import FAILURES, InputError, JournalError, first_line
from precimap.hardware_profile import Device, HardwareProfile, LowTimes, Row, Times
from precimap.journal import Measurement, run_journal
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.stand_in import timed_codes, timed_module
from precimap.layers.target import BASE, Target, Timer
from precimap.numerics.schemes import SCHEMES, Amax, Scheme, schemes_of
from precimap.searching.calibrate import calibrated
from precimap.searching.eligibility import Eligibility, eligibility
from precimap.searching.latency.planned import Work, works
from precimap.searching.pairs import Key
from precimap.searching.preflight.checks import check_weights
from precimap.searching.preflight.trial import tried
from precimap.searching.progress import Progress, silent
from precimap.searching.question import checked_sizes
from precimap.searching.run import Run
from precimap.searching.subject import Subject, inventory_of
from precimap.targets import target_of
from precimap.task import Task

FAILED = "latency failed"  # the kind of what could not be timed, in the journal


def bench_device(
    task: Task,
    *,
    target: Target | str,
    batch_sizes: Sequence[int] = (),
    schemes: str | Scheme | Sequence[str | Scheme] = tuple(SCHEMES),
    progress: Progress = silent,
) -> HardwareProfile:
    """Time the layers of a task's model on this machine, under the schemes that the target takes there.

    target, schemes: objects or names, by default all schemes. Raises InputError for a target without time, and when it
    can run no layer in any of the schemes.
    """
    chosen, target = schemes_of(schemes), target_of(target)
    timer, sizes = target.timer, checked_sizes(batch_sizes)
    if timer is None:
        raise InputError(f"expected a target with times of its own, such as cpu-int8; {target.name} has none")
    check_weights(task)
    inventory = inventory_of(task)
    eligible = eligibility(inventory, chosen, target, ())
    _check_any(eligible)
    with run_journal(None, {}) as journal:
        run = Run(task, journal, progress)
        subject = Subject(
            run=run,
            inventory=inventory,
            schemes=chosen,
            target=target,
            eligibility=eligible,
            calibration=calibrated(run, inventory, chosen),
        )
        subject = subject.without(tried(subject, subject.pairs))
        _check_any(subject.eligibility)
        return timed(subject, timer, sizes or (inventory.units,))


def _check_any(eligible: Eligibility) -> None:
    if not eligible.open_pairs():
        raise InputError("; ".join(("nothing to time", *eligible.idle())))


def timed(subject: Subject, timer: Timer, sizes: tuple[int, ...]) -> HardwareProfile:
    """Each work once, from the journal where it holds it. What cannot be timed is not in it: `untimed` says why."""
    run, pairs, inventory = subject.run, subject.pairs, subject.inventory
    schemes: dict[str, list[Scheme]] = defaultdict(list)
    for name, scheme in pairs:
        schemes[name].append(scheme)
    asked: dict[Work, dict[str, tuple[str, Scheme | None]]] = defaultdict(dict)
    for layer in inventory.layers:
        for work in (work for size in sizes for work in works(inventory, layer, size)):
            asked[work].setdefault(BASE, (layer.name, None))
            for scheme in schemes[layer.name]:
                asked[work].setdefault(scheme.name, (layer.name, scheme))
    missing = {work: forms for work, forms in asked.items() if not _known(run, work, forms)}
    device = _device(run, timer, bool(missing))
    for done, (work, forms) in enumerate(missing.items()):
        run.progress("time layers", done, len(missing))
        _time(subject, timer, work, forms)
    run.progress("time layers", len(missing), len(missing))
    used = {scheme.name: form_of(scheme) for _, scheme in pairs}
    rows = tuple(_row(run, work, forms) for work, forms in asked.items())
    return HardwareProfile(target=subject.target.name, device=device, batch_sizes=sizes, schemes=used, rows=rows)


def _known(run: Run, work: Work, forms: Iterable[str]) -> bool:
    return all(_row_of(run, work, name) is not None for name in forms)


def _row_of(run: Run, work: Work, name: str) -> Measurement | None:
    """The times of a form, or why it has none."""
    return run.journal.find("latency", str(work), name) or run.journal.find(FAILED, str(work), name)


def _device(run: Run, timer: Timer, needed: bool) -> Device:
    """Where this run's times are from. Raises JournalError when more are `needed` and they would be from elsewhere."""
    here, found = timer.device(), run.journal.find("device", "latency")
    if found is None:
        run.journal.record("device", "latency", here.model_dump())
        return here
    there = Device(**found.value)
    if needed and there != here:
        raise JournalError(
            f"the layers of this run were timed in part elsewhere: {'; '.join(there.differences(here))}. Take it up "
            "there, or choose another run directory"
        )
    return there


def _time(subject: Subject, timer: Timer, work: Work, forms: Mapping[str, tuple[str, Scheme | None]]) -> None:
    """Time the forms that the journal lacks, in turns with the module as it is; the last row ends the work."""
    run, inventory = subject.run, subject.inventory
    lacking = [
        (layer, scheme)
        for name, (layer, scheme) in forms.items()
        if scheme is not None and _row_of(run, work, name) is None
    ]
    made = subject.codes(lacking)
    module = timed_module(run.task.model, inventory.layer(forms[BASE][0]))
    named = {layer.scheme.name: timed_codes(layer, inventory.layer(layer.name)) for layer in made}
    try:
        found = timer.seconds(module, named, work.rows, work.each)
    except FAILURES:
        fine = _timeable(run, timer, work, module, named)
        found = timer.seconds(module, fine, work.rows, work.each)  # what the module as it is raises ends the run
    for name, seconds in found.alone.items():
        if run.journal.find("latency", str(work), name) is None:
            value = {"seconds": seconds, "base": found.alone[BASE], "shared": found.shared.get(name)}
            run.journal.record("latency", str(work), value, name)


def _timeable(
    run: Run, timer: Timer, work: Work, module: nn.Module, forms: Mapping[str, QuantizedLayer]
) -> dict[str, QuantizedLayer]:
    """The forms that can be timed, each tried by itself; why the others cannot is written down."""
    fine = {}
    for name, layer in forms.items():
        try:
            timer.seconds(module, {name: layer}, work.rows, work.each)
        except FAILURES as error:
            why = f"its kernel fails on {work.rows:,} rows ({first_line(error)})"
            run.journal.record(FAILED, str(work), {"reason": why}, name)
        else:
            fine[name] = layer
    return fine


def untimed(subject: Subject, sizes: tuple[int, ...]) -> dict[Key, str]:
    """Why pairs have no time on this machine."""
    failed = {}
    for name, scheme in subject.pairs:
        layer = subject.inventory.layer(name)
        for work in (work for size in sizes for work in works(subject.inventory, layer, size)):
            found = subject.run.journal.find(FAILED, str(work), scheme.name)
            if found is not None:
                failed[name, scheme.name] = str(found.value["reason"])
    return failed


def _row(run: Run, work: Work, forms: Iterable[str]) -> Row:
    low, base = {}, None
    for name in forms:
        found = _row_of(run, work, name)
        assert found is not None
        if found.kind == FAILED:
            continue
        seconds, beside, shared = (found.value[key] for key in ("seconds", "base", "shared"))
        if name == BASE:
            base = Times.of(seconds)
        else:
            after = None if shared is None else _ratio(shared, beside)
            low[name] = LowTimes(seconds=Times.of(seconds), ratio=_ratio(seconds, beside), shared=after)
    assert base is not None
    return Row(module=work.module, dtype=work.dtype, each=work.each, rows=work.rows, base=base, low=low)


def _ratio(seconds: Sequence[float], beside: Sequence[float]) -> Times:
    return Times.of([a / b for a, b in zip(seconds, beside, strict=True)])


def form_of(scheme: Scheme) -> dict[str, Any]:
    """The scheme without what no kernel knows of: how its static input ranges were chosen."""
    return (scheme.with_range(Amax()) if scheme.needs_calibration else scheme).row()
