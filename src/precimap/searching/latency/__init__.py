"""What layers take on the target: timed here or read from a profile, and what a scheme saves of it.

serving.py  where times come from
timed.py    each distinct module once, on the target
planned.py  what each layer takes and saves, by the times of a profile
savings.py  what layers save together; siblings quantise an input once
slower.py   which of them gain nothing in the best case
"""
