"""Several "hosts" on this machine: network, host name and ssh of their own, files shared, as root.

Each is a network namespace on one bridge, with an sshd that lets this test in without a password.
Nothing outside the namespaces changes but /etc/netns/NAME and /run/sshd, of which the first goes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.cluster import programs

PROGRAMS = ("ip", "nsenter", "unshare", "pdsh", "ssh-keygen", "/usr/sbin/sshd")
SWITCH = "gemoe-sw"
# own mounts: a host name and an /etc/hosts, /etc/ssh of its own. Not `ip netns exec`, which hides
# /sys/fs/cgroup.
ENTER = """
h=$0; hostname $h
mount --bind /etc/netns/$h/hosts /etc/hosts; mount --bind /etc/netns/$h/ssh /etc/ssh
exec "$@"
"""


why_not = partial(programs.why_not, PROGRAMS)


class Hosts:
    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.addresses = {f"gemoe-h{i}": f"10.79.0.{10 + i}" for i in range(number)}

    @property
    def names(self) -> list[str]:
        return list(self.addresses)

    def up(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("id", "host"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        _call("ip", "netns", "add", SWITCH)
        _call("ip", "-n", SWITCH, "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", SWITCH, "link", "set", "br0", "up")
        table = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        for name, address in self.addresses.items():
            port = f"gp{name[-1]}"
            _call("ip", "netns", "add", name)
            _call(
                *("ip", "link", "add", port, "netns", SWITCH),
                *("type", "veth", "peer", "name", "eth0", "netns", name),
            )
            _call("ip", "-n", SWITCH, "link", "set", port, "master", "br0", "up")
            _call("ip", "-n", name, "link", "set", "lo", "up")
            _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _call("ip", "-n", name, "link", "set", "eth0", "up")
            self._write_etc(Path("/etc/netns") / name, f"127.0.0.1 localhost\n{table}", name)
            self.run(name, "/usr/sbin/sshd", "-f", "/etc/ssh/sshd_config")

    def _write_etc(self, etc: Path, table: str, name: str) -> None:
        ssh = etc / "ssh"
        ssh.mkdir(parents=True)
        (etc / "hosts").write_text(table)
        for key, own in (("id", "id"), ("host", "host"), ("id.pub", "authorized")):
            shutil.copy(self.folder / key, ssh / own)
            (ssh / own).chmod(0o600)
        (ssh / "ssh_config").write_text(
            "Host *\n IdentityFile /etc/ssh/id\n IdentitiesOnly yes\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        (ssh / "sshd_config").write_text(
            "Port 22\nHostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/authorized\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
            f"StrictModes no\nSetEnv PATH={programs}\nPidFile {self.folder}/sshd-{name}.pid\n"
        )

    def down(self) -> None:
        for name in [*self.names, SWITCH]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in inside.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def command(self, name: str, *command: str) -> list[str]:
        return [
            *("nsenter", f"--net=/run/netns/{name}"),
            *("unshare", "--mount", "--uts", "--propagation", "private"),
            *("bash", "-c", ENTER, name, *command),
        ]

    def run(self, name: str, *command: str, **changes: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(name, *command), capture_output=True, text=True, timeout=200, **changes
        )


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


@contextmanager
def hosts(folder: Path, number: int = 2) -> Iterator[Hosts]:
    made = Hosts(folder, number)
    try:
        made.down()  # of a test that was killed
        made.up()
        yield made
    finally:
        made.down()
