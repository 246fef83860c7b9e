"""WHAT the user loses: metrics per unit, and how two models are compared on the same units."""

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
