"""WHICH layer gets which scheme: from a Task to a certified map.

pipeline.py    search(), the way as a whole
run.py         what every step works with; every score is in the journal before it is used
limits.py      what the user accepts, and how hard to look
same_task.py   what a run and a question are bound to
splits/        what the three splits hold, that they are disjoint, and the units they share
own_model.py   does the forward use the model it is given, and leave it as it was
eligibility.py, preflight.py, calibrate.py   what is known before a layer is looked at
evidence/      single layers: predicted, audited, probed
allocation/    tables of numbers to a nested chain of maps
whole/         maps as wholes on the search split
certificate/   the proof on the certify split, its ledger, and the rounding lottery
"""
