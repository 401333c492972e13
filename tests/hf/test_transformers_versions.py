"""The shipped model with the oldest transformers that is supported, in a process of its own.

The suite's environment holds the newest transformers. The older one is put into the user's cache
once (a few wheels, without torch) and comes first on the path.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, environment

OLD = ["transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"]


def old_transformers() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-ttt"
    folder = cache / f"transformers-4.57.6-py{sys.version_info.major}{sys.version_info.minor}"
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(temporary), *OLD], check=True)
        os.rename(temporary, folder)
    return folder


@pytest.mark.versions
def test_the_model_works_with_transformers_4_57():
    path = os.pathsep.join([str(old_transformers()), os.environ.get("PYTHONPATH", "")])
    code = "import transformers; assert transformers.__version__ == '4.57.6'; import pytest, sys;"
    code += f"sys.exit(pytest.main(['-q', '-x', *{FILES}, '-k', '{CASES}']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


FILES = ["tests/hf/test_modeling.py", "tests/hf/test_hybrid_modeling.py"]
# What goes through transformers; the arithmetic of the splits is torch's alone.
CASES = (
    "batch_of_unequal or sampling or saving or trainer or official_logits or generation or cache "
    "or folder or official_keys or outside or mistral or wrong_configuration"
)
