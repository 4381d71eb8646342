"""Code that needs a process of its own, since it is about what is imported or about a backend."""

import os
import subprocess
import sys
from pathlib import Path

import keras

ROOT = Path(__file__).resolve().parent.parent


def run_code(code, *arguments, backend=None):
    """Return what the code prints in a new process, of this backend unless another is named."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend or keras.config.backend()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
