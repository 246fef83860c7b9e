"""Rows of numbers and texts to 64-bit prints, all rows at once.

Invariant: equal rows have equal prints on every machine, whatever dtype holds them: 1, 1.0 and True are one number, and
floats are compared as float32. What pads a row to the length of its batch is no content: zeros, -1 and -100 at its end,
and before its beginning where rows hold ids; of a longer run of one id at an end, one counts (at the beginning in rows of
_SEQUENCE or more).

A print is a polynomial in an odd number over mixed elements, modulo 2**64 (as in Rabin and Karp 1987, "Efficient randomized
pattern-matching algorithms"), mixed again by the finalizer of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"). Two contents share a print by accident once in 2**64; nothing here is meant against an
adversary.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Prints = NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_INEXACT, _NAN = np.uint64(1 << 62), np.uint64((1 << 62) + (1 << 61))
_PADS = (0, -1, -100)
_SEQUENCE = 8  # ids in a row: of fewer, a run at the beginning is more likely a value than padding
_AT_ONCE = 1 << 22  # elements: what a chunk of rows takes of memory, times some eight


def of_rows(values: NDArray[np.generic]) -> Prints:
    """Numbers [rows, ...] -> uint64 [rows]."""
    if values.dtype.kind == "c":
        values = np.stack((values.real, values.imag), axis=-1)
    if values.dtype.kind in "mM":
        values = values.astype(np.int64)
    wide = values.reshape(len(values), -1)
    step = max(1, _AT_ONCE // max(1, wide.shape[1]))
    parts = [_of_chunk(wide[start : start + step]) for start in range(0, len(wide), step)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def of_segments(values: NDArray[np.generic], lengths: NDArray[np.int64]) -> Prints:
    """Numbers [total, ...] that lie end to end, and how many belong to each row -> uint64 [rows]."""
    each = of_rows(values) if values.ndim > 1 else finished(_numbers(values))
    lengths = lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(each)) - np.repeat(starts, lengths)
    terms = each * _powers(int(lengths.max(initial=0)))[place]
    sums = np.concatenate(([np.uint64(0)], np.cumsum(terms, dtype=np.uint64)))
    return finished(sums[starts + lengths] - sums[starts] + lengths.astype(np.uint64))


def of_texts(texts: Sequence[str | bytes]) -> Prints:
    """Each text by its UTF-8 bytes -> uint64 [texts]."""
    found = (t if isinstance(t, bytes) else t.encode("utf-8", "surrogatepass") for t in texts)
    return np.array(
        [int.from_bytes(hashlib.blake2b(t, digest_size=8).digest(), "little") for t in found], dtype=np.uint64
    )


def finished(values: Prints) -> Prints:
    """Each number mixed, so that sums of them collide by accident alone."""
    found = (values + _BASE).astype(np.uint64)
    found ^= found >> np.uint64(30)
    found *= np.uint64(0xBF58476D1CE4E5B9)
    found ^= found >> np.uint64(27)
    found *= np.uint64(0x94D049BB133111EB)
    found ^= found >> np.uint64(31)
    return found


def _of_chunk(values: NDArray[np.generic]) -> Prints:
    """[rows, elements]"""
    codes = _numbers(values)
    if not codes.shape[1]:
        return np.zeros(len(codes), np.uint64)
    if codes.shape[1] == 1:
        return finished(finished(codes[:, 0]) + np.uint64(1))  # as a row of one element below
    first, stop = _ends(codes, whole=values.dtype.kind in "biu")
    place = np.arange(codes.shape[1])
    kept = (place >= first[:, None]) & (place < stop[:, None])
    terms = np.where(kept, finished(codes) * _powers(codes.shape[1]), np.uint64(0))
    # Divided by the power of the first element that counts: 2**64 has an inverse of every odd number.
    sums = terms.sum(axis=1, dtype=np.uint64) * _powers(codes.shape[1] + 1, inverse=True)[first]
    return finished(sums + (stop - first).astype(np.uint64))


def _numbers(values: NDArray[np.generic]) -> Prints:
    """One code for each number, the same in every dtype."""
    if values.dtype.kind in "biu":
        return values.astype(np.int64 if values.dtype.kind != "u" else np.uint64).view(np.uint64)
    wide = values.astype(np.float64)
    whole = (np.abs(wide) < 2.0**53) & (wide == np.floor(wide))
    with np.errstate(over="ignore"):
        inexact = wide.astype(np.float32).view(np.uint32).astype(np.uint64) | _INEXACT
    codes = np.where(whole, np.where(whole, wide, 0).astype(np.int64).view(np.uint64), inexact)
    return np.where(np.isnan(wide), _NAN, codes)


def _ends(codes: Prints, whole: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row, the first element that counts and the one after the last that does."""
    signed = codes.view(np.int64)
    pads = np.isin(signed, _PADS) if whole else signed == 0
    width = codes.shape[1]
    stop = width - _run(pads[:, ::-1])
    first = np.zeros(len(codes), np.int64)
    if not whole or not width:
        return first, stop
    if signed.max(initial=0) > 1:  # ids, not a mask: they may be padded on the left
        runs = _run(signed == signed[:, :1]) - 1 if width >= _SEQUENCE else 0
        first = np.minimum(np.maximum(_run(pads), runs), stop)
        stop = np.maximum(first, stop - np.maximum(0, _run(signed[:, ::-1] == signed[:, -1:]) - 1) * (stop == width))
    elif (signed[:, -1] == 1).all() and (signed[:, 1:] >= signed[:, :-1]).all():
        first = _run(pads)  # the mask of texts that are padded on the left
    return first, stop


def _run(marks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many elements at the beginning of each row are marked."""
    found: NDArray[np.int64] = np.where(marks.all(axis=1), marks.shape[1], (~marks).argmax(axis=1)).astype(np.int64)
    return found


def _powers(count: int, inverse: bool = False) -> Prints:
    """1, b, b**2, ... modulo 2**64."""
    base = np.uint64(pow(int(_BASE), -1, 1 << 64)) if inverse else _BASE
    powers = np.full(max(1, count), base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)
