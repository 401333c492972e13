"""Two runs in one run folder: the second waits, and is refused where the first goes on."""

import fcntl
import json
import os
import re
import signal
import socket
import sys

import pytest
from harness import run
from small_run import COMMAND, STEPS, losses, ranks, small_recipe, start, steps, wait_for

from megatron_ttt.errors import UserError
from megatron_ttt.training import run_lock

IMPATIENT = "run.timeout_minutes=0.1"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    return [*small_recipe(tmp_path_factory.mktemp("tokens")), "checkpoint.export_final=false"]


def test_a_second_run_is_refused_and_the_first_not_disturbed(recipe, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    first = start(recipe, run_dir, log)
    wait_for(log, "Saved", first)
    rank_0 = ranks(first)[0]
    rank_0.send_signal(signal.SIGSTOP)  # else it is done before the other is
    before = sorted(path.name for path in run_dir.iterdir())
    command = [sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}", IMPATIENT]
    refused = f"error: process {rank_0.pid} is training in run.dir={run_dir}: stop it, or set"
    assert refused in run(command, expect=2)
    assert sorted(path.name for path in run_dir.iterdir()) == before
    rank_0.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0, log.read_text()[-3000:]
    assert [step for step, *_ in losses(run_dir)] == list(range(1, STEPS + 1))


def test_a_run_waits_for_the_one_before_to_end(recipe, tmp_path):
    run_dir, logs = tmp_path / "run", [tmp_path / "log", tmp_path / "log2"]
    first = start(recipe, run_dir, logs[0])
    wait_for(logs[0], "Saved", first)
    processes = ranks(first)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    second = start(recipe, run_dir, logs[1])
    wait_for(logs[1], "Waiting for process", second)
    for process in processes:
        process.kill()
    assert second.wait(120) == 0, logs[1].read_text()[-3000:]
    assert first.wait(60) != 0
    assert "Resumed from" in logs[1].read_text()
    assert steps(run_dir)[-1] == STEPS


@pytest.fixture
def first_rank(monkeypatch):
    monkeypatch.setattr(run_lock.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.01)


def hold(folder, holder: list) -> int:
    """A child process that has locked the folder; its process id."""
    (folder / run_lock.LOCK_FILE).write_text(json.dumps(holder))
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        with open(folder / run_lock.LOCK_FILE, "a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(says, b"1")
            signal.pause()
    os.read(ready, 1)
    return child


def test_the_lock_of_a_lost_machine_is_gone_over(first_rank, tmp_path, capsys):
    for host, refused in ((socket.gethostname(), True), ("a-machine-that-was", False)):
        child = hold(tmp_path, [host, 17])
        try:
            with run_lock.alone_in(tmp_path, 0.05):
                assert not refused
        except UserError as error:
            assert refused and re.match("process 17 is training in run.dir=", str(error))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert "is locked from a-machine-that-was still" in capsys.readouterr().out
    with run_lock.alone_in(tmp_path, 0.05):
        assert json.loads((tmp_path / run_lock.LOCK_FILE).read_text())[1] == os.getpid()


def test_a_file_system_without_locks_is_said(first_rank, tmp_path, capsys, monkeypatch):
    def no_locks(file, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    with run_lock.alone_in(tmp_path / "new", 10):
        assert (tmp_path / "new").is_dir()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
