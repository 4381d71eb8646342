"""Run the tests on TensorFlow, JAX and PyTorch, one process for each: `python tests/run.py`.

Further arguments go to pytest, for example `python tests/run.py -m slow`. Tests marked slow are
left out unless a marker expression is given.
"""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
ROOT = Path(__file__).resolve().parent.parent
# The processes share the cores, and tests are small: threads would only wait for each other.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    # Compiling takes longer than what is compiled here: XLA need not optimise it, nor split it
    # among threads, and its fusion emitters take twice as long as what they replace.
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1",
    "XLA_FLAGS": " ".join(
        (
            "--xla_cpu_multi_thread_eigen=false",
            "--xla_backend_optimization_level=0",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_cpu_use_fusion_emitters=false",
        )
    ),
}
PRINTING = threading.Lock()


def run(backend: str, arguments: list[str]) -> int:
    """Run pytest under one backend, printing its lines as they come."""
    # JAX takes longest: the others share what it leaves of two cores.
    patient = ["nice"] if backend != "jax" and shutil.which("nice") else []
    process = subprocess.Popen(
        [*patient, sys.executable, "-m", "pytest", "--color=no", *arguments],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        with PRINTING:
            print(f"{backend:>10} | {line}", end="", flush=True)
    return process.wait()


def main() -> int:
    """Run all backends at once: what one waits for, another computes."""
    arguments = sys.argv[1:]
    if "-m" not in arguments:
        arguments += ["-m", "not slow"]
    with ThreadPoolExecutor(len(BACKENDS)) as pool:
        codes = list(pool.map(lambda backend: run(backend, arguments), BACKENDS))
    for backend, code in zip(BACKENDS, codes, strict=True):
        print(f"{backend}: {'passed' if code == 0 else f'failed, pytest exit code {code}'}")
    # A backend that a signal killed has a code below zero.
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
