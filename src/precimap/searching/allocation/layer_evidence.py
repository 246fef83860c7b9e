"""What is known of each layer under each scheme before a map is chosen: predicted, probed, and the time that it saves.

Invariant: *predicted* and *probed* stand side by side and are never mixed in one number; `decisive` says which of the
two decides.
"""

from dataclasses import dataclass, replace

import numpy as np

from precimap.searching.comparison import Comparison
from precimap.searching.pairs import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvidence:
    """One layer under one scheme.

    predicted: of the screen; None where it cannot tell this metric. probed: of the direct probe; None where none was
    made. loss_square: E[(change of a unit's loss)^2]. output_error: E|change of a unit's scores|^2 and its error.
    drift: mean change of the scores, or of the losses. trusted: whether the audit left the screen in charge.
    correction: mean of probed - predicted over the units that both saw, in the metric, and its error.
    saved: share of the time of all timed layers that it saves alone, see `Savings.counted`; None where nothing was timed.
    shared: what it saves beside that when a sibling has quantised its input under the same scheme.
    """

    layer: str
    scheme: str
    predicted: Comparison | None
    probed: Comparison | None
    loss_square: float
    output_error: tuple[float, float] | None
    drift: float | None
    trusted: bool
    correction: tuple[float, float] | None = None
    saved: float | None = None
    shared: float = 0.0

    @property
    def key(self) -> Key:
        return self.layer, self.scheme

    @property
    def decisive(self) -> Comparison | None:
        """What decides: the probe alone where the screen is not trusted or blind, otherwise the prediction.

        None where that probe is missing (time ran out): what is not believed decides nothing.
        A probe of a trusted layer corrects the prediction (the screen is its control variate): the difference between
        the two varies so little over units that a few of them tell it.
        """
        if self.predicted is None or not self.trusted:
            return self.probed
        return self.predicted if self.correction is None else _shifted(self.predicted, *self.correction)


def _shifted(found: Comparison, by: float, error: float) -> Comparison:
    drop = replace(found.drop, estimate=found.drop.estimate + by, error=float(np.hypot(found.drop.error, error)))
    return replace(found, drop=drop, lower=found.lower + by - 2 * error, upper=found.upper + by + 2 * error)
