"""The predicted bound of a whole map's drop: what the screen says together, and what probes add for the rest."""

from collections.abc import Mapping

from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.evidence.predict import Predictor
from precimap.searching.pairs import Key


def bound(
    predictor: Predictor | None, known: Mapping[Key, LayerEvidence], choice: Mapping[str, str], margin: float
) -> float:
    """The predicted upper bound of a whole map's drop, without credit for layers that surely improve it.

    Where a guard fills more of its margin than the gate of `margin`, its bound counts, in units of the gate's. The screen
    speaks for the layers that the audit left to it; others add what their probes measured, unit by unit, or, where those
    saw fewer units, the upper bound of the probe. Infinite where nothing is predicted.
    """
    keys = list(choice.items())
    told = [] if predictor is None else [key for key in keys if predictor.tells(key)]
    comparison = None if predictor is None else predictor.comparison(told)
    if comparison is None:
        return float("inf")
    upper = comparison.strictest(margin)
    for key in keys:
        decisive = known[key].decisive
        if key not in told:
            upper += max(0.0, decisive.upper) if decisive is not None else float("inf")
        elif decisive is not None and decisive.upper < 0:
            upper -= decisive.drop.estimate
    return upper
