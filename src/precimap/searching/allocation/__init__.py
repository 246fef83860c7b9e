"""Which layer gets which scheme: pure functions of tables, and no torch but in `rules.py`, which makes the tables.

rules.py      the two ways to a chain: knapsack and threshold
knapsack.py   the most time saved for what a map costs, as a nested chain
ladders.py    the table of options read into items that move as one, and the inputs that they share
climbing.py   how the items of one family climb
repair.py     neighbours of a map, on the superposed metric
threshold.py  each layer by itself
"""
