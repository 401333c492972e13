"""This node alone: versions, devices, memory, and the disk that runs are written to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_ttt.doctor.findings import Finding
from megatron_ttt.mixers.ttt.cpp.build import unavailable_reason
from megatron_ttt.planning.cost import GIB

DISK_TEST_BYTES = 256 * 2**20
SLOW_DISK_BYTES_PER_SECOND = 100e6


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("megatron-core", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_machine(run_dir: Path) -> Iterator[Finding]:
    """The checks of one node; `run_dir`: where the run would be written."""
    yield Finding("good", "versions", ", ".join(f"{k} {v}" for k, v in versions().items()))
    yield from _devices()
    yield _disk(run_dir)


def _devices() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} cores, {memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free"
    yield Finding("good", "machine", text)
    if not torch.cuda.is_available():
        yield Finding("note", "devices", "no GPU: runs use the CPU and gloo, at toy size")
        reason = unavailable_reason()
        if reason is None:
            yield Finding("good", "scan", "in C++")
        else:
            yield Finding("note", "scan", f"in PyTorch, not in C++, which is faster: {reason}")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        )
        if free < 0.9 * total:
            yield Finding("problem", f"GPU {index}", f"{name}: another program uses it")
        else:
            yield Finding("good", f"GPU {index}", name)


def _disk(run_dir: Path) -> Finding:
    """Write and sync a file where the run would write its checkpoints."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 2 * DISK_TEST_BYTES:
        return Finding("problem", "disk", f"{folder} has {free / GIB:.2f} GiB left")
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(DISK_TEST_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = DISK_TEST_BYTES / (time.perf_counter() - started)
    except OSError as error:
        return Finding("problem", "disk", f"{folder} cannot be written: {error.strerror}")
    text = f"{folder} takes {rate / 1e6:.0f} MB/s, synced, and has {free / GIB:.0f} GiB left"
    if rate < SLOW_DISK_BYTES_PER_SECOND:
        return Finding("note", "disk", f"{text}: slow; checkpoint.asynchronous=true hides it")
    return Finding("good", "disk", text)
