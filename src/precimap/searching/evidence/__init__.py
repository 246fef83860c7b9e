"""What is found out about single layers: predicted by the screen, and probed directly.

gather.py       the step as a whole: screen, audit, probes
screen_plan.py  where rows lie in each result, and what a screen takes
screen.py       one instrumented pass: every layer's first-order effect under every scheme
predict.py      what the screen predicts of a whole map (superposition)
probe.py        one layer at a time, by replay
own_rounding.py what the model's own 16 bits make of any change
audit.py        is the screen to be believed, and which probes a decision hangs on
means.py        do the mean drops agree, which are what is budgeted
bound.py        the predicted bound of a whole map
input_rates.py  saturation and underflow of inputs, for people
floor.py        what BF16 alone does
"""
