#!/usr/bin/env python3
"""Kill the preprocessing with SIGKILL at random moments, run it again, and look at what is left.

    python tests/data/kill_preprocess.py --kills 50 [--workers 2] [--seed 0]

After every kill each file that looks complete must be complete, and whenever a run comes to its end
the datasets must be those of the run that nobody disturbed.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_helpers import make_texts, pair, write_shard

from megatron_ttt.data.indexed import check_indexed
from megatron_ttt.data.tokenizer_training import train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_c4.py"


def kill_test(folder: Path, kills: int, workers: int, seed: int) -> dict[str, int]:
    """Kill `kills` runs; how many runs were killed, and how many came to their end."""
    for i in range(6):
        write_shard(folder / f"c4-train.{i:05d}-of-00006.json.gz", make_texts(1500, seed=i))
    model = train_tokenizer([f"{folder}/c4-train.00000*"], str(folder / "tokenizer"), 330)
    command = [sys.executable, str(TOOL), "--input", f"{folder}/c4-train.*"]
    command += ["--tokenizer-model", str(model), "--append-eod", "--workers", str(workers)]
    command += ["--output-prefix"]

    reference = folder / "reference" / "c4"
    process = subprocess.Popen([*command, str(reference)], stderr=subprocess.DEVNULL)
    wait_for_work(process, reference)
    started = time.perf_counter()
    assert process.wait() == 0
    work_seconds = time.perf_counter() - started
    expected = pair(f"{reference}_text_document")

    rng, output = random.Random(seed), folder / "output" / "c4"
    tally = {"killed": 0, "ended": 0}
    while tally["killed"] < kills or not output.with_name("c4.manifest.json").exists():
        process = subprocess.Popen([*command, str(output)], stderr=subprocess.PIPE, text=True)
        wait_for_work(process, output)
        if tally["killed"] < kills:
            try:
                process.wait(rng.uniform(0, work_seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            tally["killed"] += 1
            check_what_is_left(output, expected)
            continue
        assert process.returncode == 0, errors
        tally["ended"] += 1
        assert pair(f"{output}_text_document") == expected
        assert not output.with_name("c4.tasks").exists()
        if tally["killed"] < kills:
            shutil.rmtree(output.parent)
    return tally


def wait_for_work(process: subprocess.Popen, output: Path) -> None:
    """Wait until the run has its plan: what comes before is Python starting."""
    plan = output.with_name("c4.tasks") / "plan.json"
    while process.poll() is None and not plan.exists():
        time.sleep(0.002)


def check_what_is_left(output: Path, expected: tuple[bytes, bytes]) -> None:
    """Every published file is whole: parts by their manifests, datasets by the reference."""
    for path in output.parent.glob("c4.tasks/*.manifest.json"):
        manifest = json.loads(path.read_bytes())
        prefix = path.name.removesuffix(".manifest.json")
        for stream, entry in manifest["streams"].items():
            part = path.with_name(f"{prefix}_{stream}")
            for file in ("bin", "idx"):
                content = part_content(part, file, entry[file]["size"], output)
                assert hashlib.sha256(content).hexdigest() == entry[file]["sha256"]
    for content, suffix in zip(expected, ("bin", "idx")):
        path = output.with_name(f"c4_text_document.{suffix}")
        assert not path.exists() or path.read_bytes() == content
    if output.with_name("c4_text_document.idx").exists():
        check_indexed(f"{output}_text_document")
    if output.with_name("c4.manifest.json").exists():
        assert pair(f"{output}_text_document") == expected


def part_content(part: Path, file: str, size: int, output: Path) -> bytes:
    """The file of a part, which may be in its place in the merged one already."""
    path, copied = Path(f"{part}.{file}"), Path(f"{part}.copied")
    if path.exists() or not copied.exists():
        return path.read_bytes()
    place = json.loads(copied.read_bytes())
    merged = part.with_name(place["output"])
    # Killed in `publish`, it has its name.
    content = (merged if merged.exists() else output.with_name(place["output"])).read_bytes()
    assert len(content) == place["total"]
    return content[place["offset"] : place["offset"] + size]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_test(Path(folder), args.kills, args.workers, args.seed)))


if __name__ == "__main__":
    main()
