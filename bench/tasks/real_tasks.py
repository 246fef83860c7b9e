"""The real tasks on which the benchmarks measure: semantic search, film and video game recommendation, click prediction.

    PYTHONPATH=bench python -m tasks.real_tasks

prints the baseline of each. Invariant: a task is the same on every call, splits share no cluster (thread, user), and
what is missing raises FileNotFoundError with the file's name. Random weights, which need no data, were not taken: what
low precision does to them says little of a trained model.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from measuring.rival_scores import eligible
from precimap import Task, discover
from precimap.numerics.schemes import scheme
from precimap.task import first_batch, score
from tasks.click import frappe_dcnv2, frappe_wukong
from tasks.films import gmf, ncf
from tasks.retrieval import stackfaq_minilm
from tasks.sequence import amazon_sasrec

# Beside which each baseline is read.
TASKS: dict[Callable[[], Task], str] = {
    stackfaq_minilm: "all 1,374 questions at 32 tokens: nDCG@10 .6207, MRR@10 .8115",
    ncf: "its authors' weights on all 6,040 users: HR@10 .6704, nDCG@10 .3938",
    gmf: "its authors' weights on all 6,040 users: HR@10 .6356, nDCG@10 .3667",
    frappe_dcnv2: "all test rows: log-loss .302, AUC .930",
    frappe_wukong: "all test rows: log-loss .286, AUC .936",
    amazon_sasrec: "all users: nDCG@10 .493, recall@10 .694; most popular items .278, .472",
}


def _print(make: Callable[[], Task], known: str) -> None:
    started = time.perf_counter()
    try:
        task = make()
    except FileNotFoundError as error:
        print(error)
        return
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    print(f"{task.name}: built in {time.perf_counter() - started:.1f} s")
    lookups, dead = (sum(map(bool, of)) for of in zip(*((x.lookup, x.dead) for x in inventory.layers), strict=True))
    fp8 = len(eligible(inventory, scheme("fp8")))
    print(f"  {len(inventory.layers)} layers, {fp8} of them take FP8, {lookups} are lookups, {dead} dead")
    for name in ("search", "certify"):
        scored = score(task, task.model, getattr(task.splits, name))
        clusters = scored.units.n if scored.units.clusters is None else len(np.unique(scored.units.clusters))
        reported = "".join(f", {metric} {values.mean():.4f}" for metric, values in scored.reported.items())
        print(
            f"  {name}: {scored.units.n} units in {clusters} clusters, "
            f"{task.metric.name} {scored.values.mean():.5f}{reported}"
        )
    print(f"  known: {known}")


def main() -> None:
    torch.set_num_threads(1)
    for make, known in TASKS.items():
        _print(make, known)


if __name__ == "__main__":
    main()
