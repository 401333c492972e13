"""Each workaround is needed still: megatron-core's own objects show the symptom.

A test that fails with "fixed upstream: remove NAME" names a workaround that the installed
megatron-core does without.
"""

import ast
import gc
import io
import json
import os
import pickle
from pathlib import Path

import psutil
import pytest
import torch
from harness import ROOT, torchrun
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from torch.distributed.checkpoint import CheckpointException

import megatron_ttt
from megatron_ttt.platform.mcore_workarounds.optimizer import (
    create_moments,
    leave_out_step,
    save_own_shards,
    use_fused_adamw,
)
from megatron_ttt.platform.mcore_workarounds.saving import (
    ResultsFile,
    use_results_file,
    with_own_storage,
)

torch_adamw = pytest.mark.skipif(HAVE_APEX_OR_TE, reason="the optimizer holds no torch AdamW")


def check_needed(name: str, *, symptom: bool) -> None:
    """Fail where megatron-core no longer shows the symptom of a workaround."""
    assert symptom, f"fixed upstream: remove {name}"


# ---- optimizer.py


@pytest.fixture
def own(cpu_platform):
    """megatron-core's optimizer of a linear layer, and the layer."""
    from mcore_objects import own_optimizer

    return own_optimizer(cpu_platform)


@torch_adamw
def test_create_moments(own):
    optimizer, _ = own
    (inner,) = optimizer.chained_optimizers
    try:
        inner.state_dict()
        fails = False
    except AssertionError:
        fails = True
    main = inner.get_parameters()[0]
    before = main.clone()
    inner._init_optimizer_states_with_dummy_values()
    decays = not torch.equal(main, before)
    check_needed("create_moments", symptom=fails and decays)


@torch_adamw
def test_one_step_tensor_for_all_parameters(own):
    optimizer, _ = own
    optimizer.step()
    (inner,) = optimizer.chained_optimizers
    inner.load_state_dict(inner.state_dict())
    optimizer.step()
    steps = {state["step"].item() for state in inner.optimizer.state.values()}
    assert len(inner.get_parameters()) == 2
    name = "TorchAdamDistributedOptimizer.load_state_dict"
    check_needed(name, symptom=steps == {3.0})  # 1 + 1 step of each of 2 parameters


@torch_adamw
def test_adamw_is_not_fused(own):
    optimizer, _ = own
    optimizer.step()
    check_needed("use_fused_adamw", symptom=not any(g["fused"] for g in optimizer.param_groups))
    leave_out_step(optimizer, torch.ones(()))
    with pytest.raises(AssertionError):
        optimizer.step_with_ready_grads()
    use_fused_adamw(optimizer)
    optimizer.step_with_ready_grads()


@torch_adamw
def test_a_step_on_infinite_gradients(own):
    optimizer, module = own
    module.weight.main_grad.fill_(torch.inf)
    optimizer.step()
    check_needed("leave_out_step", symptom=not module.weight.isfinite().all())


def test_attributes_that_the_optimizers_replace(own):
    """What a subclass overrides is there to be overridden, and its class can be assigned."""
    optimizer, module = own
    (inner,) = optimizer.chained_optimizers
    for name in (
        "sharded_param_state_fully_reshardable",
        "load_parameter_state_from_fully_reshardable",
        "_get_main_param_and_optimizer_states",
        "_get_model_param_range_map",
    ):
        assert callable(getattr(inner, name))
    save_own_shards(optimizer, lambda entry, owned, states: {"owned": owned, **states})
    create_moments(optimizer)
    entries = {
        name: ShardedTensor.from_rank_offsets(name, p) for name, p in module.named_parameters()
    }
    state = inner.sharded_param_state_fully_reshardable(entries)
    assert sorted(len(part["owned"]) for part in state.values()) == [8, 64]
    moments = inner.optimizer.state[inner.get_parameters()[0]]
    pointers = {part["exp_avg"].data_ptr() for part in state.values()}
    assert moments["exp_avg"].data_ptr() in pointers


# ---- both, on two ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("seen")
    torchrun(2, ROOT / "tests/two_rank_symptoms.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_all_ranks_gather_the_state(seen):
    gathered = all(saved == whole for saved, whole in (rank["elements"] for rank in seen))
    check_needed("save_own_shards", symptom=gathered)


def test_ranks_wait_for_one_that_cannot_plan(seen):
    assert "no more" in seen[1]["planning"]
    check_needed("_Writer.prepare_local_plan", symptom="imed out" in seen[0]["planning"])


def test_ranks_wait_for_one_that_cannot_finish(seen):
    assert "No such file" in seen[0]["finishing"]
    check_needed("_Writer.finish", symptom="imed out" in seen[1]["finishing"])


# ---- saving.py


def planned(state: dict, folder: Path) -> FileSystemWriterAsync:
    """megatron-core's writer, ready to write."""
    writer = FileSystemWriterAsync(str(folder))
    save_state_dict_async_plan(state, writer)
    return writer


@pytest.fixture
def results(cpu_platform, monkeypatch) -> ResultsFile:
    """The queue that `use_results_file` puts in the place of megatron-core's."""
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    use_results_file()
    return filesystem_async._results_queue


def own_queue():
    """The writers' queue, as megatron-core makes it or finds it."""
    names = ("_get_write_results_queue", "get_write_results_queue")
    return next(vars(filesystem_async)[name] for name in names if hasattr(filesystem_async, name))()


def helpers() -> list[int]:
    """Processes that multiprocessing has spawned here."""
    children = psutil.Process().children()
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_the_queue_is_a_process(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    before = helpers()
    queue = own_queue()
    started = set(helpers()) - set(before)
    filesystem_async._results_queue = None
    del queue
    gc.collect()  # its process ends
    check_needed("use_results_file", symptom=bool(started))
    use_results_file()
    assert isinstance(own_queue(), ResultsFile)


def test_views_are_copied(results, tmp_path):
    buffer = torch.arange(8.0)
    state = {"view": buffer[2:6], "own": with_own_storage(buffer[2:6])}
    ((_, _, (_, tensors)),) = planned(state, tmp_path).write_buckets
    written = {item.index.fqn: tensor for item, tensor in tensors}
    copied = written["view"].data_ptr() != buffer[2:].data_ptr()
    check_needed("with_own_storage", symptom=copied)
    assert written["own"].data_ptr() == buffer[2:].data_ptr()
    assert torch.equal(written["own"], buffer[2:6])


class Bytes(io.BytesIO):
    """Notes in a file which process writes it."""

    def __init__(self, content: bytes, file: Path):
        super().__init__(content)
        self.file = file

    def getbuffer(self):
        self.file.write_text(str(os.getpid()))
        return super().getbuffer()


def test_files_take_processes_or_lose_what_went_wrong(results, tmp_path):
    writer = planned({"x": "text"}, tmp_path)
    ((path, name, ([(item, content)], [])),) = writer.write_buckets
    bucket = (path, name, ([(item, Bytes(content.getvalue(), tmp_path / "pid"))], []))
    write, _, (rank, _, queue) = writer.get_save_function_and_args()
    write(rank, [bucket], queue)
    assert isinstance(queue.get_nowait(), dict)
    elsewhere = int((tmp_path / "pid").read_text()) != os.getpid()

    gone = (str(tmp_path / "gone/file"), *bucket[1:])
    write(rank, [gone], queue)
    error = queue.get_nowait()
    assert isinstance(error, Exception)
    check_needed("_write_files", symptom=elsewhere or "No such file" not in str(error))


# ---- loading.py


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_metadata_runs_code(results, tmp_path):
    state = {"x": ShardedTensor.from_rank_offsets("x", torch.ones(4))}
    checkpoint, made = tmp_path / "checkpoint", tmp_path / "made"
    checkpoint.mkdir()
    dist_checkpointing.save(state, str(checkpoint))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Code(made)))
    with pytest.raises(CheckpointException):  # what is made of it is no Metadata
        dist_checkpointing.load(state, str(checkpoint))
    check_needed("reading_with", symptom=made.exists())


# ---- nothing else is changed

REPLACED = {"__class__", "found_inf", "_results_queue", "_get_filesystem_reader"}
"""Attributes that workarounds assign."""


def patches(source: str) -> bool:
    """Whether a module assigns a class, or into torch or megatron-core."""
    nodes = list(ast.walk(ast.parse(source)))
    names, uses_core = set(), "import_module" in source
    for node in nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            package = (getattr(node, "module", None) or alias.name).split(".")[0]
            uses_core |= package == "megatron"
            if package in ("torch", "megatron"):
                names.add(alias.asname or alias.name.split(".")[0])
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if node.attr in REPLACED or root_of(node) in names:
                return True
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            root = root_of(node.args[0])
            if root in names or (uses_core and root != "self"):
                return True
    return False


def root_of(node: ast.AST) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", None)


def test_only_the_platform_changes_megatron_core():
    package = Path(megatron_ttt.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if patches(path.read_text())
    }
    assert found == {
        "platform/__init__.py",  # a setting of torch that is an attribute
        "platform/cpu.py",
        *(f"platform/mcore_workarounds/{name}.py" for name in ("loading", "optimizer", "saving")),
    }


@pytest.mark.parametrize(
    "source,found",
    [
        ("inner.__class__ = Own", True),
        ("a, inner.__class__ = 1, Own", True),
        ("if isinstance(x.__class__, type): y = x.__class__", False),
        ("from megatron.core import parallel_state as p\np.state.group = None", True),
        ("import megatron.core.utils\nmegatron.core.utils.x = 1", True),
        ("import torch\nsetattr(torch.cuda, name, f)", True),
        ("from megatron.core import utils\nfor x in [utils]: setattr(x, 'a', 1)", True),
        (
            "import importlib\nm = importlib.import_module('megatron.core')\nsetattr(m, 'a', 1)",
            True,
        ),
        ("from megatron.core import utils\nsetattr(self, 'a', utils)", False),
        ("import torch\nx = torch.ones(1)\nself.x = x", False),
        ("optimizer.found_inf = flag", True),
    ],
)
def test_what_counts_as_a_change(source, found):
    assert patches(source) == found
