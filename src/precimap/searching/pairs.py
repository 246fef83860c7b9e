"""What a search chooses between: a layer in a scheme.

A pair holds the scheme itself, a key its name: tables, journals and maps know schemes by name.
"""

from precimap.numerics.schemes import Scheme

Pair = tuple[str, Scheme]
Key = tuple[str, str]  # layer, scheme name


def key_of(pair: Pair) -> Key:
    return pair[0], pair[1].name
