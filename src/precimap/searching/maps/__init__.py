"""Maps as wholes, on the search split.

assemble.py    from decisions to a PrecisionMap with a reason for every layer
candidates.py  predicted, then measured; which are looked at, and which are sent to the certificate
choosing.py    the step as a whole: look, give back, grow
casting.py     the whole model in 16 bits, alone and with the best map's layers in 8 bits
growing.py     from the best map so far to larger ones
rescore.py     what to give back when even the safest map fails
"""
