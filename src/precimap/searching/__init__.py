"""WHICH layer gets which scheme: from a Task to a certified map.

In the order of imports; no arrow runs back (`tests/test_architecture.py`):

pairs.py, progress.py  a layer in a scheme; how far the work is
splits/        what the three splits hold, that they are disjoint, and the units they share
comparison.py  one model against the other on the same units: the gate, the guards, the reported metrics
run.py         a task, its journal and its deadline; every score is in the journal before it is used
realigner.py   scale and shift that bring the scores of a map back to the baseline's
function_code.py, same_task.py  what a run and a question are bound to
latency/       what layers take and save, by the times of a profile
allocation/    tables of numbers to a nested chain of maps
calibrate.py, eligibility.py  static input ranges, and which pairs may be tried at all
question.py    what is asked
subject.py     what is searched
preflight/     what is looked at, and refused, before the long work
evidence/      single layers: predicted, audited, probed
timing/        layers and whole maps, timed here
maps/          maps as wholes on the search split
certificate/   the proof on the certify split, its ledger, and the rounding lottery
worth.py      what time and bytes together are worth
answer.py, proof.py, result.py  how a search ends, and what it gives back
pipeline.py, planning.py  search() and plan(), each from the first step to the last
"""
