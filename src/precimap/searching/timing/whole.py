"""Time a map end to end: deployed as it will be served, against the base model and its rivals, on the task's own batches.

Invariant: all forms are called through the task's own `forward`, on the same batch, in turns, and what was measured is in
the journal before it decides anything. Only time is measured here: of the rivals (everything low, another dtype)
nobody has certified the metric. All forms are held at once, with compiled copies of their weights, or they
could not be timed in turns.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from precimap.end_to_end import BASE, BLANKET, MAP, EndToEnd, FormTimes, SizeTimes
from precimap.errors import DeployError, InputError, JournalError, first_line
from precimap.hardware_profile import Times
from precimap.layers.copying import shared_copy
from precimap.layers.given import leading_rows
from precimap.layers.target import WholeTimer
from precimap.numerics.schemes import Scheme
from precimap.precision_map import PrecisionMap
from precimap.searching.preflight.batches import resized
from precimap.searching.question import Serving
from precimap.searching.subject import Subject
from precimap.searching.timing.forms import Form, ModelForms
from precimap.searching.timing.shapes import too_many_shapes
from precimap.task import Task, first_batch

Call = Callable[[], Any]
PRECISIONS = (BASE, MAP, BLANKET)  # in the order of the tables; casts come last
# What a user's model, or torch.compile on it, raises where a form is none for it.
_FAILURES = (DeployError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_LONGEST_REASON = 200
_NO_BATCH_HINT = (
    "Give the data in batches as they are served, and no batch sizes; or --timing-seconds 0, to time no whole model"
)
COPIES = 8  # of a batch, in turns: more than a target keeps codes of, which nothing that is served would find again


def _no_batch(size: int) -> str:
    return f"no batch of {size} can be made of the first search batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeModelBench:
    """Where and how whole maps of one search are timed. seconds: about how long at each batch size, where it is close.

    forms: what is timed. served: the last map that was timed here, as it runs, by its fingerprint: to compile it again for
    its certificate would take as long as much of a search.
    """

    forms: ModelForms
    serving: Serving
    seconds: float
    served: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        return self.forms.subject

    @property
    def timer(self) -> WholeTimer:
        return self.forms.timer

    @property
    def sizes(self) -> tuple[int, ...]:
        if self.subject.latency is not None:
            return self.subject.latency.batch_sizes
        return self.serving.batch_sizes or (self.subject.inventory.units,)

    def check(self) -> None:
        """Raises InputError where no batch of a size can be made, or the form is none for so many shapes: before the long
        work."""
        many = too_many_shapes(self.subject, self.timer.most_shapes(self.timer.served))
        if many is not None:
            raise InputError(f"expected fewer shapes for the form {self.timer.served}: {many}. Choose another form")
        for size in self.sizes:
            if size == self.subject.inventory.units:
                continue
            with torch.no_grad():
                try:
                    scored = len(self.subject.run.task.forward(self.subject.run.task.model, *self._batches(size, 1)))
                except _FAILURES as error:
                    raise InputError(f"{_no_batch(size)}: forward fails on one ({first_line(error)})") from error
            if scored != size:
                raise InputError(f"{_no_batch(size)}: forward gives {scored:,} scores for one. {_NO_BATCH_HINT}")

    def times(self, precision_map: PrecisionMap) -> EndToEnd:
        """Of one map with at least one layer in low precision; from the journal where it holds them.

        Raises DeployError when the map, or the base model, does not run in the form that is served; JournalError when
        the layers of this run were timed on another machine.
        """
        subject = f"{precision_map.fingerprint} at {', '.join(map(str, self.sizes))}"
        found = self.subject.run.journal.find("end to end", subject)
        if found is None:
            self._check_device()
            times = self._measured(precision_map)
            self.subject.run.journal.record("end to end", subject, times.model_dump(mode="json"))
        else:
            times = EndToEnd.model_validate_json(json.dumps(found.value))
        given = None if self.serving.peak_tflops is None else 1e12 * self.serving.peak_tflops
        return times if given is None else times.model_copy(update={"peak_flops": given, "peak_given": True})

    def _check_device(self) -> None:
        here, timed = self.timer.device(), self.subject.latency
        if timed is not None and timed.device != here:
            raise JournalError(
                f"the layers of this run were timed elsewhere: {'; '.join(timed.device.differences(here))}. Take it up "
                "there, or choose another run directory"
            )

    def _measured(self, precision_map: PrecisionMap) -> EndToEnd:
        task, refused = self.subject.run.task, dict[str, str]()
        own = self.forms.of(precision_map)
        wanted = {**self.forms.rivals(), **{(MAP, form): make for form, make in own.items()}}
        self.served.clear()
        sizes = self._timed(wanted, ((BASE, self.timer.served), (MAP, self.timer.served)), refused)
        self.served[precision_map.fingerprint] = own[self.timer.served]()
        return EndToEnd(
            map=precision_map.fingerprint,
            device=self.timer.device(),
            served=self.timer.served,
            sizes=sizes,
            refused=refused,
            foretold=self._foretold(precision_map, sizes),
            flops=round(self.subject.inventory.flops / self.subject.inventory.units),
            peak_flops=self.timer.peak_flops(getattr(torch, task.base_precision)),
            peak_given=False,
        )

    def beside(self, schemes: Sequence[Scheme], casts: bool) -> tuple[tuple[SizeTimes, ...], dict[str, str]]:
        """Times without any map: of the base model, of everything low under each scheme ("blanket NAME") and of casts.

        schemes: the shortest; the first is the one that blanket low precision is in, where maps are compared with it. Ratios
        are to the fastest in the first form. With the reasons of what could not be timed.
        """
        refused: dict[str, str] = {}
        rivals = self.forms.rivals()
        wanted = {key: make for key, make in rivals.items() if key[0] == BASE or (casts and key[0] != BLANKET)}
        first = {form: make for (precision, form), make in rivals.items() if precision == BLANKET}
        for scheme in schemes:
            made = first if scheme == schemes[0] else self.forms.blanket(scheme)
            wanted |= {(f"{BLANKET} {scheme.name}", form): make for form, make in made.items()}
        as_it_is = next(iter(wanted))[1]  # the first of a timer's forms
        return self._timed(wanted, ((BASE, as_it_is),), refused), refused

    def _timed(
        self, wanted: Mapping[Form, Callable[[], nn.Module]], needed: Sequence[Form], refused: dict[str, str]
    ) -> tuple[SizeTimes, ...]:
        """At every batch size. What is `needed` raises DeployError if it fails; ratios are to the second of two such, or to
        the fastest in the form of the only one."""
        models: dict[Form, nn.Module] = {}
        for key in sorted(wanted, key=_place):
            try:
                models[key] = wanted[key]()
            except DeployError as error:
                if key in needed:
                    raise
                refused[", ".join(key)] = str(error)
        sizes = []
        for number, size in enumerate(self.sizes):
            self.subject.run.progress("time whole models", number, len(self.sizes))
            sizes.append(self._at(size, models, needed, refused))
        self.subject.run.progress("time whole models", len(self.sizes), len(self.sizes))
        return tuple(sizes)

    def _at(
        self, size: int, models: Mapping[Form, nn.Module], needed: Sequence[Form], refused: dict[str, str]
    ) -> SizeTimes:
        # Each begins with another unit: codes of equal inputs are found again, and what is served does not repeat itself.
        copies = [_copied(batch) for batch in self._batches(size, COPIES)]
        cases: dict[Form, Call] = {}
        with torch.no_grad():
            rows = _rows_given(self.subject.run.task, copies[0])
            for key, model in models.items():
                name = ", ".join(key)
                if name in refused:
                    continue
                call = partial(_next_scored, self.subject.run.task, model, itertools.cycle(copies))
                try:
                    call()
                    self.timer.check(model)
                except _FAILURES as error:
                    if key in needed:
                        raise DeployError(f"{name}, on a batch of {size}: {type(error).__name__}: {error}") from error
                    refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_REASON]
                    continue
                cases[key] = call
            seconds = self._turns(cases, needed)
            memory = {key: self.timer.peak_memory(call) for key, call in cases.items()}
            alike = [", ".join(key) for key in cases if key[1] == needed[0][1]]
        served = seconds[
            ", ".join(needed[1]) if len(needed) > 1 else min(alike, key=lambda name: np.median(seconds[name]))
        ]
        forms = [_form(key, seconds[", ".join(key)], served, memory[key]) for key in cases]
        return SizeTimes(units=size, rows=rows, forms=tuple(forms))

    def _turns(self, cases: Mapping[Form, Call], needed: Sequence[Form]) -> dict[str, list[float]]:
        """Seconds by name: of few turns, and of as many as `seconds` allows where these leave open what they are to decide.

        That is which of two that are needed is faster; else which form is, by the fastest of each.
        """
        named = {", ".join(key): call for key, call in cases.items()}
        first = self.timer.turns(named, 0.0)
        told = [", ".join(key) for key in needed]
        if len(told) < 2:
            forms = dict.fromkeys(form for _, form in cases)
            median = {name: float(np.median(seconds)) for name, seconds in first.items()}
            told = [min((", ".join(key) for key in cases if key[1] == form), key=median.__getitem__) for form in forms]
        if all(_told_apart(first[one], first[other]) for one, other in itertools.pairwise(told)):
            return first
        more = self.timer.turns(named, self.seconds)
        return {name: first[name] + more[name] for name in named}

    def _batches(self, size: int, count: int) -> list[Any]:
        """Of the task's first search batch, each from another one on. Raises InputError where none is of this size."""
        given, units = (
            first_batch(self.subject.run.task, self.subject.run.task.splits.search),
            self.subject.inventory.units,
        )
        made = [resized(given, units, size, first % units) for first in range(count)]
        if size == units:
            return [given if batch is None else batch for batch in made]
        if made[0] is None:
            raise InputError(f"{_no_batch(size)}: nothing in it has one row per unit. {_NO_BATCH_HINT}")
        return made

    def _foretold(self, precision_map: PrecisionMap, sizes: Sequence[SizeTimes]) -> Times | None:
        """How many times as fast the sum of single layers says that the served map is; None where that is not known."""
        if self.subject.latency is None or precision_map.cast is not None:
            return None
        saved = self.subject.latency.savings.total(
            (name, precision_map.layers[name].scheme or "") for name in precision_map.low
        )
        wholes = [_seconds(size, BASE, self.timer.served) for size in sizes]
        parts = [layers / whole for layers, whole in zip(self.subject.latency.seconds, wholes, strict=True)]
        part = min(1.0, sum(parts) / len(parts))  # alone, layers may take longer than the model that they are in
        n = min((one.n for one in self.subject.latency.saved.values()), default=1)
        median, lower, upper = (1 / max(1e-9, 1 - part * share) for share in saved)
        return Times(median=median, lower=lower, upper=upper, n=n)


def _place(key: Form) -> int:
    """In the order of the tables."""
    precision = key[0].partition(" ")[0]
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)


def _copied(batch: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, batch)


def _next_scored(task: Task, model: nn.Module, batches: Iterator[Any]) -> Any:
    return task.forward(model, next(batches))


def _told_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether their ratio within a turn has both quartiles on one side of 1."""
    ratio = Times.of([a / b for a, b in zip(one, other, strict=True)])
    return not ratio.lower <= 1 <= ratio.upper


def _seconds(size: SizeTimes, precision: str, form: str) -> float:
    return next(f.seconds.median for f in size.forms if (f.precision, f.form) == (precision, form))


def _form(key: Form, seconds: list[float], served: list[float], memory: int | None) -> FormTimes:
    return FormTimes(
        precision=key[0],
        form=key[1],
        seconds=Times.of(seconds),
        p99=float(np.percentile(np.asarray(seconds), 99)),
        ratio=Times.of([own / its for own, its in zip(seconds, served, strict=True)]),
        memory=memory,
    )


def _rows_given(task: Task, batch: Any) -> int | None:
    """Rows of the first tensor that the model itself gets; None when its parts are called, or no tensor is given."""
    model, found = shared_copy(task.model), list[int]()

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend(rows for rows in [leading_rows(args, kwargs)] if rows is not None)

    model.register_forward_pre_hook(look, with_kwargs=True)
    task.forward(model, batch)
    return found[0] if found else None
