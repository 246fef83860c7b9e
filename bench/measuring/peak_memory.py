"""The peak memory of a way to search, above what scoring the baseline takes.

Invariant: each figure is of a fresh process, in which nothing else was done but to make the task and score its baseline;
both peaks are read from the kernel there. Adding up tensors, the alternative, misses what libraries hold.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from measuring.search_work import MARGIN, Work, default_search, plain_pass, replayed_loop, work_of
from precimap.numerics.schemes import Scheme
from precimap.task import Task


def peak_above_baseline(make: Callable[[], Task], way: str, schemes: Sequence[Scheme]) -> int | None:
    """Bytes that a way needs above the peak of scoring the baseline, in a fresh process; None where it cannot be told."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, way, tuple(schemes), torch.get_num_threads()))


def _peak(make: Callable[[], Task], way: str, schemes: tuple[Scheme, ...], threads: int) -> int | None:
    torch.set_num_threads(threads)
    subject = work_of(make(), schemes)
    if not reset_peak():
        return None
    margin = MARGIN * float(plain_pass(subject, (), subject.task.splits.search).losses.mean())
    before = peak_bytes()
    reset_peak()
    if way == "plain loop":
        for pair in subject.pairs[:3]:  # the peak is that of one layer: more of them show nothing new
            plain_pass(subject, [pair], subject.task.splits.search)
    elif way == "replayed loop":
        replayed_loop(_on_largest_batch(subject), subject.pairs)
    else:
        default_search(subject.task, schemes, margin)
    return max(0, peak_bytes() - before)


def _on_largest_batch(subject: Work) -> Work:
    """A recording is of one batch at a time, and the largest decides."""
    batches = list(subject.task.splits.search)
    largest = max(batches, key=lambda batch: sum(value.numel() for value in batch.values()))
    return replace(subject, task=replace(subject.task, splits=replace(subject.task.splits, search=[largest])))


# getrusage's ru_maxrss is not used: Linux hands the parent's peak down to a process that is forked and executed.
def reset_peak() -> bool:
    """Let the peak of this process start from now; False where the kernel does not know how."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Most memory that this process held since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(text.split()[1]) for text in lines if text.startswith("VmHWM:"))
