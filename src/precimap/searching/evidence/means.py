"""Are the mean drops that the screen predicts those that probes measure?

Means are what a plan budgets, and correlation is blind to them: changes that swing about zero correlate whatever their
common shift, and that shift is what second order adds. So the audited layers of a kind, and of a scheme, are added up unit
by unit: predicted minus probed, in the metric, with the error of that difference over the units (or clusters) of the audit.

Invariant: a mean is called wrong when it is off beyond its error *and* the error would matter, for all layers of its kind
taken together, against the margin. The level is shared by all the tests of one audit (Bonferroni), so that an unbiased
screen is called wrong in at most `FALSE_ALARMS` of all audits; the alternative, a bound on a ratio, has no error rate.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from precimap.layers.inventory import Inventory
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import paired_drop
from precimap.searching.comparison import Differences, differences
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.probe import Probe
from precimap.searching.pairs import Key

FALSE_ALARMS = 0.05
MATERIAL = 0.25  # of the margin: less can be made up for by the looks at whole maps
GATE = "the gate"
Kind = tuple[str, tuple[int, ...], str]  # op, shape of the weight, scheme
Group = tuple[str, Kind | None]  # scheme, and a kind, or None for its kinds together
_Pair = tuple[Differences, Differences]  # predicted, probed


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanAgreement:
    """The mean drop of the audited layers of one group, added up, in units of the gate or of a guard.

    kind: None where all kinds under `scheme` are meant. predicted, probed: sums over the layers; error: of their
    difference, over n units. of: layers in the group; margin: of `what`. level: of the test.
    """

    scheme: str
    kind: Kind | None
    what: str
    predicted: float
    probed: float
    error: float
    layers: int
    of: int
    n: int
    clusters: int
    margin: float
    level: float

    @property
    def off(self) -> float:
        """By how much the prediction is off for all layers of the group, taken to be like those that were audited."""
        return (self.predicted - self.probed) * self.of / self.layers

    @property
    def agrees(self) -> bool:
        if self.clusters < 2:
            return True  # one value has no spread, and accuses nobody
        beyond = abs(self.predicted - self.probed) > float(stdtrit(self.clusters - 1, 1 - self.level / 2)) * self.error
        return not (beyond and abs(self.off) > MATERIAL * self.margin)


@dataclass(frozen=True, slots=True)
class MeanTest:
    """what: the gate, or a guard by its label. margin: of it. level: of the test."""

    what: str
    margin: float
    level: float


def kind_of(inventory: Inventory, key: Key) -> Kind:
    """The kind of a layer under a scheme."""
    layer = inventory.layer(key[0])
    return layer.ops[0] if layer.ops else "", layer.shape, key[1]


def said_of(kind: Kind) -> str:
    """As a report calls it."""
    op, shape, scheme = kind
    return f"{op} {'x'.join(map(str, shape))} under {scheme}"


def means_of(
    predictor: Predictor,
    probes: Sequence[Probe],
    kinds: Mapping[Key, Kind],
    distrusted: Iterable[Kind],
    margin: float,
) -> tuple[MeanAgreement, ...]:
    """Kinds first, then each scheme over the kinds of it that nothing was found against; each for gate and guards.

    kinds: of every pair that the probed ones are a sample of. distrusted: kinds that are out already. Nothing where the
    metric is not predicted.
    """
    if not predictor.predicts_metric:
        return ()
    out = set(distrusted)
    groups: dict[Kind, list[_Pair]] = {}
    for probe in probes:
        kind = kinds[probe.layer, probe.scheme]
        if kind not in out:
            groups.setdefault(kind, []).append(_predicted_and_probed(predictor, probe))
    margins = {GATE: margin, **{guard.label: guard.margin for guard in predictor.task.guarded}}
    level = FALSE_ALARMS / max(1, len(margins) * (len(groups) + len({kind[2] for kind in groups})))
    sizes, found = Counter(kinds.values()), list[MeanAgreement]()

    def ask(scheme: str, kind: Kind | None, pairs: Sequence[_Pair], size: int) -> None:
        asked = [what for what in margins if _holds(pairs, what)]
        found.extend(
            mean_agreement((scheme, kind), MeanTest(what, margins[what], level), pairs, size) for what in asked
        )

    for kind, pairs in groups.items():
        ask(kind[2], kind, pairs, sizes[kind])
    out |= {row.kind for row in found if row.kind is not None and not row.agrees}
    for scheme in dict.fromkeys(kind[2] for kind in groups):
        believed = [kind for kind in sizes if kind[2] == scheme and kind not in out]
        pairs = [pair for kind in believed for pair in groups.get(kind, [])]
        if pairs:
            ask(scheme, None, pairs, sum(sizes[kind] for kind in believed))
    return tuple(found)


def wrong_kinds(means: Iterable[MeanAgreement], kinds: Iterable[Kind]) -> list[Kind]:
    """The kinds whose mean is wrong, and all those of a scheme whose mean is."""
    wrong = {(found.scheme, found.kind) for found in means if not found.agrees}
    return [kind for kind in dict.fromkeys(kinds) if (kind[2], kind) in wrong or (kind[2], None) in wrong]


def _predicted_and_probed(predictor: Predictor, probe: Probe) -> _Pair:
    on = predictor.on(probe.numbers)
    before, task = on.reference, predictor.task
    predicted = on.scored([(probe.layer, probe.scheme)])
    return differences(task, before, predicted), differences(task, before, probe.scored)


def _of(found: Differences, what: str) -> PairedDrops:
    return found.gate if what == GATE else found.guards[what]


def _holds(found: Sequence[_Pair], what: str) -> bool:
    return what == GATE or all(what in predicted.guards and what in probed.guards for predicted, probed in found)


def mean_agreement(group: Group, test: MeanTest, found: Sequence[_Pair], size: int) -> MeanAgreement:
    """size: layers in the group, of which those `found` were audited."""
    predicted = np.sum([_of(one, test.what).d for one, _ in found], axis=0)
    probed = np.sum([_of(one, test.what).d for _, one in found], axis=0)
    sample = _of(found[0][0], test.what)
    off = paired_drop(predicted - probed, sample.units)
    return MeanAgreement(
        scheme=group[0],
        kind=group[1],
        what=test.what,
        predicted=paired_drop(predicted, sample.units).estimate,
        probed=paired_drop(probed, sample.units).estimate,
        error=off.error,
        layers=len(found),
        of=size,
        n=sample.rows,
        clusters=off.clusters,
        margin=test.margin,
        level=test.level,
    )
