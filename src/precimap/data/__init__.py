"""The user's own logs: read by streaming, encoded as the model was trained on them, split by time or by user."""

from precimap.data.columns import CRITEO, Columns
from precimap.data.encoding import Encoding, hashed, hex_modulo, log_counts, vocabulary
from precimap.data.logs import LogBatches, Logs, Scan
from precimap.data.splits import Parts, split_by_cluster, split_by_time

__all__ = [
    "CRITEO",
    "Columns",
    "Encoding",
    "LogBatches",
    "Logs",
    "Parts",
    "Scan",
    "hashed",
    "hex_modulo",
    "log_counts",
    "split_by_cluster",
    "split_by_time",
    "vocabulary",
]
