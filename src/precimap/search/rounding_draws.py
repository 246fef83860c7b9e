"""Rounding draws: how much of a map's drop is the lottery of where its rounding grids happen to lie.

Two uncertainties, side by side and never added up. Over units: this artefact, other users; a certificate is about the
exact scales that ship and rests on this one. Over rounding: this policy, the next retrain; the same map measured on
shifted grids (`numerics/grid_shift.py`), on the same units. Not taken: redrawing units and grids together, which gives
one number that answers neither question.
"""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from precimap.errors import InputError, SchemeError
from precimap.layers.quantized import QuantizedLayer, quantize_map
from precimap.layers.target import EMULATED
from precimap.metrics.paired import Drop, differences, paired_drop
from precimap.numerics.grid_shift import GridShift
from precimap.precision_map import PrecisionMap, Rounding
from precimap.search.run import Parts, Run, batches_of, scattered, scored


@dataclass(frozen=True, slots=True)
class RoundingSpread:
    """A map's drop on its own grids and on shifted ones, in the metric's own units; positive is worse.

    shipped, error_over_units: the drop on the scales that ship and its standard error over the n units. drops: on the
    shifted grids, one each. mean: of the drops, what this policy costs on average; error_of_mean: its standard error
    over the draws. error_over_rounding: the standard deviation of one drop, that of the next retrain's grids; from R
    draws it is itself known to about 1 / sqrt(2 (R - 1)), 27 % for 8.
    """

    shipped: float
    error_over_units: float
    n: int
    drops: tuple[float, ...]
    mean: float
    error_of_mean: float
    error_over_rounding: float


def rounding_spread(shipped: Drop, drops: Sequence[float]) -> RoundingSpread:
    """Both uncertainties of a map. Raises InputError for fewer than two draws, or for drops that are not finite."""
    if len(drops) < 2:
        raise InputError(f"expected at least two rounding draws to tell a spread, got {len(drops)}; draw more, or none")
    if not all(math.isfinite(drop) for drop in drops):
        raise InputError(f"expected finite drops of the rounding draws, got {', '.join(f'{drop:g}' for drop in drops)}")
    spread = statistics.stdev(drops)
    return RoundingSpread(
        shipped=shipped.estimate,
        error_over_units=shipped.error,
        n=shipped.n,
        drops=tuple(drops),
        mean=statistics.fmean(drops),
        error_of_mean=spread / math.sqrt(len(drops)),
        error_over_rounding=spread,
    )


def draw_layers(model: nn.Module, precision_map: PrecisionMap, seed: int) -> dict[str, QuantizedLayer]:
    """The map's layers on the shifted grids of draw `seed`: to be measured, never shipped.

    Raises MapError as `quantize_map` does, SchemeError for a map with a scheme whose grid cannot be shifted.
    """
    return quantize_map(model, precision_map, GridShift(seed))


def rounding_of(run: Run, precision_map: PrecisionMap, baseline: Parts, draws: int, units: int) -> Rounding | None:
    """Measure a map on `draws` shifted grids, on batches of the search split with about `units` units.

    None for a map with a scheme whose grid cannot be shifted. By emulation, whatever the map's target is.
    """
    task, numbers = run.task, scattered(baseline.sizes, units)
    batches = batches_of(task.splits.search, numbers)
    before = baseline.only(numbers)

    def drop(subject: str, layers: Callable[[], Mapping[str, QuantizedLayer]]) -> Drop:
        parts = scored(run, "draw", subject, batches, lambda: EMULATED.running(task.model, layers()))
        return paired_drop(differences(task.metric, before.values, parts.whole.values), before.units)

    try:
        draw_layers(task.model, precision_map, 0)
    except SchemeError:
        return None
    fingerprint = precision_map.fingerprint
    shipped = drop(fingerprint, lambda: quantize_map(task.model, precision_map))
    drops = []
    for seed in range(draws):
        run.progress("rounding draws", seed, draws)
        layers = functools.partial(draw_layers, task.model, precision_map, seed)
        drops.append(drop(f"{fingerprint} on grid {seed}", layers).estimate)
    run.progress("rounding draws", draws, draws)
    spread = rounding_spread(shipped, drops)
    return Rounding(
        shipped=spread.shipped,
        error_over_units=spread.error_over_units,
        n=spread.n,
        drops=spread.drops,
        mean=spread.mean,
        sd=spread.error_over_rounding,
    )
