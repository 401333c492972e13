"""A Slurm of one node, its daemons started by hand, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
# No cgroups, no accounting: what a test machine always has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=bf_interval=1,sched_interval=2
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm_node() -> Iterator[dict[str, str]]:
    """Environment variables with which sbatch and the others find the node; skips without Slurm."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
    missing = [name for name in programs if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; missing: {missing}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    daemons: list[subprocess.Popen] = []
    environment = {"SLURM_CONF": f"{folder}/slurm.conf"}
    try:
        _configure(folder)
        for command in (
            [*_munged(folder)],
            ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
            ["slurmd", "-D", "-f", f"{folder}/slurm.conf", "-N", "localhost"],
        ):
            with open(folder / f"{command[0]}.log", "w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(0.5)
        _wait_until_idle(folder, environment)
        yield environment
        _ask(environment, "scancel", "--user=root")
        _wait_until_idle(folder, environment)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with contextlib.ExitStack() as held:
        free = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [server.getsockname()[1] for server in free]
    text = CONFIGURATION.format(
        folder=folder, host=socket.gethostname(), ports=ports, cpus=len(os.sched_getaffinity(0))
    )
    (folder / "slurm.conf").write_text(text)


def _munged(folder: Path) -> list[str]:
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
    # --force: the folder's parents may be writable by others.
    return ["munged", "--foreground", "--force", *options]


def _ask(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout.strip()


def _wait_until_idle(folder: Path, environment: dict[str, str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while _ask(environment, "sinfo", "--noheader", "--format=%T") != "idle":
        logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert time.monotonic() < end, logs
        time.sleep(0.5)
