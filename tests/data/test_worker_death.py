"""A worker dies, or signals reach every process: the run ends at once, or goes on unharmed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from data_helpers import make_texts, write_shard
from kill_workers import disturb

from megatron_ttt.data.encoder import Encoder, Options
from megatron_ttt.data.local_engine import encode_in_order
from megatron_ttt.data.reader import Block, read_blocks
from megatron_ttt.data.shards import local_shard
from megatron_ttt.errors import UserError


@pytest.fixture
def blocks(tmp_path) -> list[Block]:
    shard = local_shard(write_shard(tmp_path / "c4.json", make_texts(800, seed=0)))
    return 40 * [item for item in read_blocks(shard) if isinstance(item, Block)]


@pytest.mark.timeout(120)
def test_a_killed_worker_ends_the_run_in_one_line(tokenizer, blocks):
    encoder = Encoder(Options(str(tokenizer.model_path), "sentencepiece"))
    encoded = encode_in_order(blocks, encoder, 2)
    for _ in range(6):
        next(encoded)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(UserError, match="a worker process died, often for want of memory"):
        list(encoded)
    assert not multiprocessing.active_children()


@pytest.mark.timeout(120)
def test_workers_leave_signals_to_the_parent_from_their_start(tokenizer, blocks):
    encoder = Encoder(Options(str(tokenizer.model_path), "sentencepiece"))

    def signalled():
        for block in blocks:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGTERM)
                os.kill(process.pid, signal.SIGINT)
            yield block

    encoded = list(encode_in_order(signalled(), encoder, 2))
    assert [item.documents for item in encoded] == [block.content.count(b"\n") for block in blocks]


@pytest.mark.timeout(120)
def test_a_mistake_that_a_worker_meets_reaches_the_user(tokenizer, blocks, tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(tokenizer.model_path.read_bytes())
    encoder = Encoder(Options(str(model), "sentencepiece"))
    model.unlink()
    with pytest.raises(UserError, match="cannot read the tokenizer model"):
        list(encode_in_order(blocks, encoder, 2))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("losses", [1, 3, 10**9])
def test_a_run_that_loses_the_interrupt_ends_all_the_same(losses):
    """Python drops an exception that is raised in a destructor."""
    program = f"""if True:
        import signal, time
        from megatron_ttt.data import signals

        class Loses:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        class LosesAgain:
            def __del__(self):
                time.sleep(0.1)  # the signal that is sent again arrives here

        signals._GRACE_SECONDS = 1.0 if {losses} > 3 else 60.0
        with signals.stop_on_signals():
            Loses()
            for _ in range({losses} - 1):
                LosesAgain()
            time.sleep(100)
    """
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr == "stopped by SIGINT; the same command goes on from here\n"
    assert time.monotonic() - started < 60


@pytest.mark.kills
@pytest.mark.timeout(600)
def test_workers_killed_and_runs_interrupted_at_random_moments(tmp_path):
    disturb(tmp_path, kills=3, interrupts=3, workers=2, seed=0)
