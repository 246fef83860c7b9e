"""Rounding draws: how much of a map's drop is the lottery of where its rounding grids happen to lie.

Two uncertainties, side by side and never added up. Over units: this artefact, other users; a certificate is about the
exact scales that ship and rests on this one. Over rounding: this policy, the next retrain; the same map measured on
shifted grids (`numerics/grid_shift.py`), on the same units. Not taken: redrawing units and grids together, which gives
one number that answers neither question.
"""

import math
import statistics
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from precimap.certificate import Rounding
from precimap.errors import InputError
from precimap.layers.prepared import prepared
from precimap.layers.quantized import quantize_map
from precimap.layers.target import EMULATED
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import Drop, drop_of, paired_drop
from precimap.metrics.units import Units
from precimap.numerics.grid_shift import GridShift
from precimap.precision_map import PrecisionMap
from precimap.searching.question import Effort
from precimap.searching.realigner import Realigner
from precimap.searching.run import Parts, Pass, Run, scored


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingSpread:
    """A map's drop on its own grids and on shifted ones, in the metric's own units; positive is worse.

    shipped, error_over_units: the drop on the scales that ship and its standard error over the n units. drops: on the
    shifted grids, one each. mean: of the drops, what this policy costs on average. error_over_rounding: the standard
    deviation of one drop over the draws. Part of it is each unit's own luck, which averages out over many units;
    `common` is the rest, that of the next retrain's grids for as many users as you like. From R draws a standard
    deviation is itself known to about 1 / sqrt(2 (R - 1)), 27 % for 8.
    """

    shipped: float
    error_over_units: float
    n: int
    drops: tuple[float, ...]
    mean: float
    error_over_rounding: float
    common: float


def rounding_spread(shipped: Drop, draws: NDArray[np.float64], units: Units) -> RoundingSpread:
    """Both uncertainties of a map. draws: float64 [draws, n], the drop of each unit on each shifted grid.

    `common` by analysis of variance: the variance of the draws' means less what the units' own deviations from their
    mean over draws put into it (one random effect; Searle, Casella and McCulloch 1992, "Variance Components", ch. 3).
    Raises InputError for fewer than two draws, or for drops that are not finite.
    """
    count = len(draws)
    if count < 2:
        raise InputError(f"expected at least two rounding draws to tell a spread, got {count}; draw more, or none")
    if not np.isfinite(draws).all():
        faulty = int((~np.isfinite(draws)).any(1).sum())
        raise InputError(f"expected finite drops of the rounding draws, got NaN or infinity in {faulty} of {count}")
    means = [paired_drop(draw, units).estimate for draw in draws]
    own = [paired_drop(draw - draws.mean(0), units).error ** 2 for draw in draws]
    spread = statistics.stdev(means)
    left = spread**2 - statistics.fmean(own) * count / (count - 1)
    return RoundingSpread(
        shipped=shipped.estimate,
        error_over_units=shipped.error,
        n=shipped.n,
        drops=tuple(means),
        mean=statistics.fmean(means),
        error_over_rounding=spread,
        common=math.sqrt(max(0.0, left)),
    )


def rounding_of(
    run: Run, precision_map: PrecisionMap, baseline: Parts, effort: Effort, realigner: Realigner | None = None
) -> Rounding | None:
    """Measure a map on shifted grids, as many as `Effort.rounding_draws`, on `Effort.check_units` of the search split.

    A realigned map is realigned anew on every grid, as the next retrain would be. None for a map in 16 bits alone, whose
    grid is always the same. By emulation, whatever the map's target is.
    """
    task, draws, numbers = run.task, effort.rounding_draws, baseline.scattered(effort.check_units)
    before = baseline.only(numbers)

    def drops(subject: str, shift: GridShift | None) -> PairedDrops:
        def running() -> AbstractContextManager[nn.Module]:
            repair = precision_map.realignment
            if realigner is not None and shift is not None:
                repair = realigner.fit(quantize_map(task.model, precision_map, shift))
            drawn = precision_map.model_copy(update={"realignment": repair})
            return EMULATED.running(*prepared(task.model, drawn, shift))

        asked = Pass(kind="draw", of=subject, batches=task.splits.search, running=running, numbers=numbers)
        parts = scored(run, asked)
        return task.metric.paired(before.values, parts.whole.values, before.units)

    schemes = [precision_map.scheme_of(name) for name in precision_map.low]
    if not any(scheme is not None and scheme.weight.has_scales for scheme in schemes):
        return None
    fingerprint = precision_map.fingerprint
    shipped = drops(fingerprint, None)
    shifted = []  # units of the metric are the same in every draw: they follow from labels and clusters
    for seed in range(draws):
        run.progress("rounding draws", seed, draws)
        shifted.append(drops(f"{fingerprint} on grid {seed}", GridShift(seed)).d)
    run.progress("rounding draws", draws, draws)
    spread = rounding_spread(drop_of(shipped), np.stack(shifted), shipped.units)
    return Rounding(
        shipped=spread.shipped,
        error_over_units=spread.error_over_units,
        n=spread.n,
        drops=spread.drops,
        mean=spread.mean,
        sd=spread.error_over_rounding,
        common=spread.common,
    )
