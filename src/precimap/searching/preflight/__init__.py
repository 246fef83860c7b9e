"""What is looked at before the long work, and what is refused there.

checks.py            the task: every batch looked at, one through everything
split_checks.py      the splits: their sizes, clusters and slices, and that they are apart
own_model.py         does the forward compute with the model that it is given, and leave it as it was?
in_place.py          what a forward writes into a table
batches.py           a batch cut, or made larger or smaller, along its units
trial.py             each layer in each scheme once, by itself
batch_invariance.py  does a score depend on the rest of its batch?
sample_size.py       which margins the splits can certify, and how many units a margin takes
"""
