"""C++ made into libraries: once for each source and flags, whole or not at all."""

import shutil
from pathlib import Path

import pytest

from precimap.errors import DeployError
from precimap.runtime.x86 import building


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_library_is_built_once_and_a_broken_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "five.cpp"
    source.write_text('#include "five_more.h"\nextern "C" int five() { return FIVE; }')
    header = tmp_path / "five_more.h"
    header.write_text("#define FIVE 5\n")
    built: list[object] = []
    plain = building._compiled
    monkeypatch.setattr(building, "_compiled", lambda *given: built.append(given) or plain(*given))
    first, again = (building.library.__wrapped__(source, ()) for _ in range(2))
    assert first.five() == again.five() == 5
    assert len(built) == 1
    header.write_text("#define FIVE 6\n")
    assert building.library.__wrapped__(source, ()).five() == 6, "another source is another library"
    building.library.__wrapped__(source, ("-DOTHER",))
    assert len(built) == 3
    monkeypatch.setattr(building, "_compiled", lambda *_: b"no library")
    with pytest.raises(DeployError, match="made of five"):
        building.library.__wrapped__(source, ("-DBROKEN",))
