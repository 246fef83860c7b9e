"""Real text with real answers, on every machine: the docstrings of the standard library and of torch.

A pair is the summary of a docstring (what somebody would ask) and the rest of it (the page that answers). Files are
read with `ast`; nothing is imported or run. Invariant: the same installed sources give the same pairs in the same order,
no query or document twice. A data set in the wheel was not taken: it would need a licence and megabytes, and this text
is already there.
"""

import ast
import gc
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from precimap.errors import TaskError

MIN_QUERY_WORDS = 3
MIN_DOCUMENT_WORDS = 8

# Prose for users. The compiler internals (_inductor, _dynamo) have as much, and take most of a minute to parse.
TORCH_PARTS = "amp autograd cuda distributions export func fx jit nn optim profiler utils".split()
# Tests, applications, vendored copies, tables and internals: their docstrings document nothing that one would look up.
SKIPPED_FOLDERS = frozenset(
    "__pycache__ _sympy _vendor dist-packages distutils encodings ensurepip experimental hipify idlelib lib2to3 passes "
    "pydoc_data site-packages test tests turtledemo".split()
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One docstring: `query` is its first paragraph, `document` the rest, both on one line."""

    module: str
    name: str
    query: str
    document: str


class PairSplits(NamedTuple):
    """Three sets of pairs; no module has pairs in two of them."""

    calibration: tuple[Pair, ...]
    search: tuple[Pair, ...]
    certify: tuple[Pair, ...]


@cache
def docstring_pairs() -> tuple[Pair, ...]:
    """All pairs of the installed standard library and of the parts of torch that users read, in source order.

    Private names are left out (private modules are not: `io` and `decimal` are documented there). Of two pairs with the
    same query or the same document, ignoring case, the first stays.
    """
    queries: set[str] = set()
    documents: set[str] = set()
    pairs = []
    with _without_garbage_collection():
        for module, path in _sources():
            for name, docstring in _docstrings(path):
                pair = _pair(module, name, docstring)
                if pair is None or pair.query.casefold() in queries or pair.document.casefold() in documents:
                    continue
                queries.add(pair.query.casefold())
                documents.add(pair.document.casefold())
                pairs.append(pair)
    return tuple(pairs)


def split_by_module(
    pairs: Sequence[Pair], *, calibration: int = 128, search: int = 500, certify: int = 1200
) -> PairSplits:
    """Choose that many pairs for each split, so that all pairs of one module (one file) are in one split at most.

    Modules are dealt out in the order of their SHA-256, each to the split which lacks most of its target; of the pairs
    that a split was dealt, those with the smallest SHA-256 are taken. Pairs that no split takes still make good
    documents to search among. Each split keeps the order of `pairs`. Raises TaskError when there are too few.
    """
    targets = (calibration, search, certify)
    by_module: dict[str, list[int]] = {}
    for position, pair in enumerate(pairs):
        by_module.setdefault(pair.module, []).append(position)
    dealt: tuple[list[int], ...] = ([], [], [])
    for module in sorted(by_module, key=_digest):
        neediest = min(range(len(targets)), key=lambda k: len(dealt[k]) / targets[k] if targets[k] else float("inf"))
        dealt[neediest].extend(by_module[module])
    for name, target, found in zip(PairSplits._fields, targets, dealt, strict=True):
        if len(found) < target:
            raise TaskError(
                f"expected {target} pairs for the {name} split, found {len(found)} of {len(pairs)}; ask for smaller splits"
            )
    return PairSplits(*(_sample(pairs, found, target) for found, target in zip(dealt, targets, strict=True)))


def _sample(pairs: Sequence[Pair], positions: list[int], count: int) -> tuple[Pair, ...]:
    """A fixed choice that looks random, in the order of `pairs`: the split is spread over all of its modules."""
    by_digest = sorted(positions, key=lambda k: _digest(f"{pairs[k].module}:{pairs[k].name}:{pairs[k].query}"))
    return tuple(pairs[k] for k in sorted(by_digest[:count]))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()  # Python's own hash differs from run to run


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of small objects without cycles; scanning them as they grow doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sources() -> Iterator[tuple[str, Path]]:
    """Dotted module names and files, sorted."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    yield from _walk(standard, standard)
    spec = importlib.util.find_spec("torch")  # locates the package, does not import it
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        for part in TORCH_PARTS:
            yield from _walk(package / part, package.parent)


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(current, file)
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of the public functions, classes and methods of a file, in source order."""
    source = path.read_bytes()  # bytes: the parser heeds a coding line
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in somebody else's file
        try:
            tree = ast.parse(source)
        except SyntaxError:  # torch ships a few files for newer Pythons than this one
            return
    docstring = ast.get_docstring(tree)
    if docstring:
        yield "", docstring
    yield from _members(tree, "")


def _members(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name.startswith("_"):
                continue
            docstring = ast.get_docstring(child)
            if docstring:
                yield prefix + child.name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _members(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _members(child, prefix)


def _pair(module: str, name: str, docstring: str) -> Pair | None:
    """The pair of a docstring, or None where its first paragraph is no sentence or one of the two parts is too short."""
    summary, _, rest = _PARAGRAPH.sub("\0", docstring, count=1).partition("\0")
    if _NOT_A_SENTENCE.search(summary):
        return None
    query, document = _plain(summary), _plain(rest)
    if len(query.split()) < MIN_QUERY_WORDS or len(document.split()) < MIN_DOCUMENT_WORDS or not query[0].isalpha():
        return None
    return Pair(module, name, query, document)


_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_NOT_A_SENTENCE = re.compile(r"^\s*[\w.]+\s*\(|->|>>>|^\s*\.\. ")  # a signature, an example, a directive
_EXAMPLE = re.compile(r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*", re.MULTILINE)  # up to the next blank line
_DIRECTIVE = re.compile(r"^[ \t]*\.\.[ \t]+[\w:-]+::", re.MULTILINE)
_UNDERLINE = re.compile(r"^[ \t]*([-=~^*#\"])\1{2,}[ \t]*$", re.MULTILINE)
_ROLE = re.compile(r":[\w:]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_FIELD = re.compile(r"^[ \t]*:(\w+[^:\n`]*):", re.MULTILINE)  # :param x: and its like
_LITERAL = re.compile(r"(`+|\*\*)(\S(?:[^`*]*\S)?)\1")


def _plain(text: str) -> str:
    """Docstring markup to plain words on one line: examples go, names and prose stay."""
    text = _EXAMPLE.sub("", text)
    text = _DIRECTIVE.sub("", text)
    text = _UNDERLINE.sub("", text)
    text = _ROLE.sub(r"\1", text)
    text = _LINK.sub(r"\1", text)
    text = _FIELD.sub(r"\1:", text)
    text = _LITERAL.sub(r"\2", text)
    return " ".join(text.split())
