"""The proof: maps judged once, on data that chose nothing.

certify.py         a fixed sequence of maps on the certify split
ledger.py          what that split has given away
recertify.py       one given map
rounding_draws.py  beside the certificate: the lottery of the rounding grid
"""
