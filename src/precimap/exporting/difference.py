"""Is what was exported the model that was certified? Its scores beside those, on calibration batches.

Invariant: the task's own forward runs both, so that what is compared is what the metric sees. The yardstick is what the
map itself changes of the scores: an export that lost a layer's low precision differs by about as much as that, and one
that differs by more than twice is another model and is refused. Counting the low products is the exporter's own work; a
difference cannot prove them.
"""

from collections.abc import Callable, Iterable
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


def difference(shipped: Shipped, call: Callable[..., Any], batches: Iterable[Any]) -> Difference:
    """Scores of calls of what was exported, against the certified form and the original model, on `batches`.

    Raises DeployError for scores of another shape, that are NaN, or that are those of another model.
    """
    batches = list(batches)
    target = target_of(shipped.map.target)
    shipped.progress("compare", 0, 3)
    exported = _scores(shipped, served_by(shipped.model, call), batches, "exported model")
    shipped.progress("compare", 1, 3)
    with target.running(shipped.model, shipped.layers) as certified:
        expected = _scores(shipped, certified, batches, "certified form")
    shipped.progress("compare", 2, 3)
    original = _scores(shipped, shipped.task.model, batches, "original model")
    shipped.progress("compare", 3, 3)
    if exported.shape != expected.shape or not torch.isfinite(exported).equal(torch.isfinite(expected)):
        raise DeployError(
            f"what was exported gives scores {tuple(exported.shape)}, {int((~torch.isfinite(exported)).sum())} of "
            f"them not finite; the certified form {tuple(expected.shape)}, {int((~torch.isfinite(expected)).sum())} "
            "of them"
        )
    finite = torch.isfinite(expected)
    off, quantising = (_rms((one - expected)[finite]) for one in (exported, original))
    found = Difference(
        against=target.name,
        rms=off,
        largest=float((exported - expected)[finite].abs().max()),
        largest_output=float(expected[finite].abs().max()),
        quantising=quantising,
        units=len(expected),
        batches=len(batches),
    )
    if off > MOST * quantising + 1e-5 * found.largest_output:
        raise DeployError(
            f"what was exported computes another model: its scores are off by {off:.3g} (root mean square, n = "
            f"{found.units}), and the map itself changes them by {quantising:.3g} only"
        )
    return found


def _scores(shipped: Shipped, model: nn.Module, batches: list[Any], what: str) -> Tensor:
    with torch.no_grad(), called("forward", f"a calibration batch under the {what}"):
        return torch.cat([shipped.task.forward(model, batch).double() for batch in batches])


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
