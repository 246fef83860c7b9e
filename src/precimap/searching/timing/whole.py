"""Time a map end to end: deployed as it will be served, against the base model and its rivals, on the task's own batches.

Invariant: all forms are called through the task's own `forward`, on the same batch, in turns, and what was measured is in
the journal before it decides anything. Only time is measured here: of the rivals (everything low, another dtype)
nobody has certified the metric. All forms are held at once, with compiled copies of their weights, or they
could not be timed in turns.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
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
from precimap.layers.casting import CASTS, cast
from precimap.layers.copying import shared_copy
from precimap.layers.given import leading_rows
from precimap.layers.prepared import prepared
from precimap.layers.target import WholeTimer
from precimap.numerics.schemes import Scheme
from precimap.precision_map import PrecisionMap
from precimap.searching.preflight.batches import resized
from precimap.searching.question import Serving
from precimap.searching.subject import Subject
from precimap.task import Task, first_batch

Call = Callable[[], Any]
Form = tuple[str, str]  # precision, and how it is served
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
    """Where and how whole maps of one search are timed. seconds: about how long, at each batch size."""

    subject: Subject
    timer: WholeTimer
    serving: Serving
    seconds: float
    _beside: dict[Form, Callable[[], nn.Module]] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        if self.subject.latency is not None:
            return self.subject.latency.batch_sizes
        return self.serving.batch_sizes or (self.subject.inventory.units,)

    def check(self) -> None:
        """Raises InputError where no batch of a size can be made: before the long work."""
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
        models = self._models(precision_map, refused)
        sizes = []
        for number, size in enumerate(self.sizes):
            self.subject.run.progress("time whole models", number, len(self.sizes))
            sizes.append(self._at(size, models, refused))
        self.subject.run.progress("time whole models", len(self.sizes), len(self.sizes))
        return EndToEnd(
            map=precision_map.fingerprint,
            device=self.timer.device(),
            served=self.timer.served,
            sizes=tuple(sizes),
            refused=refused,
            foretold=self._foretold(precision_map, sizes),
            flops=round(self.subject.inventory.flops / self.subject.inventory.units),
            peak_flops=self.timer.peak_flops(getattr(torch, task.base_precision)),
            peak_given=False,
        )

    def _models(self, precision_map: PrecisionMap, refused: dict[str, str]) -> dict[Form, nn.Module]:
        """Every form that can be made, by precision and form; the others with their reasons in `refused`."""
        own = self.timer.forms(*prepared(self.subject.run.task.model, precision_map))
        if not self._beside:
            self._beside.update(self._forms_beside())
        wanted = {**self._beside, **{(MAP, form): make for form, make in own.items()}}
        models: dict[Form, nn.Module] = {}
        for key in sorted(
            wanted, key=lambda key: PRECISIONS.index(key[0]) if key[0] in PRECISIONS else len(PRECISIONS)
        ):
            try:
                models[key] = wanted[key]()
            except DeployError as error:
                if key in self._needed:
                    raise
                refused[", ".join(key)] = str(error)
        return models

    def _forms_beside(self) -> dict[Form, Callable[[], nn.Module]]:
        """What every map is compared with; each made once, for compiling takes longer than all else here."""
        task, forms = self.subject.run.task, self.timer.forms
        made = {
            BASE: forms(task.model, {}),
            BLANKET: forms(task.model, self.subject.quantized(self._all_low())),
        }
        for name, dtype in CASTS.items():
            if dtype in self.timer.casts and name != task.base_precision:
                made[name] = forms(cast(task.model, name), {})
        return {(name, form): functools.cache(make) for name, found in made.items() for form, make in found.items()}

    @property
    def _needed(self) -> tuple[Form, Form]:
        """The forms without which there is no answer."""
        return (BASE, self.timer.served), (MAP, self.timer.served)

    def _all_low(self) -> dict[str, Scheme]:
        """Blanket low precision: every layer that can compute low does, under the shortest scheme that it can take."""
        chosen: dict[str, Scheme] = {}
        low = sorted(
            (scheme for scheme in self.subject.schemes if scheme.computes_low), key=lambda one: one.weight_bits
        )
        for scheme in low:
            for (layer, name), reason in self.subject.eligibility.refusals.items():
                if name == scheme.name and reason is None and layer not in self.subject.eligibility.pinned:
                    chosen.setdefault(layer, scheme)
        return chosen

    def _at(self, size: int, models: Mapping[Form, nn.Module], refused: dict[str, str]) -> SizeTimes:
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
                    if key in self._needed:
                        raise DeployError(f"{name}, on a batch of {size}: {type(error).__name__}: {error}") from error
                    refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_REASON]
                    continue
                cases[key] = call
            seconds = self.timer.turns({", ".join(key): call for key, call in cases.items()}, self.seconds)
            memory = {key: self.timer.peak_memory(call) for key, call in cases.items()}
        served = seconds[f"{MAP}, {self.timer.served}"]
        forms = [_form(key, seconds[", ".join(key)], served, memory[key]) for key in cases]
        return SizeTimes(units=size, rows=rows, forms=tuple(forms))

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

    def _foretold(self, precision_map: PrecisionMap, sizes: list[SizeTimes]) -> Times | None:
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


def _copied(batch: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, batch)


def _next_scored(task: Task, model: nn.Module, batches: Iterator[Any]) -> Any:
    return task.forward(model, next(batches))


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
