"""Strict numerics for every test: same seed and threads, IEEE float32; no network, no state outside its own folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it has to come first
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; see THREADS
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after the tokenizer ran would warn

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

gc.disable()  # until all tests are collected, of which it would take a quarter of the time

SEED = 20260331
# Every parallel region waits for its slowest thread. On two busy cores a second one made a small model's forward 35 times
# slower, and no test here is large enough to gain from it.
THREADS = 1
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _seed(seed: int) -> None:
    """Where there is no GPU, torch writes down how it would seed one, with a trace of the stack, for each of four kinds."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class _TorchRandom:
    """torch's generator as hypothesis wants it, so that a failing example fails again."""

    seed = staticmethod(_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_TORCH_RANDOM)
# No deadline: two shared cores and torch's first calls say nothing about the code. In CI the same examples every time.
hypothesis.settings.register_profile(
    "precimap", deadline=None, derandomize="CI" in os.environ, print_blob=True, max_examples=50
)
hypothesis.settings.load_profile("precimap")

torch.set_float32_matmul_precision("highest")  # no TF32, no bf16 passes: a float32 oracle has to be float32
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_finish() -> None:
    """What was imported stays: nothing of it is looked through for garbage again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test starts from the same seeds and writes its state to its own folder, and leaves torch as it was."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - libraries under test may still draw from the global generator
    _seed(SEED)
    torch.set_num_threads(THREADS)
    monkeypatch.setenv("PRECIMAP_STATE", str(tmp_path / "precimap-state"))
    yield
    assert torch.is_grad_enabled(), "the test, or what it tested, left autograd switched off"
    assert torch.get_default_dtype() is torch.float32, "the test, or what it tested, left another default dtype"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets that lie beside the checkout; a checkout without them skips the tests that need them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets at {SHARED_DATA}: this test reads real data that is not part of the repository")
    return SHARED_DATA
