"""The proof: maps judged once, on data that chose nothing.

certify.py         a fixed sequence of maps on the certify split
booking.py         pay, look, write down: the only way to a certify split
ledger.py          what that split has given away
account.py         one split's file in the ledger's directory, of this release and older ones
known_units.py     a sketch of a split's units, by which it is known again
older_prints.py    how older releases called a split
one_map.py         one given map
second_model.py    another model, or any function that returns scores
rounding_draws.py  beside the certificate: the lottery of the rounding grid
"""
