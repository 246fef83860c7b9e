"""Which layer gets which scheme: pure functions of tables.

layer_evidence.py  what is known of each layer under each scheme
price.py      what a layer costs the metric
table.py      what a map is chosen from: costs and gains of every open pair
rules.py      the two ways to a chain: knapsack and threshold
knapsack.py   the most time saved for what a map costs, as a nested chain
ladders.py    the table of options read into items that move as one, and the inputs that they share
climbing.py   how the items of one family climb
repair.py     neighbours of a map, on the superposed metric
threshold.py  each layer by itself
"""
