"""Is a run taken up again by the task that began it? And is a question the one that was asked before?

Invariant: what decides a score is bound: by content, where it has any (data, weights, what the task's functions say of each
batch, the parameters of metrics, the tree of modules), and by what it does to the first search batch, where it is code
(forward, loss, a metric of the user's own, a module's class). That batch is scored at every start and compared with what the
run's first start saw. Margins are bound nowhere: other margins are asked of the same scores; they are part of a question.

The loss, and a metric's function, are known by their code as well, under one version of Python: two that agree on the first
batch are two. Not taken: that alone. Code differs between versions, and says nothing of what it calls.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from precimap.errors import JournalError, PrecimapError
from precimap.fingerprints import of_architecture, of_value
from precimap.journal import Journal
from precimap.metrics.custom import Custom
from precimap.metrics.guard import Head
from precimap.metrics.metric import Loss, Metric
from precimap.searching.function_code import PYTHON, code_of
from precimap.searching.splits.split_print import SplitPrint
from precimap.searching.splits.three_splits import SplitPrints
from precimap.task import Scored, Task

_KIND, _SUBJECT = "first batch", "search"
UNITS_COMPARED = 4096
# Another count of threads or another kernel moves losses by rounding, in steps of the base precision; not by more.
_STEPS = 4
_LOOSE = 1e-4
_TURNED = 0.01  # the share of units whose order may turn by that: two scores are nearly equal there


def terms(task: Task, split: SplitPrint) -> dict[str, str]:
    """What stands in a run's premise beside weights and data. split: the search split."""
    return {
        "architecture": of_architecture(task.model),
        "metrics": "; ".join(_said(metric) for metric in _metrics(task).values()),
        "labels, clusters, weights and slices": split.said,
    }


def question_terms(task: Task, first: Scored, prints: SplitPrints, coupled: bool) -> dict[str, str]:
    """What makes a question about the same maps another one. first: the first search batch, as the base model scores it.

    coupled: whether a unit's score depends on its batch, so that other batches are other data. The code that scores is
    known by what it made of the first search batch, to four digits, so that the question is the same on another machine.
    """
    guards = [[guard.label, _said(guard.metric), guard.margin] for guard in task.guarded]
    # An order may turn where two scores are nearly equal: fewer digits of what is no mean of losses.
    values = {name: f"{value:.1e}" for name, value in _values(task, first).items()}
    return {
        "metric": _said(task.metric),
        "guards": repr(guards),
        "data": prints.certify.whole if coupled else prints.certify.evidence,
        "searched": prints.search.evidence,  # the worst unit there counts in the bound, too
        "first batch": repr([f"{first.losses.mean():.3e}", values]),
        "functions": repr(_functions(task)),
    }


def _functions(task: Task) -> list[str]:
    """The code that a metric is made of: a function of the user's own, and the loss, where a metric is one or may be."""
    plain = [metric.metric if isinstance(metric, Head) else metric for metric in _metrics(task).values()]
    found = [code_of(metric.function) for metric in plain if isinstance(metric, Custom)]
    own = any(isinstance(one, Loss) or not type(one).__module__.startswith("precimap.") for one in plain)
    return [*found, code_of(task.loss)] if own else found


def check_first_batch(journal: Journal, task: Task, first: Scored) -> None:
    """Compare the first search batch with what the run's first start saw, and write it down there if this is the first.

    Raises JournalError that names what differs.
    """
    now = _row(task, first)
    rows = journal.conclusions(_KIND)
    if not rows:
        journal.conclude(_KIND, _SUBJECT, now)
        return
    before = rows[-1].value
    tolerance = max(_LOOSE, _STEPS * _step(task))
    for what, apart in (("loss", 0.0), ("gate", _TURNED)):
        was, is_now = np.asarray(before[what]), np.asarray(now[what])
        if was.shape != is_now.shape:
            raise _other(f"what the metric keeps of a unit was {list(was.shape)}, is {list(is_now.shape)}")
        moved = (np.abs(was - is_now) > tolerance * (1 + np.abs(was))).reshape(len(was), -1).any(1)
        if moved.mean() > apart:
            unit = int(np.flatnonzero(moved)[0])
            raise _other(
                f"the {what} of {int(moved.sum())} of {len(was)} units of the first search batch, such as unit {unit}: "
                f"{_short(was[unit])} when the run began, {_short(is_now[unit])} now"
            )
    if "code" in before and before["code"]["python"] == PYTHON and before["code"] != now["code"]:
        raise _other(
            "the code of the loss, or a value that it closes over, is another one than when the run began, though it gives "
            "the same on the first search batch"
        )
    loose = tolerance if before["loss"] == now["loss"] else max(tolerance, _TURNED)
    for name, was in before["values"].items():
        found = now["values"].get(name)
        if found is None or not np.isclose(was, found, rtol=loose, atol=loose):
            raise _other(f"{name} of the first search batch was {was} when the run began, is {found} now")


def _other(what: str) -> JournalError:
    return JournalError(
        f"this run belongs to another task: {what}. Its forward, loss, metric or modules have changed, and the scores in "
        "the run are of the old ones. Choose another run directory, or give the old task to take the run up again"
    )


def _row(task: Task, first: Scored) -> dict[str, Any]:
    chosen = slice(0, UNITS_COMPARED)
    return {
        "loss": first.losses[chosen].tolist(),
        "gate": first.values[chosen].tolist(),
        "values": _values(task, first),
        "code": {"python": PYTHON, "loss": code_of(task.loss)},
    }


def _values(task: Task, first: Scored) -> dict[str, float]:
    """Each metric's value on the first batch, where it has one there (AUC needs both classes)."""
    kept = {f"the gate {task.metric.name}": (task.metric, first.values, first.units)}
    kept |= {f"the guard {g.label}": (g.metric, *_guarded(first, g.label)) for g in task.guarded}
    kept |= {f"the reported {m.name}": (m, first.reported[m.name], first.units) for m in task.reported}
    found: dict[str, float] = {"the mean loss": float(first.losses.mean())}
    for name, (metric, values, units) in kept.items():
        for change, changed in _variants(metric, values).items():
            try:
                value = metric.value(changed, units)
            except (PrecimapError, ArithmeticError, ValueError, LookupError):
                continue  # not defined on so few rows; check_baseline judges the whole split
            if np.isfinite(value):
                found[name + change] = float(value)
    return found


def _guarded(first: Scored, label: str) -> tuple[Any, Any]:
    rows = first.slices.get(label)
    return (first.guards[label], first.units) if rows is None or not rows.any() else first.of_guard(label)


def _variants(metric: Metric, kept: np.ndarray) -> dict[str, np.ndarray]:
    """A function of the user's own is known by what it gives on the scores and on three changes of them."""
    if not isinstance(metric, Custom) or not len(kept):
        return {"": kept}
    columns = 1 + int(kept[0, 0])
    scores = kept[:, 1:columns]
    changes = {"in reverse": scores[::-1], "rounded": np.round(scores), "times ten": 10 * scores}
    varied = {f" (scores {how})": np.hstack((kept[:, :1], new, kept[:, columns:])) for how, new in changes.items()}
    return {"": kept, **varied}


def _metrics(task: Task) -> Mapping[str, Metric]:
    beside = {f"reported {metric.name}": metric for metric in task.reported}
    return {"gate": task.metric, **{f"guard {guard.label}": guard.metric for guard in task.guarded}, **beside}


def _said(metric: Any) -> str:
    """A metric's type and parameters. Functions are known by what they give, see `_values`."""
    if dataclasses.is_dataclass(metric):
        fields = {field.name: getattr(metric, field.name) for field in dataclasses.fields(metric)}
    else:
        fields = dict(getattr(metric, "__dict__", {}))
    return f"{type(metric).__qualname__}({', '.join(f'{name}={_parameter(value)}' for name, value in fields.items())})"


def _parameter(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if hasattr(value, "paired"):
        return _said(value)
    return "a function" if callable(value) else of_value(value, "a parameter of a metric")


def _step(task: Task) -> float:
    """The relative step of the model's base precision; of float32 where it has none."""
    dtype = getattr(torch, task.base_precision, torch.float32)
    return torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) and dtype.is_floating_point else 1e-7


def _short(value: Any) -> str:
    return " ".join(f"{number:.6g}" for number in np.atleast_1d(value)[:4])
