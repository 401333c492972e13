"""Two runs in one run folder: the second waits, and is refused where the first goes on."""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import run
from small_run import COMMAND, STEPS, begin, losses, small_recipe, wait_for

from megatron_ttt.errors import EXIT_STOPPED, TrainingError, UserError
from megatron_ttt.training import run_lock
from megatron_ttt.training.stopping import StopRequests


def test_a_second_run_is_refused_and_the_first_not_disturbed(tmp_path):
    recipe = [*small_recipe(tmp_path), "checkpoint.export_final=false"]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    first = begin(recipe, run_dir, log)
    wait_for(log, "Saved", first)
    os.kill(first.pid, signal.SIGSTOP)  # else it is done before the other is
    before = sorted(path.name for path in run_dir.iterdir())
    command = [sys.executable, *COMMAND, *recipe, f"run.dir={run_dir}", "run.timeout_minutes=0.1"]
    refused = f"error: process {first.pid} on {socket.gethostname()} is training in run.dir="
    assert f"{refused}{run_dir}: stop it, or set" in run(command, expect=2)
    assert sorted(path.name for path in run_dir.iterdir()) == before
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(120) == 0, log.read_text()[-3000:]
    assert [step for step, *_ in losses(run_dir)] == list(range(1, STEPS + 1))


class Stop:
    """As StopRequests, which hears of nothing."""

    def heard_here(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(run_lock, "run_on_rank0", lambda find: find())
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)


@contextlib.contextmanager
def held(folder: Path, text: str):
    """While a child process has locked the folder; its process id."""
    (folder / run_lock.LOCK_FILE).write_text(text)
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        try:
            with open(folder / run_lock.LOCK_FILE, "a+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
                os.write(says, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(says)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            kill(child)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_run_waits_for_the_one_before_to_end(tmp_path, capsys):
    with held(tmp_path, json.dumps([socket.gethostname(), "process 17"])) as child:
        threading.Timer(0.3, kill, [child]).start()
        with run_lock.exclusive_run_dir(tmp_path, 60, Stop()):
            host, process = json.loads((tmp_path / run_lock.LOCK_FILE).read_text())
    assert (host, process) == (socket.gethostname(), f"process {os.getpid()}")
    assert f"Waiting for process 17 on {host}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "null", "{", f'["{socket.gethostname()}", "process 17"]'])
def test_a_lock_of_this_machine_or_of_nobody_is_heeded(tmp_path, text):
    with (
        held(tmp_path, text),
        pytest.raises(UserError, match="is training in run"),
        run_lock.exclusive_run_dir(tmp_path, 0.05, Stop()),
    ):
        pass


def test_the_lock_of_a_lost_machine_is_gone_over(tmp_path, capsys):
    with (
        held(tmp_path, '["that-was", "process 17"]'),
        run_lock.exclusive_run_dir(tmp_path, 0.05, Stop()),
    ):
        assert "is locked from that-was still" in capsys.readouterr().out


def test_a_run_that_lives_on_another_machine_is_not_overrun(tmp_path):
    ended = threading.Event()

    def beat():
        while not ended.wait(0.01):
            os.utime(tmp_path / run_lock.LOCK_FILE)

    with held(tmp_path, text := '["another", "process 17"]'):
        alive = threading.Thread(target=beat)
        alive.start()
        try:
            with (
                pytest.raises(UserError, match="process 17 on another is training in run"),
                run_lock.exclusive_run_dir(tmp_path, 0.3, Stop()),
            ):
                pass
        finally:
            ended.set()
            alive.join()
    assert (tmp_path / run_lock.LOCK_FILE).read_text() == text


def test_a_run_gives_signs_of_life(tmp_path):
    with run_lock.exclusive_run_dir(tmp_path, 1, Stop()):
        touched = os.stat(tmp_path / run_lock.LOCK_FILE).st_mtime_ns
        wait_until(lambda: os.stat(tmp_path / run_lock.LOCK_FILE).st_mtime_ns > touched)


def wait_until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_was_taken_over_stops(tmp_path, cpu_platform):
    stop = StopRequests.__new__(StopRequests)
    stop.started, stop.lock, stop._signal, stop._has_launcher = 0.0, None, 0, False
    with run_lock.exclusive_run_dir(tmp_path, 1, stop):
        stop.check_alone()
        assert stop.reason(cpu_platform.device) is None
        (tmp_path / "new").write_text('["another", "process 17"]')
        os.replace(tmp_path / "new", tmp_path / run_lock.LOCK_FILE)
        with pytest.raises(TrainingError, match=r"another run has taken over run\.dir="):
            stop.check_alone()
        wait_until(lambda: stop.lock.lost)
        with pytest.raises(TrainingError, match="leaves the folder to that"):
            stop.reason(cpu_platform.device)
    assert "process 17" in (tmp_path / run_lock.LOCK_FILE).read_text()


def test_a_run_that_was_taken_over_saves_nothing(build_trainer, tmp_path):
    run_dir = tmp_path / "run"
    trainer = build_trainer(*small_recipe(tmp_path), f"run.dir={run_dir}")
    trainer.save()
    before = sorted(run_dir.rglob("*"))
    trainer.saver.stop = StopRequests.__new__(StopRequests)
    trainer.saver.stop.lock = lock = run_lock.RunLock(run_dir)
    lock.lost = True
    with pytest.raises(TrainingError, match="taken over"):
        trainer.save()
    lock.close()
    assert sorted(run_dir.rglob("*")) == [*before, run_dir / run_lock.LOCK_FILE]


def test_a_lock_that_is_removed_is_made_anew(tmp_path, capsys):
    run_dir = tmp_path / "run"
    with run_lock.exclusive_run_dir(run_dir, 1, stop := Stop()):
        shutil.rmtree(run_dir)
        wait_until((run_dir / run_lock.LOCK_FILE).exists)
        stop.lock.check()
        _, process = json.loads((run_dir / run_lock.LOCK_FILE).read_text())
        assert process == f"process {os.getpid()}"
    assert "lock was removed under the run; it is made anew" in capsys.readouterr().out


def test_a_signal_ends_the_wait(tmp_path):
    stop = Stop()
    stop.heard_here = lambda: signal.SIGTERM
    with (
        held(tmp_path, ""),
        pytest.raises(run_lock.StoppedWaiting) as stopped,
        run_lock.exclusive_run_dir(tmp_path, 60, stop),
    ):
        pass
    assert stopped.value.exit_code == EXIT_STOPPED


def test_on_a_full_disk_the_lock_holds_without_a_name(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with run_lock.exclusive_run_dir(tmp_path, 1, Stop()):
            assert (tmp_path / run_lock.LOCK_FILE).read_text() == ""
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_system_without_locks_is_said(tmp_path, capsys, monkeypatch):
    def no_locks(file, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    with run_lock.exclusive_run_dir(tmp_path / "new", 10, Stop()):
        assert (tmp_path / "new").is_dir()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
