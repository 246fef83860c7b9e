"""What layers take and save on the target, by the times of a profile; no torch.

planned.py  what each layer takes and saves
savings.py  what layers save together; siblings quantise an input once
slower.py   which of them gain nothing in the best case
"""
