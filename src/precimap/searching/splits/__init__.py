"""What the three splits hold, that they are disjoint, and that they stay what they were.

reads.py         what of a batch the forward and the loss read
columns.py       what a batch holds of each unit, however it carries it
tables.py        tables of pyarrow, pandas and polars as columns
axes.py          along which dim of a tensor they lie, told by all batches
rows.py          rows of numbers and texts to 64-bit prints
batch_print.py   one batch: its hash, and the columns of its units
split_print.py   one split: its batches, its units, what stands in it twice
three_splits.py  the three: what they share, and that every batch is the one that was read
"""
