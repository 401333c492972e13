"""Whole training steps on one device: tokens/s and MFU of each recipe, TTT beside Transformer, and
the slowest kernels of a step. A part of `kernels.py`; it wants megatron-core."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_ttt.config import load_config
from megatron_ttt.planning import peak_flops, training_flops_per_token
from megatron_ttt.stack import architecture_of

ROOT = Path(__file__).parent.parent
TOKENS = 32768  # of a micro-batch, halved until it fits
MIXERS = ("ttt_linear", "ttt_mlp", "transformer")
CASES = [(f"{mixer}_125m", length) for length in (2048, 8192, 32768) for mixer in MIXERS]
CASES += [(f"{mixer}_{size}", 2048) for size in ("350m", "760m", "1b") for mixer in MIXERS]
TINY = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.vocab_size=64"]
TINY += ["model.ffn_hidden_size=32", "training.precision=fp32"]


class StepBenchmark:
    """One process, one rank. tiny: for the tests, a model and sequences of no size at all."""

    def __init__(self, device: str, *, tiny: bool):
        self.device, self.tiny = device, tiny
        self.platform = None
        self.cases = [(name, 32) for name, _ in CASES[:3]] if tiny else CASES

    def measure(self, recipe: str, length: int) -> dict:
        """A recipe's step at this length with the largest micro-batch that fits, and the slowest
        kernels in it."""
        sequences = 2 if self.tiny else max(1, TOKENS // length)
        while True:
            try:
                return self._measure(recipe, length, sequences)
            except torch.cuda.OutOfMemoryError:
                if sequences == 1:
                    raise
                sequences //= 2
            finally:
                self._release()  # the trainer, which only now is no one's

    def _measure(self, recipe: str, length: int, sequences: int) -> dict:
        from megatron_ttt.process import prepare_process
        from megatron_ttt.training.trainer import Trainer

        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / "tokens.npy"
            config = load_config(
                [ROOT / f"yaml_recipes/{recipe}.yaml"],
                [
                    *(TINY if self.tiny else ()),
                    f"training.seq_length={length}",
                    f"training.micro_batch_size={sequences}",
                    f"training.global_batch_size={sequences}",
                    "data.train=[]",
                    "data.validation=[]",
                    "data.tokenizer_model=null",
                    f"data.fixed_batches={tokens}",
                    f"run.dir={folder}/run",
                    f"run.device={self.device}",
                ],
            )
            batch = np.random.default_rng(0).integers(
                0, config.model.vocab_size, (1, sequences, length + 1)
            )
            np.save(tokens, batch)
            self.platform = self.platform or prepare_process(config)
            trainer = Trainer(config, self.platform)
            microbatches = [torch.from_numpy(batch[0])]
            if self.device == "cuda":
                microbatches = [tokens.pin_memory() for tokens in microbatches]

            def step():
                trainer.train_step(microbatches)
                self.platform.synchronize()

            started = time.perf_counter()
            step()
            first = time.perf_counter() - started
            step()
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(1 if self.tiny else 5):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
            median = sorted(seconds)[len(seconds) // 2]
            rate = sequences * length / median
            flops = rate * training_flops_per_token(architecture_of(config), length)
            peak = peak_flops(torch.cuda.get_device_name()) if self.device == "cuda" else None
            record = {
                "recipe": recipe,
                "length": length,
                "micro_batch": sequences,
                "seconds": median,
                "first_step_s": first,
                "tokens_per_s": rate,
                "flops_per_s": flops,
                "mfu": peak and flops / peak,
                "peak_bytes": self.platform.peak_memory_bytes(),
            }
            if self.device == "cuda":
                record["waits"] = waits(lambda: trainer.train_step(microbatches))
            record["slowest_kernels"] = slowest_kernels(step, self.device)
            return record

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def waits(step) -> list[str]:
    """Where in a step the host waits for the device: file and line, once each time."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def slowest_kernels(step, device: str, steps: int = 2, count: int = 25) -> list[dict]:
    """Where the device's time of a step goes: kernels (on a CPU operators), the slowest first."""
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()

    def microseconds(event) -> float:
        return event.self_device_time_total if on_cuda else event.self_cpu_time_total

    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [
        event
        for event in profiler.key_averages()
        if event.device_type == kind and not event.is_user_annotation  # the optimizer's, of kernels
    ]
    total = sum(map(microseconds, events))
    return [
        {
            "kernel": event.key[:120],
            "calls": event.count / steps,
            "ms": microseconds(event) / steps / 1e3,
            "share": microseconds(event) / total,
        }
        for event in sorted(events, key=microseconds, reverse=True)[:count]
    ]


def step_row(record: dict) -> str:
    """Of the table whose head is STEP_HEAD."""
    mfu = "-" if record["mfu"] is None else f"{record['mfu']:.1%}"
    return (
        f"| {record['recipe']} | {record['length']} | {record['micro_batch']} "
        f"| {record['seconds'] * 1e3:.1f} | {record['tokens_per_s'] / 1e3:.1f} | {mfu} "
        f"| {record['peak_bytes'] / 2**30:.1f} |"
    )


STEP_HEAD = (
    "| recipe | tokens | micro-batch | step ms | k tokens/s | MFU | peak GiB |\n"
    "|---|---|---|---|---|---|---|"
)
