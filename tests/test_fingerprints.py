"""Prints of units tell shared examples of two splits, whatever batches they come in."""

import pytest
import torch

from precimap.fingerprints import of_split


def rows(n: int, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(n, 3, generator=generator),
        "ids": torch.randint(0, 9, (n, 2), generator=generator).to(dtype),
        "seen": torch.rand(n, generator=generator) < 0.5,
        "nothing": torch.zeros(n, 0),
    }


def cut(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: value[start:stop] for name, value in batch.items()}


def test_a_unit_has_one_print_in_every_batch() -> None:
    batch = rows(20)
    whole, parts = of_split([batch]), of_split([cut(batch, 0, 7), cut(batch, 7, 20)])
    assert whole.units == parts.units
    assert len(whole.units) == 20
    assert whole.whole != parts.whole
    assert of_split([cut(batch, 5, 9)]).units < whole.units


@pytest.mark.parametrize("name", ["x", "ids", "seen"])
def test_one_changed_value_changes_one_print(name: str) -> None:
    batch = rows(20)
    changed = {key: value.clone() for key, value in batch.items()}
    changed[name][3] = ~changed[name][3] if name == "seen" else changed[name][3] + 1
    assert len(of_split([batch]).units & of_split([changed]).units) == 19


def test_equal_bits_of_another_type_are_another_unit() -> None:
    zeros = {"x": torch.zeros(4, 2, dtype=torch.int32)}
    assert not of_split([zeros]).units & of_split([{"x": torch.zeros(4, 2)}]).units


def test_columns_of_unlike_length_are_one_unit() -> None:
    assert len(of_split([{"x": torch.zeros(4), "index": torch.zeros(7)}]).units) == 1
