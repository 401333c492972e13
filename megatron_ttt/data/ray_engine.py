"""The tasks of a run on a Ray cluster: one task per shard on one core, anywhere.

The nodes share the file system of the output; input may be URLs. The driver only listens, and
merges. A node that dies takes no published task with it, and what it was doing is done elsewhere.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_ttt.data.encoder import Encoder, Options, encode_here
from megatron_ttt.data.shard_jobs import BuildJob, Listener, shard_items, write_tasks
from megatron_ttt.data.shards import Shard
from megatron_ttt.errors import UserError

_encoders: dict[Options, Encoder] = {}


class _Notes(Listener):
    """What a task reports goes back with its result."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.manifest: dict = {}

    def task(self, shard: Shard, manifest: dict) -> None:
        self.manifest = manifest

    def note(self, message: str) -> None:
        self.notes.append(message)


def run_on_ray(job: BuildJob, shards: Sequence[Shard], listener: Listener) -> None:
    """Do the tasks of the shards on the cluster at `RAY_ADDRESS`, or on one of this machine alone.

    Raises `UserError` as soon as one task does; tasks that are done then stay done.
    """
    with _cluster() as ray:
        # A lost node or process is no failure of a task: it is tried again for as long as it takes.
        remote = ray.remote(num_cpus=1, max_retries=-1)(_run_task)
        try:
            pending = {remote.remote(job, shard): shard for shard in shards}
            while pending:
                (done, *_), _ = ray.wait(list(pending))
                shard = pending.pop(done)
                error, notes, manifest = ray.get(done)
                for note in notes:
                    listener.note(note)
                if error:
                    for task in pending:
                        ray.cancel(task)
                    raise UserError(error)
                listener.task(shard, manifest)
        except ray.exceptions.RayError as error:
            raise UserError(
                f"Ray gave up ({str(error).strip().splitlines()[0]}); what was done is kept: run "
                "the same command again to go on"
            ) from error


@contextmanager
def _cluster() -> Iterator[Any]:
    """The package ray, connected to the cluster at `RAY_ADDRESS`, else to one of this machine alone
    that nobody else can reach. Ray would join the one that was last started here, by anyone."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # As Ray has it on systems without clusters: it then listens on the loopback interface. It
        # reads this when it is imported; an address for `init` it would turn into a reachable one.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs the package ray: pip install ray") from error
    started_here = not ray.is_initialized()
    if started_here:
        try:
            with _signal_handlers_kept():
                ray.init(
                    address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    include_dashboard=None if address != "local" else False,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster ({error}); check RAY_ADDRESS") from error
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray would end this process itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_task(job: BuildJob, shard: Shard) -> tuple[str, list[str], dict[str, Any]]:
    """One shard, on a node: what went wrong, what to tell the user, and the manifest."""
    listener, options = _Notes(), job.options
    try:
        if options not in _encoders:
            _encoders[options] = Encoder(options)
        encoder = _encoders[options]
        if options.fingerprint(encoder.tokenizer) != job.fingerprint:
            raise UserError(f"{options.tokenizer_model} differs from node to node")
        manifest = job.workspace.manifest(shard, job.fingerprint, job.on_error)
        if manifest is None:
            items = encode_here(shard_items([shard], options), encoder)
            write_tasks(job, [shard], items, encoder.dtype, listener)
        else:
            # An attempt whose node died had published it.
            listener.manifest = manifest
    except UserError as error:
        return str(error), listener.notes, {}
    except OSError as error:
        return f"cannot write {job.output_prefix}: {error.strerror or error}", listener.notes, {}
    return "", listener.notes, listener.manifest
