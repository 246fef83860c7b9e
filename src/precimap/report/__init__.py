"""The pages a person reads: tables of a run on a terminal of 80 columns.

run_record.py   a run directory, read back into values
tables.py       those values as tables
progress_bar.py progress with an ETA, on stderr
terminal.py     names and texts of others, shown so that they do nothing to the terminal
"""
