"""WHAT the user loses: metrics per unit, and how two models are compared on the same units.

metric.py    what a metric keeps of each unit, and one drop per unit
click.py, auc.py, ranking.py, custom.py, reported.py  the metrics
guard.py     further metrics with margins of their own, of a slice or of one head
named.py     metrics by name
units.py, totals.py  what is resampled, and the totals of clusters
paired.py    how large a drop is, how sure, and at most
sight.py     what a sample can see, and what it cannot
power.py     how many units a question takes
"""

from precimap.metrics.auc import AUC, GAUC
from precimap.metrics.click import NE, NE_MARGINS, RMSE, Accuracy, Calibration, LogLoss
from precimap.metrics.custom import Custom
from precimap.metrics.guard import Guard, Head
from precimap.metrics.metric import Loss, Metric, PairedDrops, Perplexity, UnitMean
from precimap.metrics.ranking import MRR, NDCG, HitRate, Recall
from precimap.metrics.reported import OrderFlips, RecalibratedNE, TopKOverlap
from precimap.metrics.units import Units

__all__ = [
    "AUC",
    "GAUC",
    "MRR",
    "NDCG",
    "NE",
    "NE_MARGINS",
    "RMSE",
    "Accuracy",
    "Calibration",
    "Custom",
    "Guard",
    "Head",
    "HitRate",
    "LogLoss",
    "Loss",
    "Metric",
    "OrderFlips",
    "PairedDrops",
    "Perplexity",
    "RecalibratedNE",
    "Recall",
    "TopKOverlap",
    "UnitMean",
    "Units",
]
