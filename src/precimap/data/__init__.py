"""The user's own logs: read by streaming, encoded as the model was trained on them, split by time or by user.

columns.py   which column of a file is what
files.py     files of rows as a stream of small tables
convert.py   columns as arrays, and the place of the first value that is none
encoding.py  how a raw value becomes the number that the model was trained on
logs.py      files of rows as the tensors that a model takes
splits.py    which rows calibrate, which choose, which certify
"""

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
