"""Run Python commands as forks of a server that has already imported what they import.

Importing torch and megatron-core takes a process some nine seconds, and a test suite starts
hundreds. `ForkedPopen` is a `subprocess.Popen` whose command, where it is one of this Python's,
runs in a fork of a server that is started once for a test session, as `python SCRIPT ...` would
run: with its own arguments, folder, environment, streams, signals and exit code. So do the commands
that such a fork starts. Given `ranks`, it runs as many processes of one job, as torchrun would
start them on one node; when one fails, the others are ended.

What a fork cannot show needs a process of its own (`subprocess.Popen`): what an import prints,
environment variables that are read at import, and who is whose parent under torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import re
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

SOCKET = "MEGATRON_TTT_TESTS_SERVER"
"""The environment variable that names the server's socket."""
SECONDS_TO_END = 30
"""How long the other ranks of a failed job have, as under torchrun."""
IMPORTED = (
    "torch",
    "transformers.generation.utils",
    "megatron_ttt.evaluation",
    "megatron_ttt.hf.exporter",
    "megatron_ttt.hf.importer",
    "megatron_ttt.hf.modeling_ttt",
    "megatron_ttt.training.trainer",
)
"""What the server imports; where one is not installed, commands that need it say so."""
_Popen = subprocess.Popen
_held: list[subprocess.Popen] = []


def ensure_server() -> None:
    """Start the server unless there is one, and name its socket in the environment.

    It ends with this process, which holds its standard input. Commands that come while it imports
    wait for it.
    """
    if SOCKET in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="prefork-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    os.environ[SOCKET] = str(path)
    server = _Popen(
        [sys.executable, __file__, str(listener.fileno())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
    )
    _held.append(server)
    listener.close()


class ForkedPopen(_Popen):
    """A `subprocess.Popen` in forks of the server, where the command is one of this Python's.

    Args:
        ranks: the number of processes of a job; None is one process outside any job.
        arguments, options: those of `subprocess.Popen`.

    Attributes:
        pids: the processes, by rank; `pid` is the first of them.
        returncode: None while one of them runs; then that of the first that failed, or 0.
    """

    _connection = None

    def __init__(self, *arguments, ranks: int | None = None, **options):
        self.ranks = ranks
        super().__init__(*arguments, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        _, _, shell, *pipes = rest[:9]
        command = [str(part) for part in args] if isinstance(args, list | tuple) else [args]
        python = command[0] == sys.executable and re.match("-m$|[^-]", " ".join(command[1:2]))
        if not python or executable or preexec_fn or pass_fds or shell:
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
            )
        request = {
            "command": command[1:],
            "cwd": os.path.abspath(cwd or "."),
            "environment": {key: str(value) for key, value in (env or os.environ).items()},
            "new_session": rest[14],
            "ranks": self.ranks,
        }
        given = [pipe if pipe != -1 else None for pipe in (pipes[0], pipes[3], pipes[5])]
        streams = [number if pipe is None else pipe for number, pipe in enumerate(given)]
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(os.environ[SOCKET])
        with tempfile.TemporaryFile("w+") as file:
            json.dump(request, file)
            file.flush()
            file.seek(0)
            socket.send_fds(self._connection, [b"x"], [file.fileno(), *streams])
            self.pids: list[int] = json.loads(self._connection.recv(4096))
        self.pid, self._child_created = self.pids[0], True
        self._close_pipe_fds(*pipes)

    def _receive(self, timeout: float | None) -> int | None:
        """The return code, or None where it does not come in time."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                answer = self._connection.recv(64)
            except (TimeoutError, BlockingIOError):
                return None
            # Without an answer, whoever waited for the processes was killed.
            self.returncode = json.loads(answer or "-9")
            self._connection.close()
        return self.returncode

    def _internal_poll(self, *arguments, **options):
        if self._connection is None:
            return super()._internal_poll(*arguments, **options)
        return self._receive(0)

    def _wait(self, timeout):
        if self._connection is None:
            return super()._wait(timeout)
        if self._receive(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send a signal to every process."""
        if self._connection is None:
            super().send_signal(sig)
        elif self.poll() is None:
            for pid in self.pids:
                os.kill(pid, sig)


def serve(listener: socket.socket) -> dict:
    """Answer every connection with a fork; return what to run, in a fork of that fork."""
    # Keepers are not waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                raise SystemExit
            connection, _ = listener.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                listener.close()
                return keep(connection)
            connection.close()


def keep(connection: socket.socket) -> dict:
    """Fork the processes of one command, say their pids, wait for them, say the return code.

    Return only in those processes.
    """
    _, (request_fd, *streams), _, _ = socket.recv_fds(connection, 1, 4)
    with os.fdopen(request_fd) as file:
        request = json.load(file)
    ranks = request["ranks"]
    job = rank_variables(ranks) if ranks else [{}]
    pids = []
    for variables in job:
        pid = os.fork()
        if not pid:
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            request["environment"].update(variables)
            return request
        pids.append(pid)
    for stream in streams:
        os.close(stream)
    os.closerange(0, 3)
    try:
        connection.send(json.dumps(pids).encode())
        connection.send(json.dumps(wait_for_all(pids)).encode())
    finally:
        os._exit(0)


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun would set for each rank."""
    with socket.socket() as free:
        while True:
            # Outside the range from which the kernel gives ports to those who ask for any.
            port = random.SystemRandom().randrange(15000, 32000)
            try:
                free.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait_for_all(pids: list[int]) -> int:
    """Wait for all processes; when one fails, end the others. Return the first failure, or 0."""
    waiting, failure, deadline = set(pids), 0, None
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG if deadline else 0)
        if not pid:
            if time.monotonic() > deadline:
                for other in waiting:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.05)
            continue
        waiting.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failure:
            failure, deadline = code, time.monotonic() + SECONDS_TO_END
            for other in waiting:
                os.kill(other, signal.SIGTERM)
    return failure


def become(request: dict) -> None:
    """Give this process what a new one would have: folder, environment, streams, random states."""
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    server = {SOCKET: os.environ[SOCKET]}
    os.environ.clear()
    os.environ.update(request["environment"] | server)
    subprocess.Popen = ForkedPopen
    random.seed()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        buffering = 1 if name == "stderr" or os.isatty(number) else -1
        stream = open(number, "w" if number else "r", buffering, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(request: dict) -> None:
    """Run the command as `python` would, and end this process as it would end."""
    become(request)
    script, *arguments = request["command"]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code = 1
    try:
        if script == "-m":
            sys.argv, sys.path[0] = arguments, os.getcwd()
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
            runpy.run_path(os.path.abspath(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        # Not the interpreter's own end, which would touch, and so copy, every page of the server.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def main() -> None:
    """Import, serve, and in each fork run."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    # A collection in a fork would touch, and so copy, every page of the server.
    gc.collect()
    gc.freeze()
    run(serve(listener))


if __name__ == "__main__":
    main()
