#!/usr/bin/env python3
"""Peak memory and time of exporting a random checkpoint of a recipe, on the CPU.

    python benchmarks/export_memory.py --config yaml_recipes/ttt_mlp_1b.yaml --folder /tmp/export

Makes a checkpoint of initial weights in float32 (unless the folder has one), exports it in a
process of its own, and prints that process's peak resident memory over an interpreter that has
imported torch. Writes FOLDER/export_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

IDLE = "import torch, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def main() -> None:
    """Run the three processes: the maker, the idle one, the exporter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help="only make the checkpoint")
    arguments = parser.parse_args()
    checkpoint, output = arguments.folder / "checkpoint-0", arguments.folder / "hf"
    if arguments.make:
        make(arguments.config, checkpoint)
        return
    if not checkpoint.exists():
        subprocess.run([sys.executable, *sys.argv, "--make"], check=True)
    shutil.rmtree(output, ignore_errors=True)
    idle = int(subprocess.run([sys.executable, "-c", IDLE], capture_output=True).stdout)
    command = [sys.executable, "tools/convert_checkpoint.py", "export"]
    command += ["--checkpoint", str(checkpoint), "--output", str(output)]
    started = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit("the export failed")
    peak = usage.ru_maxrss
    result = {
        "config": arguments.config,
        "weights_gib": round(
            sum(f.stat().st_size for f in output.glob("*.safetensors")) / 2**30, 2
        ),
        "peak_over_idle_gib": round((peak - idle) / 2**20, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    (arguments.folder / "export_memory.json").write_text(json.dumps(result, indent=1) + "\n")


def make(recipe: str, path: Path) -> None:
    """A checkpoint of initial weights, float32."""
    import torch

    from megatron_ttt.checkpoint.writer import save_checkpoint
    from megatron_ttt.config import load_config
    from megatron_ttt.hf.building import build_on_cpu
    from megatron_ttt.model import initialise_weights
    from megatron_ttt.stack import architecture_of

    config = load_config([recipe])
    architecture = architecture_of(config)
    chunk = build_on_cpu(architecture, torch.float32)
    initialise_weights(chunk, architecture, config.run.seed)
    state = {"step": 0, "config": architecture.to_tree()}
    save_checkpoint(path, [chunk], None, state)


if __name__ == "__main__":
    main()
