import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.demos import docstrings
from precimap.demos.docstrings import Pair, docstring_pairs, split_by_module
from precimap.errors import TaskError

FINGERPRINT = """
import hashlib, sys
import precimap.api
from precimap.demos.docstrings import docstring_pairs, split_by_module
before = set(sys.modules)
pairs = docstring_pairs()
print(sorted(set(sys.modules) - before))
print(hashlib.sha256(repr((pairs, split_by_module(pairs))).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def pairs() -> tuple[Pair, ...]:
    return docstring_pairs()


def test_there_are_enough_of_both_kinds(pairs: tuple[Pair, ...]) -> None:
    from_torch = sum(pair.module.startswith("torch.") for pair in pairs)
    assert len(pairs) >= 2_000
    assert from_torch >= 500
    assert len(pairs) - from_torch >= 1_000


def test_another_process_with_another_hash_seed_finds_the_same_and_imports_nothing(pairs: tuple[Pair, ...]) -> None:
    there = subprocess.run(
        [sys.executable, "-c", FINGERPRINT],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    here = hashlib.sha256(repr((pairs, split_by_module(pairs))).encode()).hexdigest()
    assert there.stdout.splitlines() == ["[]", here]


def test_no_query_and_no_document_twice(pairs: tuple[Pair, ...]) -> None:
    assert len({pair.query.lower() for pair in pairs}) == len(pairs)
    assert len({pair.document.lower() for pair in pairs}) == len(pairs)


def test_queries_are_sentences_and_documents_are_text(pairs: tuple[Pair, ...]) -> None:
    for pair in pairs:
        assert len(pair.query.split()) >= 3
        assert len(pair.document.split()) >= 8
        assert "->" not in pair.query
        assert ">>>" not in pair.query + pair.document
        assert pair.query[0].isalpha()
        assert pair.query == " ".join(pair.query.split())


def test_a_pair_is_what_the_installed_function_says(pairs: tuple[Pair, ...]) -> None:
    (pair,) = [pair for pair in pairs if (pair.module, pair.name) == ("shutil", "copytree")]
    assert pair.query == "Recursively copy a directory tree and return the destination directory."
    assert pair.document.startswith("If exception(s) occur, an Error is raised with a list of reasons.")


@pytest.mark.parametrize(
    ("docstring", "query", "document"),
    [
        (
            "Apply a :class:`~torch.nn.Linear` layer\n    twice.\n\nSee ``x`` and `y <https://example.org>`_ and **z**,"
            " one two three.",
            "Apply a torch.nn.Linear layer twice.",
            "See x and y and z, one two three.",
        ),
        (
            "Add two numbers.\n\nArgs\n----\n:param int x: the first one\n\n.. note:: both are numbers here\n",
            "Add two numbers.",
            "Args param int x: the first one both are numbers here",
        ),
        (
            "Add two numbers.\n\nThe sum of both, which commutes, as sums do.\n\n    >>> add(1, 2)\n    3\n\nThat is all.",
            "Add two numbers.",
            "The sum of both, which commutes, as sums do. That is all.",
        ),
    ],
    ids=["roles and literals", "sections and fields", "examples"],
)
def test_markup_becomes_plain_words(docstring: str, query: str, document: str) -> None:
    assert docstrings._pair("m", "f", docstring) == Pair("m", "f", query, document)


@pytest.mark.parametrize(
    "summary",
    [
        "add(a, b) -> the sum of both",
        "torch.add (a, b, out)",
        ">>> add(1, 2) is three",
        "takes two -> gives one",
        ".. deprecated:: 2.0 of all",
        "Add both.",
        "(internal) add two numbers",
    ],
)
def test_what_is_no_sentence_is_no_query(summary: str) -> None:
    rest = "A description which has more than the eight words it needs."
    assert docstrings._pair("m", "f", f"Adds two numbers.\n\n{rest}") is not None
    assert docstrings._pair("m", "f", f"{summary}\n\n{rest}") is None


def test_a_document_of_seven_words_is_too_short() -> None:
    assert docstrings._pair("m", "f", "Add two numbers.\n\none two three four five six seven") is None
    assert docstrings._pair("m", "f", "Add two numbers.\n\none two three four five six seven eight") is not None


def test_public_functions_and_methods_of_a_file_in_source_order(tmp_path: Path) -> None:
    source = '''"""Module."""
class B:
    """Class."""
    if True:
        def m(self):
            """Method."""
            def inner():
                """Inner."""
    def _private(self):
        """Private."""
async def a():
    """Function."""
def bare(): ...
'''
    (tmp_path / "m.py").write_text(source)
    found = list(docstrings._docstrings(tmp_path / "m.py"))
    assert found == [("", "Module."), ("B", "Class."), ("B.m", "Method."), ("a", "Function.")]


def test_default_splits_have_their_sizes_and_share_no_module(pairs: tuple[Pair, ...]) -> None:
    splits = split_by_module(pairs)
    assert tuple(map(len, splits)) == (128, 500, 1200)
    modules = [{pair.module for pair in split} for split in splits]
    assert sum(map(len, modules)) == len(set().union(*modules))
    assert set().union(*splits) <= set(pairs)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=15),
    targets=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)),
)
def test_any_split_is_exact_and_disjoint_or_refused(sizes: list[int], targets: tuple[int, int, int]) -> None:
    pairs = [Pair(f"m{m}", f"f{k}", f"q {m} {k}", "d") for m, size in enumerate(sizes) for k in range(size)]
    calibration, search, certify = targets
    try:
        splits = split_by_module(pairs, calibration=calibration, search=search, certify=certify)
    except TaskError:
        # The dealing is greedy; it may fail only when the modules are few or large beside what is asked for.
        assert sum(targets) + 3 * max(sizes) > len(pairs)
        return
    assert tuple(map(len, splits)) == targets
    chosen = [pair for split in splits for pair in split]
    assert len(set(chosen)) == len(chosen)
    owners = {(pair.module, k) for k, split in enumerate(splits) for pair in split}
    assert len(owners) == len({module for module, _ in owners})
    assert list(splits.certify) == [pair for pair in pairs if pair in set(splits.certify)]


def test_too_few_pairs_are_refused_with_the_numbers() -> None:
    with pytest.raises(TaskError, match=r"expected 5 pairs for the certify split, found 0 of 1"):
        split_by_module([Pair("m", "f", "q", "d")], calibration=1, search=0, certify=5)
