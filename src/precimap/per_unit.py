"""What a task's functions give for each unit of a batch, checked: one value each, finite, and the rows named that are not.

Invariant: nothing is converted that would lose an identity: cluster ids never pass through floats, a slice is no number.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from precimap.errors import TaskError


def rows_said(broken: Tensor | np.ndarray, most: int = 3) -> str:
    """Which rows of a batch, `rows 3, 17, 20 and 5 more (8 of 64 units)`. broken: bool [units]."""
    rows = np.flatnonzero(np.asarray(broken.cpu() if isinstance(broken, Tensor) else broken))
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    named = ", ".join(str(row) for row in rows[:most])
    return f"row{'s' if len(rows) > 1 else ''} {named}{more} ({len(rows)} of {len(broken)} units)"


def slice_of(values: Any, units: int, label: str, place: str) -> np.ndarray:
    """bool [units]; numbers are refused, for a comparison that was forgotten would make everything a slice."""
    found = torch.as_tensor(values).detach().cpu()
    if found.shape != (units,) or found.dtype != torch.bool:
        raise TaskError(
            f"{place}: expected where of {label} to give True or False for each unit, [{units}], got {found.dtype} "
            f"{tuple(found.shape)}; compare something, such as batch['age'] < 7"
        )
    return found.numpy()


def clusters_of(values: Any, units: int, place: str) -> np.ndarray:
    """int64 [units], never by way of floats: ids above 2**53 would run together."""
    try:
        found = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError) as error:
        raise TaskError(
            f"{place}: expected clusters to give integers, got {type(values).__name__} ({error}); "
            "number them once for all of your data, not batch by batch, so that a user has one number everywhere"
        ) from error
    if found.shape != (units,) or found.is_floating_point() or found.is_complex():
        raise TaskError(
            f"{place}: expected clusters to give one integer per unit, [{units}], got {found.dtype} {tuple(found.shape)}; "
            "number them once for all of your data, not batch by batch, so that a user has one number everywhere"
        )
    return found.to(torch.int64).numpy()


def column_of(values: Any, units: int, what: str, place: str, columns: bool = False) -> np.ndarray:
    column = (
        (values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))).detach().double().cpu().numpy()
    )
    if column.shape[:1] != (units,) or column.ndim > 1 + columns:
        raise TaskError(f"{place}: expected {what} to give one value per unit, [{units}], got the shape {column.shape}")
    if not np.isfinite(column).all():
        faulty = (~np.isfinite(column)).reshape(units, -1).any(1)
        raise TaskError(f"{place}: {what} is NaN or infinite for {rows_said(faulty)}")
    return column
