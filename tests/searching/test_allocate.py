"""The threshold rule on invented tables: nested, ordered, never a sensitive layer, groups whole."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.searching.allocation.threshold import LONGEST_CHAIN, Candidate, Step, default_cutoff, threshold

SCHEMES = ("first", "second")


@st.composite
def tables(draw: st.DrawFn) -> list[Candidate]:
    candidates = []
    for number in range(draw(st.integers(1, 12))):
        fused = draw(st.sampled_from([None, "g1", "g2"]))
        for scheme in draw(st.sets(st.sampled_from(SCHEMES), min_size=1)):
            lower = draw(st.floats(-1, 1))
            upper = lower + draw(st.one_of(st.floats(0, 2), st.just(float("inf"))))
            candidates.append(Candidate(layer=f"layer{number}", scheme=scheme, lower=lower, upper=upper, fused=fused))
    return candidates


@given(tables(), st.floats(1e-6, 1))
def test_a_chain_is_nested_ordered_and_safe(candidates: list[Candidate], cutoff: float) -> None:
    chain = threshold(candidates, SCHEMES, cutoff)
    assert len(chain) <= LONGEST_CHAIN
    for before, after in itertools.pairwise(chain):
        assert before.choice.items() < after.choice.items()
        assert before.cutoff < after.cutoff
    table = {(c.layer, c.scheme): c for c in candidates}
    for step in chain:
        for layer, scheme in step.choice.items():
            assert table[layer, scheme].lower <= cutoff
            assert table[layer, scheme].upper <= step.cutoff


@given(tables(), st.floats(1e-6, 1))
def test_a_fused_group_moves_as_one(candidates: list[Candidate], cutoff: float) -> None:
    members = {group: {c.layer for c in candidates if c.fused == group} for group in ("g1", "g2")}
    for step in threshold(candidates, SCHEMES, cutoff):
        for layers in members.values():
            assert len({step.choice.get(layer) for layer in layers}) <= 1


@given(tables(), st.floats(1e-6, 1))
def test_the_first_map_is_the_rule_at_its_cutoff(candidates: list[Candidate], cutoff: float) -> None:
    lone = [c for c in candidates if c.fused is None]
    expected = {c.layer for c in lone if c.upper <= cutoff}
    chain = threshold(lone, SCHEMES, cutoff)
    if expected:
        assert set(chain[0].choice) == expected
        assert chain[0].cutoff == cutoff


def test_the_last_map_holds_all_but_the_sensitive() -> None:
    candidates = [Candidate(layer=f"l{i}", scheme="first", lower=-1.0, upper=2.0**i) for i in range(40)] + [
        Candidate(layer="bad", scheme="first", lower=0.5, upper=0.6)
    ]
    chain = threshold(candidates, SCHEMES, 0.1)
    assert len(chain) == LONGEST_CHAIN
    assert set(chain[-1].choice) == {f"l{i}" for i in range(40)}


def test_the_preferred_scheme_wins_when_both_pass() -> None:
    both = [
        Candidate(layer="a", scheme="second", lower=-1, upper=0.01),
        Candidate(layer="a", scheme="first", lower=-1, upper=0.02),
    ]
    assert threshold(both, SCHEMES, 0.05) == (Step({"a": "first"}, 0.05),)
    assert threshold(both, SCHEMES, 0.01)[0].choice == {"a": "second"}


def test_a_group_whose_member_cannot_take_a_scheme_does_not_take_it() -> None:
    table = [
        Candidate(layer=layer, scheme=scheme, lower=-1, upper=0.0, fused="qkv")
        for layer, scheme in (("q", "first"), ("k", "second"), ("q", "second"))
    ]
    assert threshold(table, SCHEMES, 0.1) == (Step({"q": "second", "k": "second"}, 0.1),)


def test_nothing_to_choose_gives_no_map() -> None:
    assert threshold([], SCHEMES, 0.1) == ()
    assert threshold([Candidate(layer="a", scheme="first", lower=0.2, upper=0.3)], SCHEMES, 0.1) == ()


def test_the_default_cutoff_shares_the_margin_over_layers() -> None:
    table = [
        Candidate(layer="a", scheme="first", lower=0, upper=0),
        Candidate(layer="a", scheme="second", lower=0, upper=0),
        Candidate(layer="b", scheme="first", lower=0, upper=0),
    ]
    assert default_cutoff(0.01, table) == pytest.approx(0.005)
