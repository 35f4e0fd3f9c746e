"""Network namespaces joined by a bridge, each link with its own delay, loss and rate.

    host: bridge 10.N.0.1  --veth-->  namespace `coordinator` 10.N.0.2
                           --veth-->  namespace `site-1`      10.N.0.3 ...

A link is shaped in each direction: by netem on both ends of a veth pair, or, where the kernel has
no netem, by a cable of ours in the place of the pair. It needs Linux, root, and a kernel that lets
this process make namespaces; `why_not` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

from scripts.soak.cable import Cable, Link

_MADE = count()


@dataclass(frozen=True)
class Network:
    """Namespaces that reach each other.

    Attributes:
        addresses: host -> its IPv4 address.
    """

    prefix: str
    addresses: Mapping[str, str]
    _ends: Mapping[str, str] = field(default_factory=dict)
    _cables: dict[str, Cable] = field(default_factory=dict)

    def address(self, host: str) -> str:
        return self.addresses[host]

    def namespace(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command as it is run inside a host's namespace; for `subprocess`."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def shape(self, host: str, link: Link) -> None:
        """Shape a host's link anew, while it is in use.

        Raises:
            OSError: the kernel cannot shape a link so.
        """
        if host in self._cables:
            self._cables[host].link = link
            return
        for inside, device in ((host, "eth0"), (None, self._ends[host])):
            where = ["ip", "netns", "exec", self.namespace(inside)] if inside else []
            with suppress(OSError):  # nothing was shaped before
                _run([*where, "tc", "qdisc", "del", "dev", device, "root"])
            if link.words():
                _run([*where, "tc", "qdisc", "add", "dev", device, "root", *link.words()])

    def cut(self, host: str) -> None:
        """Let nothing through to or from a host; connections stay open and hear nothing."""
        _run(["ip", "link", "set", self._ends[host], "down"])

    def heal(self, host: str) -> None:
        """The way back from `cut`."""
        _run(["ip", "link", "set", self._ends[host], "up"])


def why_not() -> str:
    """What is missing on this machine for namespaces and shaped links; empty: nothing."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool} is not there; install iproute2"
    try:
        with network(("probe",), {"probe": Link(delay_ms=1)}):
            return ""
    except OSError as error:
        return f"this kernel cannot do it: {error}"


@lru_cache
def has_netem() -> bool:
    """Whether the kernel shapes links itself."""
    probe = f"ft{os.getpid():x}np"
    try:
        _run(["ip", "link", "add", probe, "type", "veth"])
        try:
            _run(["tc", "qdisc", "add", "dev", probe, "root", *Link(delay_ms=1).words()])
        finally:
            _run(["ip", "link", "del", probe])
    except OSError:
        return False
    return True


@contextmanager
def network(hosts: Sequence[str], links: Mapping[str, Link] | None = None) -> Iterator[Network]:
    """Hosts in namespaces of their own, on one bridge; removed at the end, with what runs in them.

    Args:
        hosts: at most 200; short names of letters, digits and hyphens.
        links: host -> how its link is shaped; others are not.

    Raises:
        OSError: the kernel does not allow it; the message is that of `ip` or `tc`.
    """
    made = next(_MADE)
    number = (os.getpid() + made) % 200 + 20
    prefix = f"ft{os.getpid():x}.{made % 100}"  # a device's name has at most 15 characters
    bridge = f"{prefix}br"
    addresses = {host: f"10.{number}.0.{i + 2}" for i, host in enumerate(hosts)}
    ends = {host: f"{prefix}v{i}" for i, host in enumerate(hosts)}
    net = Network(prefix, addresses, ends)
    with ExitStack() as stack:
        _make(stack, ["ip", "link", "add", bridge, "type", "bridge"], ["ip", "link", "del", bridge])
        _run(["ip", "addr", "add", f"10.{number}.0.1/24", "dev", bridge])
        _run(["ip", "link", "set", bridge, "up"])
        for host in hosts:
            _join(stack, net, host, bridge)
        for host, link in (links or {}).items():
            net.shape(host, link)
        yield net


def _join(stack: ExitStack, net: Network, host: str, bridge: str) -> None:
    """Make a host's namespace and connect it."""
    space, end = net.namespace(host), net._ends[host]
    _make(stack, ["ip", "netns", "add", space], ["ip", "netns", "del", space])
    stack.callback(_end_all_in, space)
    if has_netem():
        pair = ["ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", space]
        _make(stack, pair, ["ip", "link", "del", end])
    else:
        cable = net._cables[host] = Cable(end, f"{end}x")
        stack.callback(cable.close)
        _run(["ip", "link", "set", f"{end}x", "netns", space, "name", "eth0"])
    _run(["ip", "link", "set", end, "master", bridge])
    _run(["ip", "link", "set", end, "up"])
    inside = ["ip", "-n", space]
    _run([*inside, "addr", "add", f"{net.addresses[host]}/24", "dev", "eth0"])
    _run([*inside, "link", "set", "eth0", "up"])
    _run([*inside, "link", "set", "lo", "up"])


def _make(stack: ExitStack, make: Sequence[str], undo: Sequence[str]) -> None:
    _run(make)

    def remove() -> None:
        with suppress(OSError):  # with one end of a pair, or its namespace, the other is gone
            _run(undo)

    stack.callback(remove)


def _end_all_in(space: str) -> None:
    """End the processes of a namespace: without it, they would hold it open."""
    with suppress(OSError):
        pids = _run(["ip", "netns", "pids", space]).split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command[:4])}: {done.stderr.strip().partition(chr(10))[0]}")
    return done.stdout
