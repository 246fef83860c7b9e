"""The benchmark of the emulation: what it counts as a layer, and what its figures are of."""

import pytest

import emulation


def test_every_hidden_layer_of_the_ranker_is_emulated() -> None:
    subject = emulation.ranker()
    for name in emulation.SCHEMES:
        assert list(emulation.coded(subject, name)) == ["0.weight", "2.weight", "4.weight"]


def test_a_row_is_of_one_pass_each() -> None:
    row = emulation.measure(emulation.ranker(), "fp8", turns=2)
    assert row.codes.n == row.codes_over_base.n == 2
    assert min(row.base.median, row.codes.median, row.values.median) > 0


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_errors_are_within_the_bound_and_like_those_of_float32(name: str) -> None:
    found = emulation.accuracy(name, 300)
    assert found.codes_over_bound <= 1
    assert found.values_over_bound <= 1
    assert found.codes <= 2 * found.values < 1e-6


def test_claims_of_speed_need_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [emulation.Accuracy("fp8", 64, 1e-7, 1e-7, 0.1, 0.1)]
    monkeypatch.setattr(emulation, "has_tiles", lambda: False)
    assert len(emulation.claims_of([], errors)) == 2
    assert all(claim.holds for claim in emulation.claims_of([], errors))
    monkeypatch.setattr(emulation, "has_tiles", lambda: True)
    row = emulation.measure(emulation.ranker(), "fp8", turns=1)
    names = [claim.name for claim in emulation.claims_of([row], errors)]
    assert names[2:] == [
        "float32 models: an emulated pass over a base pass",
        "fp8: an emulated pass by values over one by codes",
    ]
