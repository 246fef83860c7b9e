"""What low precision takes on this machine, timed here.

times.py   where times come from: a profile, or this machine
timed.py   each distinct module once, on the target
forms.py   the whole models that are held against each other, each made once
form.py    in which form of the hardware whole models are faster, before any layer is judged
shapes.py  how many different shapes the batches give the model
whole.py   a whole map, deployed as it will be served, against the base model and its rivals
"""
