"""Is what was exported the model that was certified? Its scores beside those, on calibration batches.

Invariant: the task's own forward runs both, so that what is compared is what the metric sees. The yardstick is what the
map itself changes of the scores: an export that lost a layer's low precision differs by about as much as that, and one
that differs by more than twice is another model and is refused. Counting the low products is the exporter's own work; a
difference cannot prove them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.exporting.exported import Difference
from precimap.exporting.shipped import Shipped
from precimap.layers.copying import shared_copy
from precimap.targets import target_of
from precimap.user_code import called

MOST = 2.0  # times what the map itself changes


def served_by(model: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """`model`, whose calls are `call`; its attributes are the model's own, for a forward that reads them."""
    made = shared_copy(model)
    made._compiled_call_impl = call
    return made


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Scores of the certified form and of the original model: what every engine that serves the files is held against."""

    shipped: Shipped
    batches: tuple[Any, ...]
    expected: Tensor
    original: Tensor

    def beside(self, call: Callable[..., Any]) -> Difference:
        """Scores of calls of what was exported.

        Raises DeployError for scores of another shape, that are NaN, or that are those of another model.
        """
        expected = self.expected
        exported = _scores(self.shipped, served_by(self.shipped.model, call), self.batches, "exported model")
        if exported.shape != expected.shape or not torch.isfinite(exported).equal(torch.isfinite(expected)):
            raise DeployError(
                f"what was exported gives scores {tuple(exported.shape)}, {int((~torch.isfinite(exported)).sum())} "
                f"of them not finite; the certified form {tuple(expected.shape)}, "
                f"{int((~torch.isfinite(expected)).sum())} of them"
            )
        finite = torch.isfinite(expected)
        off, quantising = (_rms((one - expected)[finite]) for one in (exported, self.original))
        found = Difference(
            against=target_of(self.shipped.map.target).name,
            rms=off,
            largest=float((exported - expected)[finite].abs().max()),
            largest_output=float(expected[finite].abs().max()),
            quantising=quantising,
            units=len(expected),
            batches=len(self.batches),
        )
        if off > MOST * quantising + 1e-5 * found.largest_output:
            raise DeployError(
                f"what was exported computes another model: its scores are off by {off:.3g} (root mean square, n = "
                f"{found.units}), and the map itself changes them by {quantising:.3g} only"
            )
        return found


def reference(shipped: Shipped, batches: Iterable[Any]) -> Reference:
    """Scores the batches, once for all engines."""
    batches = tuple(batches)
    shipped.progress("compare", 0, 2)
    with target_of(shipped.map.target).running(shipped.model, shipped.layers) as certified:
        expected = _scores(shipped, certified, batches, "certified form")
    shipped.progress("compare", 1, 2)
    original = _scores(shipped, shipped.task.model, batches, "original model")
    shipped.progress("compare", 2, 2)
    return Reference(shipped, batches, expected, original)


def _scores(shipped: Shipped, model: nn.Module, batches: Iterable[Any], what: str) -> Tensor:
    with torch.no_grad(), called("forward", f"a calibration batch under the {what}"):
        return torch.cat([shipped.task.forward(model, batch).double() for batch in batches])


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
