"""Metrics by name, as a task, a guard and the command line take them.

Invariant: a name is the one that the metric itself prints, in any case; metrics of the first k take theirs after the @.
"""

from precimap.errors import TaskError
from precimap.metrics.auc import AUC, GAUC
from precimap.metrics.click import NE, RMSE, Accuracy, Calibration, LogLoss
from precimap.metrics.metric import Loss, Metric, Perplexity
from precimap.metrics.ranking import MRR, NDCG, HitRate, Recall

_PLAIN: tuple[Metric, ...] = (
    Accuracy(),
    AUC(),
    Calibration(),
    GAUC(),
    LogLoss(),
    Loss(),
    NE(),
    Perplexity(),
    RMSE(),
)
_AT_K = (HitRate, MRR, NDCG, Recall)
_BY_NAME = {metric.name.lower(): metric for metric in _PLAIN}
_BY_NAME_AT_K = {metric(1).name.lower().partition("@")[0]: metric for metric in _AT_K}
NAMES = (*_BY_NAME, *(f"{name}@K" for name in _BY_NAME_AT_K))


def metric_of(given: Metric | str) -> Metric:
    """The metric of that name, such as `NE` or `ndcg@10`, or the one that is given. Raises TaskError for another name."""
    if not isinstance(given, str):
        return given
    name, _, k = given.lower().partition("@")
    if k.isdecimal() and name in _BY_NAME_AT_K:
        return _BY_NAME_AT_K[name](int(k))
    if given.lower() in _BY_NAME:
        return _BY_NAME[given.lower()]
    raise TaskError(f"expected a metric out of {', '.join(NAMES)}, got {given!r}; or give an object of pm.metrics")
