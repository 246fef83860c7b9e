"""Maps as wholes, on the search split.

assemble.py    from decisions to a PrecisionMap with a reason for every layer
whole_maps.py  predicted, then measured; which are looked at
choosing.py    the step as a whole: look, give back, fill up
rescore.py     what to give back when even the safest map fails
"""
