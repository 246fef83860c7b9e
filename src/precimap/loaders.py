"""One loader, cut into the three splits of a Task.

Invariant: the same loader gives the same splits at every start, in the loader's own order, so that rows of one user or day
that follow each other mostly stay together and the last ones, which are the newest in logs, certify. Shuffled splits, the
alternative, would be others at every start: a run could not be taken up, and the certify split would be asked again and
again under other names.
"""

from collections.abc import Iterable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from precimap.errors import TaskError

Shares = tuple[float, float, float]
SHARES: Shares = (0.1, 0.4, 0.5)  # calibration needs few units, and the certificate as many as there are


def cut_in_order(loader: Iterable[Any], shares: Shares) -> tuple[list[Any], list[Any], list[Any]]:
    """The batches for calibration, search and certify, at least one each.

    Raises TaskError for a loader that shuffles, for fewer than three batches, and for shares that are not above zero.
    """
    if not all(0 < share < float("inf") for share in shares):
        raise TaskError(f"expected three shares above zero, such as {SHARES}, got {shares}")
    if isinstance(loader, DataLoader) and _shuffles(loader):
        raise TaskError(
            "expected a DataLoader in a fixed order, got one that shuffles; make it with shuffle=False, so that every start "
            "finds the same splits"
        )
    batches = list(loader)
    if len(batches) < 3:
        raise TaskError(f"expected at least 3 batches, one for each split, got {len(batches)}; make them smaller")
    calibration = max(1, round(len(batches) * shares[0] / sum(shares)))
    certify = max(1, round(len(batches) * shares[2] / sum(shares)))
    first = min(calibration, len(batches) - 2)
    last = max(first + 1, len(batches) - certify)
    return batches[:first], batches[first:last], batches[last:]


def _shuffles(loader: DataLoader[Any]) -> bool:
    samplers = [loader.sampler, loader.batch_sampler]
    samplers += [one.sampler for one in samplers if isinstance(one, BatchSampler)]
    return any(isinstance(one, RandomSampler) for one in samplers)
