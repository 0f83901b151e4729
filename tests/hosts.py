"""Hosts for tests on one machine: namespaces of the kernel, joined by a bridge.

A host has its own name, network, processes and mounts, and shares the files of this machine. Its cable can be
pulled. Works for root, and for others where the kernel lets them make user namespaces.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PATIENCE_S = 20.0
# Says that it is there, and stays until the pipe from this process ends, however this process ends.
KEEPER = "echo ready && exec cat > /dev/null"


class NoHosts(Exception):
    """The kernel or the machine refuses; the message says what."""


class Network:
    """A bridge in a network of its own, with one address; nothing outside it can be reached.

    Raises:
        NoHosts: where namespaces are forbidden, or `ip`, `unshare` or `nsenter` are missing.
    """

    address = "10.77.0.1"

    def __init__(self) -> None:
        self._hosts: list[Host] = []
        self._user = os.geteuid() != 0
        new_user = ["--user", "--map-root-user"] if self._user else []
        self._keeper = _keep(["unshare", *new_user, "--net", "--mount", "sh", "-c", KEEPER])
        self.within = enter(self._keeper.pid, "--net", "--mount", *self.joined_user)
        try:
            self.run("ip", "link", "set", "lo", "up")
            self.run("ip", "link", "add", "bridge", "type", "bridge")
            self.run("ip", "address", "add", f"{self.address}/24", "dev", "bridge")
            self.run("ip", "link", "set", "bridge", "up")
        except NoHosts:
            self.close()
            raise

    @property
    def joined_user(self) -> tuple[str, ...]:
        return ("--user", "--preserve-credentials") if self._user else ()

    def host(self, name: str) -> Host:
        """A new host, joined to the bridge."""
        host = Host(self, name, len(self._hosts) + 2)
        self._hosts.append(host)
        return host

    def run(self, *command: str) -> None:
        """Run a command where the bridge is."""
        _run([*self.within, *command])

    def close(self) -> None:
        """Ends every process of every host."""
        for host in self._hosts:
            host.close()
        _end(self._keeper)


class Host:
    """One host of a network; made by `Network.host`."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self._network = network
        self._port = f"port{number}"
        own = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = f"'{sys.executable}' -Sc 'import socket; socket.sethostname(\"{name}\")' && {KEEPER}"
        self._keeper = _keep([*network.within, "unshare", *own, "sh", "-c", script])
        try:
            init = psutil.Process(self._keeper.pid).children()[0].pid
            self._root = Path(f"/proc/{init}/root")
            joined = ("--net", "--uts", "--mount", "--pid", *network.joined_user)
            self._within = enter(init, *joined)
            network.run("ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(init))
            network.run("ip", "link", "set", self._port, "master", "bridge", "up")
            self.run("ip", "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            self.run("ip", "link", "set", "lo", "up")
            self.run("ip", "link", "set", "eth0", "up")
        except NoHosts:
            self.close()
            raise

    def command(
        self, command: Sequence[str], folder: Path = Path("/"), environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """The command line, for this machine, of a command on the host."""
        settings = [f"{key}={value}" for key, value in (environment or {}).items()]
        return [*self._within, "env", "-C", str(folder), *settings, *command]

    def run(self, *command: str) -> None:
        """Run a command on the host to its end."""
        _run(self.command(command))

    def mount(self, folder: Path, size: str) -> None:
        """Put an empty disk of this size at a folder, which this host alone sees."""
        self.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder))

    def seen(self, folder: Path) -> Path:
        """The folder as the host sees it, for this process."""
        return self._root / folder.relative_to("/")

    def remount(self, folder: Path, *options: str) -> None:
        # Its other options in the kernel's words hold user ids, which a user namespace would refuse.
        self.run("mount", "--options-source=disable", "-o", ",".join(["remount", *options]), "tmpfs", str(folder))

    def cut_off(self) -> None:
        """Pull the cable: what is sent from now on is lost without a word."""
        self._network.run("ip", "link", "set", self._port, "down")

    def join(self) -> None:
        """Put the cable back."""
        self._network.run("ip", "link", "set", self._port, "up")

    def close(self) -> None:
        """Pull the plug: every process of the host is gone at once."""
        _end(self._keeper)


def enter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", "--target", str(pid), *namespaces]


def _keep(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that keeps namespaces alive, once they are there."""
    try:
        keeper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError as error:
        raise NoHosts(f"{command[0]}: expected an installed command, got {error.strerror}") from error
    assert keeper.stdout is not None
    if keeper.stdout.readline() == b"ready\n":
        return keeper
    refusal = keeper.communicate()[1].decode(errors="replace").strip()
    raise NoHosts(f"{' '.join(command)}: expected new namespaces, got: {refusal}")


def _end(keeper: subprocess.Popen[bytes]) -> None:
    with keeper:
        keeper.kill()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError as error:
        raise NoHosts(f"{command[0]}: expected an installed command, got {error.strerror}") from error
    if done.returncode:
        raise NoHosts(
            f"{' '.join(command)}: exit {done.returncode}: {done.stderr.decode(errors='replace').strip()}"
        )
