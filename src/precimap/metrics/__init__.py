"""WHAT the user loses: metrics per unit, and how two models are compared on the same units."""

from precimap.metrics.metric import LogLoss, Loss, Metric
from precimap.metrics.ranking import MRR, NDCG, Recall

__all__ = ["MRR", "NDCG", "LogLoss", "Loss", "Metric", "Recall"]
