"""The nodes among themselves: ports, clocks, versions, and a collective over all of them.

The doctor runs on every node at once. Each listens on the rendezvous port and on some of the ports
that the system hands out, which is where gloo and NCCL will listen, and calls every other node on
each of them. A good port answers with the node's clock and versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ttt.doctor.findings import Finding
from megatron_ttt.doctor.machine import versions
from megatron_ttt.errors import UserError

CALL_SECONDS = 3.0
HANDED_OUT_PORTS = 6
"""How many of the ports that the system hands out are tried."""
CLOCK_SECONDS = 1.0
"""Clocks further apart than this are a problem: time limits and logs would disagree."""
COLLECTIVE_BYTES = 64 * 2**20


def ports_to_try(rendezvous: int) -> list[int]:
    """The rendezvous port and a spread of those that the system hands out; the same everywhere."""
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low, high = map(int, path.read_text().split()) if path.exists() else (32768, 60999)
    step = (high - low) // HANDED_OUT_PORTS
    return [rendezvous, *range(low + step // 2, high, step)]


def own_index(nodes: list[str]) -> int:
    """Which of the nodes this one is: the first whose address can be bound here."""
    for index, node in enumerate(nodes):
        try:
            address = socket.gethostbyname(node)
        except socket.gaierror:
            raise UserError(f"--nodes: {node!r} is no host name or address known here") from None
        with contextlib.suppress(OSError):
            socket.create_server((address, 0)).close()
            return index
    raise UserError(f"--nodes: none of {', '.join(nodes)} is an address of this machine")


class NodeCheck:
    """This node's part in the check of all.

    nodes: addresses or names, the same list on every node; port: of the rendezvous;
    wait: seconds for the others to start; clock: this node's time.
    """

    def __init__(
        self, nodes: list[str], port: int, wait: float, clock: Callable[[], float] = time.time
    ):
        self.nodes, self.port, self.clock = nodes, port, clock
        self.index = own_index(nodes)
        self.ports = ports_to_try(port)
        self.deadline = time.monotonic() + wait
        self.findings: list[Finding] = []
        self.verdicts: dict[int, bool] = {}
        self._all_told = asyncio.Event()

    async def run(self) -> bool:
        """Listen, call, tell the others; whether every node reached every other on all ports."""
        async with contextlib.AsyncExitStack() as stack:
            for port in self.ports:
                await self._listen(port, stack)
            others = [i for i in range(len(self.nodes)) if i != self.index]
            await asyncio.gather(*(self._check(other) for other in others))
            good = not any(finding.level == "problem" for finding in self.findings)
            self._note_verdict(self.index, good)
            await asyncio.gather(*(self._tell(other, good) for other in others))
            with contextlib.suppress(asyncio.TimeoutError):
                left = max(0.0, self.deadline - time.monotonic())
                await asyncio.wait_for(self._all_told.wait(), left)
        return len(self.verdicts) == len(self.nodes) and all(self.verdicts.values())

    async def _listen(self, port: int, stack: contextlib.AsyncExitStack) -> None:
        try:
            server = await asyncio.start_server(self._answer, self.nodes[self.index], port)
        except OSError as error:
            text = f"port {port} cannot be listened on here ({error.strerror or error}): "
            text += "another program holds it; end that, or choose another --port"
            self.findings.append(Finding("problem", f"node {self.nodes[self.index]}", text))
            return
        await stack.enter_async_context(server)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Say this node's clock and versions; hear what the caller found, if it says so."""
        with contextlib.suppress(ConnectionError, ValueError, asyncio.TimeoutError):
            request = json.loads(await asyncio.wait_for(reader.readline(), CALL_SECONDS))
            if "verdict" in request:
                self._note_verdict(request["index"], request["verdict"])
            answer = {"time": self.clock(), "versions": versions()}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    def _note_verdict(self, index: int, good: bool) -> None:
        self.verdicts[index] = good
        if len(self.verdicts) == len(self.nodes):
            self._all_told.set()

    async def _call(self, node: int, port: int, **message) -> tuple[dict | None, str]:
        """The answer of a node's port, or why there is none."""
        host, writer = self.nodes[node], None
        request = json.dumps({"index": self.index, **message}).encode() + b"\n"
        try:
            connection = asyncio.open_connection(host, port)
            reader, writer = await asyncio.wait_for(connection, CALL_SECONDS)
        except asyncio.TimeoutError:
            return None, f"no answer in {CALL_SECONDS:g} s: a firewall drops it"
        except ConnectionRefusedError:
            return None, "refused: a firewall rejects it, or nothing listens there"
        except OSError as error:
            return None, f"cannot be reached: {error.strerror or error}"
        try:
            writer.write(request)
            line = await asyncio.wait_for(reader.readline(), CALL_SECONDS)
            return json.loads(line), ""
        except (asyncio.TimeoutError, OSError, ValueError):
            return None, "takes the call but says nothing: another program holds it"
        finally:
            writer.close()

    async def _check(self, node: int) -> None:
        """Call a node until all its ports answer; once one has, the others get one more try."""
        failed: dict[int, str] = {}
        answer, tries_left = None, 2
        while tries_left:
            replies = await asyncio.gather(*(self._timed(node, port) for port in self.ports))
            failed = {p: why for p, (reply, why) in zip(self.ports, replies) if reply is None}
            answer = next((reply for reply, _ in replies if reply is not None), None)
            if not failed:
                break
            if answer is not None or time.monotonic() > self.deadline:
                tries_left -= 1
            await asyncio.sleep(0.5)
        self.findings.extend(self._judge(self.nodes[node], failed, answer))

    async def _timed(self, node: int, port: int) -> tuple[dict | None, str]:
        """A call's answer, with how far that node's clock is ahead, as "ahead", in seconds."""
        before = self.clock()
        answer, why = await self._call(node, port)
        if answer is not None:
            answer["ahead"] = answer["time"] - (before + self.clock()) / 2
        return answer, why

    def _judge(self, host: str, failed: dict[int, str], answer: dict | None) -> Iterator[Finding]:
        subject = f"node {host}"
        if answer is None:
            whys = "; ".join(f"port {port} {why}" for port, why in failed.items())
            yield Finding("problem", subject, f"no port answers ({whys}). Is the doctor running?")
            return
        for port, why in failed.items():
            use = "the rendezvous" if port == self.port else "gloo and NCCL use such ports"
            yield Finding("problem", subject, f"port {port} ({use}): {why}")
        if not failed:
            ports = ", ".join(map(str, self.ports))
            yield Finding("good", subject, f"answers on ports {ports}")
        ahead = answer["ahead"]
        if abs(ahead) > CLOCK_SECONDS:
            relation = "ahead of" if ahead > 0 else "behind"
            text = f"its clock is {abs(ahead):.1f} s {relation} this node's: set both by NTP"
            yield Finding("problem", subject, text)
        else:
            yield Finding("good", subject, f"its clock is within {abs(ahead) * 1000:.0f} ms")
        here = versions()
        for name in sorted(here.keys() | answer["versions"].keys()):
            mine, theirs = here.get(name, "none"), answer["versions"].get(name, "none")
            if mine != theirs:
                yield Finding("problem", subject, f"has {name} {theirs}, this node {mine}")

    async def _tell(self, node: int, good: bool) -> None:
        """Let a node know this one's verdict, over any port that works."""
        for port in self.ports:
            answer, _ = await self._call(node, port, verdict=good)
            if answer is not None:
                return


def check_nodes(nodes: list[str], port: int, wait: float) -> Iterator[Finding]:
    """Ports, clocks and versions of every other node, and then one collective over all."""
    check = NodeCheck(nodes, port, wait)
    name = nodes[check.index]
    if len(nodes) > 1 and socket.gethostbyname(name).startswith("127."):
        text = f"{name} is a loopback address here (/etc/hosts), where no other node reaches it: "
        yield Finding("problem", f"node {name}", text + "give addresses, and training NODE_ADDR")
        return
    all_good = asyncio.run(check.run())
    yield from check.findings
    if not all_good:
        yield Finding("problem", "collective", "not tried: some node did not reach another")
        return
    yield _collective(nodes, check.index, port)


def _collective(nodes: list[str], index: int, port: int) -> Finding:
    """All-reduce over one process a node, with the backend that training would use."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    tensor = torch.ones(COLLECTIVE_BYTES // 4, device="cuda" if cuda else "cpu")
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{nodes[0]}:{port}",
            rank=index,
            world_size=len(nodes),
            timeout=datetime.timedelta(seconds=60),
        )
        dist.all_reduce(tensor)  # connects
        tensor.fill_(1)
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        total = tensor[0].item()
        seconds = time.perf_counter() - started
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        variable = "NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME"
        reason = str(error).splitlines()[0]
        text = f"{backend} over {len(nodes)} nodes: {reason}. Set {variable} to the interface "
        return Finding("problem", "collective", f"{text}that holds {nodes[index]}")
    if total != len(nodes):
        text = f"{backend} summed ones of {len(nodes)} nodes to {total:g}"
        return Finding("problem", "collective", text)
    rate = COLLECTIVE_BYTES / seconds / 1e9
    text = f"{backend} over {len(nodes)} nodes: 64 MiB all-reduced at {rate:.2f} GB/s"
    return Finding("good", "collective", text)
