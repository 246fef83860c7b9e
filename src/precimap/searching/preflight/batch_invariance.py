"""Does a unit's answer depend on the batch that it came in? Measured, where one scale is shared by a whole input.

Invariant: only the cutting differs. The first search batch is scored as one and in parts, with all eligible layers in
the scheme, by the same codes; what the base model itself does when it is cut (another kernel for another size) is
measured on the same parts and said beside it. The alternative, to name such schemes and measure nothing, leaves the
reader to guess whether it matters. A batch has no description: its units are found as the rows of its tensors, and where
the base model does not give the parts the scores of the whole, they are not. Parts keep the padding of the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precimap.errors import TaskError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer
from precimap.metrics.paired import Drop, drop_of
from precimap.numerics.schemes import SCHEMES, Granularity, Scheme
from precimap.searching.preflight.batches import cut
from precimap.searching.subject import Subject
from precimap.task import Scored, Task, first_batch, join_parts, judge_scores
from precimap.user_code import called

PARTS = 8  # beside halves; single units where a batch has no more than these
# A base model whose scores move by more of their own size when its batch is cut was not cut along its units.
CUT_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class CutScores:
    """What cutting a batch of n units into `parts` does to their scores and to the gate.

    rms, largest: of one unit's change (the root mean square over its scores), over the root mean square of what
    quantising changes in the uncut batch. change: of the gate metric, paired by unit; positive is worse in parts.
    base_*: the same for the model as given, on the same scale. None where quantising changes no score.
    """

    parts: int
    rms: float | None
    largest: float | None
    base_rms: float | None
    base_largest: float | None
    change: Drop
    base_change: Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDependence:
    """One scheme with a scale over the whole input. layers: that were in it. refused: why nothing was measured, or None.

    alternatives: the schemes of the same formats under which a unit's answer is its own.
    """

    scheme: str
    metric: str
    layers: int
    n: int
    cuts: tuple[CutScores, ...]
    refused: str | None
    alternatives: tuple[str, ...]

    @property
    def note(self) -> str:
        """The finding in two or three sentences."""
        said = (
            f"{self.scheme} uses one scale for all of a layer's input, so a score can depend on the rest of its batch"
        )
        other = "" if not self.alternatives else f" It cannot under {' or '.join(self.alternatives)}."
        if self.refused is not None:
            return f"{said}; by how much was not measured: {self.refused}.{other}"
        parts = " and ".join(_cut_into(cut, self) for cut in self.cuts)
        said += f". The first search batch of {self.n} was scored in {parts}, too, with {self.layers} layers in it"
        if not any(cut.rms for cut in self.cuts):
            return f"{said}: no score moved.{other}"
        return f"{said}. {' '.join(_sentence(cut, self) for cut in self.cuts if cut.rms)}{other}"


def shares_a_scale(scheme: Scheme) -> bool:
    """Whether units of one batch share a scale that is computed from all of them."""
    given = scheme.input
    return given is not None and given.has_scales and given.dynamic and given.granularity is Granularity.PER_TENSOR


def batch_dependence(subject: Subject) -> tuple[BatchDependence, ...]:
    """Measure every scheme that shares a scale over the batch, with all its eligible layers in it; () where none does.

    Costs a scoring of the first search batch for each such scheme, one for the
    base model, and each twice more in parts. Raises TaskError as `score`.
    """
    task, pairs = subject.task, subject.eligibility.open_pairs()
    coupled = [one for one in subject.schemes if shares_a_scale(one) and any(name == one.name for _, name in pairs)]
    if not coupled:
        return ()
    batch = first_batch(task, task.splits.search)
    base = _Scores.of(task, {}, [batch])
    n = len(base.rows)
    cuts = _cuts(task, batch, base)
    refused = cuts if isinstance(cuts, str) else None
    found = []
    for scheme in coupled:
        choice = {layer: scheme for layer, name in pairs if name == scheme.name}
        measured: tuple[CutScores, ...] = ()
        if not isinstance(cuts, str):
            layers = subject.quantized(choice)
            whole = _Scores.of(task, layers, [batch])
            measured = tuple(
                _compared(task, (base, base_cut), (whole, _Scores.of(task, layers, parts))) for parts, base_cut in cuts
            )
        found.append(
            BatchDependence(
                scheme=scheme.name,
                metric=task.metric.name,
                layers=len(choice),
                n=n,
                cuts=measured,
                refused=refused,
                alternatives=alternatives(scheme),
            )
        )
    return tuple(found)


def alternatives(scheme: Scheme) -> tuple[str, ...]:
    """The named schemes whose input has the same kind of format and no scale over the batch."""
    if scheme.input is None:
        return ()
    format = scheme.input.format
    return tuple(
        f"{name} ({'a scale for each token' if other.input.dynamic else 'a fixed scale'})"
        for name, other in SCHEMES.items()
        if other.input is not None
        and not shares_a_scale(other)
        and (type(other.input.format), other.input.format.bits) == (type(format), format.bits)
        and other.weight.format == scheme.weight.format
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """A batch scored in parts (or as one): float64 [units, scores of a unit] on the CPU, and what the metrics say."""

    rows: Tensor
    parts: int
    judged: Scored

    @classmethod
    def of(cls, task: Task, layers: Mapping[str, QuantizedLayer], parts: Sequence[Any]) -> "_Scores":
        rows, judged = [], []
        with torch.no_grad(), quantized(task.model, layers):
            for number, part in enumerate(parts):
                place = f"part {number} of the first batch of the search split"
                with called("forward", place):
                    scores = task.forward(task.model, part)
                judged.append(judge_scores(task, scores, part, place))
                rows.append(scores.detach().double().cpu().reshape(scores.shape[0], -1))
        if len({each.shape[1] for each in rows}) > 1:
            raise TaskError("a unit has another number of scores in another part")
        return cls(torch.cat(rows), len(parts), join_parts(task, judged))


def _cuts(task: Task, batch: Any, base: _Scores) -> list[tuple[list[Any], _Scores]] | str:
    """The parts, in halves and smaller, with the base model's scores of them; or why the batch cannot be cut."""
    n, cuts = len(base.rows), []
    if n < 2:
        return "the first search batch holds one unit"
    for count in sorted({2, min(PARTS, n)}):
        parts = cut(batch, n, count)
        if parts is None:
            return "nothing in the batch has one row per unit"
        try:
            in_parts = _Scores.of(task, {}, parts)
        except (TaskError, RuntimeError, ValueError, LookupError, TypeError) as error:
            # The user's forward need not be made for parts of what its loader gives.
            return f"forward failed on one of {count} parts of the batch: {type(error).__name__}: {error}"
        refused = _not_cut(base, in_parts, count)
        if refused is not None:
            return refused
        cuts.append((parts, in_parts))
    return cuts


def _not_cut(base: _Scores, in_parts: _Scores, count: int) -> str | None:
    """Why the parts are not the units of the batch, as the base model tells; None when they are."""
    if in_parts.rows.shape != base.rows.shape:
        return f"in {count} parts forward gave {tuple(in_parts.rows.shape)} scores, and {tuple(base.rows.shape)} as one"
    moved, size = _rms(_moved(base, in_parts)), _rms(base.rows[base.rows.isfinite()])
    if moved > CUT_TOLERANCE * size:
        return f"the base model's scores move by {moved / size:.0%} of their size in {count} parts: not cut along its units"
    return None


def _compared(task: Task, base: tuple[_Scores, _Scores], quantised: tuple[_Scores, _Scores]) -> CutScores:
    """base, quantised: the batch as one, and in parts."""
    effect = _rms(_moved(base[0], quantised[0]))

    def relative(one: _Scores, other: _Scores) -> tuple[float | None, float | None]:
        if effect == 0:
            return None, None
        units = _moved(one, other).square().mean(dim=1).sqrt()
        return _rms(units) / effect, float(units.max()) / effect

    def change(one: _Scores, other: _Scores) -> Drop:
        sample = task.metric.paired(one.judged.values, other.judged.values, one.judged.units)
        return drop_of(sample)

    (rms, largest), (base_rms, base_largest) = relative(*quantised), relative(*base)
    return CutScores(
        parts=quantised[1].parts,
        rms=rms,
        largest=largest,
        base_rms=base_rms,
        base_largest=base_largest,
        change=change(*quantised),
        base_change=change(*base),
    )


def _moved(one: _Scores, other: _Scores) -> Tensor:
    """other - one, float64 [units, scores]; 0 where a score is masked by an infinity."""
    difference = other.rows - one.rows
    return torch.where(difference.isfinite(), difference, 0.0)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _cut_into(found: CutScores, of: BatchDependence) -> str:
    return "single units" if found.parts == of.n else f"{found.parts} parts"


def _sentence(found: CutScores, of: BatchDependence) -> str:
    """Of a cut that moved scores."""
    assert found.rms is not None
    assert found.largest is not None
    assert found.base_rms is not None
    return (
        f"In {_cut_into(found, of)} scores moved by {_share(found.rms)} of what quantising changes (root mean square; at "
        f"most {_share(found.largest)}), and the drop of {of.metric} by {_with_error(found.change)}; without low precision "
        f"by {_share(found.base_rms)} and {_with_error(found.base_change)}."
    )


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{100 * value:.0e}%"


def _with_error(drop: Drop) -> str:
    return f"{drop.estimate:+.2g} ± {drop.error:.1g}"
