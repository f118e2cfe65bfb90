"""Start a fairseq-train command as several gloo workers and end them together.

    distributed.sh N fairseq-train DATA ...                     N workers on this host
    distributed.sh N --nodes M --node-rank R --master HOST:PORT fairseq-train DATA ...
                                                                the same on each of M hosts, R = 0 .. M - 1;
                                                                HOST is an address of the one with R = 0

The flags of distributed training are added at the command's end. Rank 0's output is this command's; lines of the
others begin with [rank R] and go to standard error. When a worker fails, the others on its host are ended. The exit
code is that of the worker that failed first; for a signal, 128 and its number. A signal that ends this command, SIGKILL
too, ends the workers.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

GRACE_S = 5.0  # between the signal that asks a worker to end and the one that makes it
POLL_S = 0.05
DEFAULT_PORT = 29500
_PR_SET_PDEATHSIG, _SIOCGIFADDR = 1, 0x8915
_libc = ctypes.CDLL(None)


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def interface_to(host: str) -> str | None:
    """The network interface through which this host reaches ``host`` by IPv4; None where that cannot be told.

    gloo takes the one that the host's own name resolves to, which is often another.

    Raises:
        ValueError: ``host`` cannot be resolved or reached.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError as error:
            raise ValueError(f"--master: cannot reach {host}: {error}") from None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has no address
                continue
            if socket.inet_ntoa(reply[20:24]) == own:
                return name
    return None


def distributed_flags(command: Sequence[str], master: str, world_size: int, rank: int) -> list[str]:
    """What a fairseq-train command needs to be worker ``rank`` on a CPU; a DDP backend that it names is kept.

    One worker alone needs nothing.
    """
    if world_size == 1:
        return []
    flags = [
        "--distributed-init-method", f"tcp://{master}", "--distributed-world-size", str(world_size),
        "--distributed-rank", str(rank), "--distributed-no-spawn", "--distributed-backend", "gloo", "--cpu",
    ]  # fmt: skip
    if not any(part.partition("=")[0] == "--ddp-backend" for part in command):
        flags += ["--ddp-backend", "legacy_ddp"]
    return flags


class Workers:
    """The workers of one command on this host.

    Attributes:
        processes: by rank.
        failure: which failed first and how, after :meth:`wait`; empty if none did.

    Args:
        command: a fairseq-train command.
        count: how many to start.
        world_size: how many there are on all hosts.
        first_rank: the rank of the first one here.
        master: HOST:PORT of rank 0; None: a free port of this host.
        output: a file descriptor for rank 0's output; None: this process's own.
        others_output: where the lines of the others go.

    Raises:
        ValueError: the command does not exist, or ``master`` cannot be reached.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        world_size: int | None = None,
        first_rank: int = 0,
        master: str | None = None,
        output: int | None = None,
        others_output: IO[bytes] = sys.stderr.buffer,
    ) -> None:
        world_size = world_size or count
        master = master or f"127.0.0.1:{free_port()}"
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
        interface = interface_to(master.rpartition(":")[0])
        if interface is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        self.first_rank = first_rank
        self.failure = ""
        self.processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        for rank in range(first_rank, first_rank + count):
            try:
                process = subprocess.Popen(
                    [*command, *distributed_flags(command, master, world_size, rank)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank else output,
                    stderr=subprocess.STDOUT if rank or output is not None else None,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                self.end()
                raise ValueError(f"cannot start {command[0]}: {error.strerror}") from None
            self.processes.append(process)
        for rank, process in enumerate(self.processes, first_rank):
            if rank:
                assert process.stdout is not None
                reader = threading.Thread(target=_prefix, args=(process.stdout, rank, others_output), daemon=True)
                reader.start()
                self._readers.append(reader)

    def wait(self) -> int:
        """Until all have ended, or one fails: then the others are ended. Returns the exit code."""
        while True:
            codes = [process.poll() for process in self.processes]
            failed = next((index for index, code in enumerate(codes) if code), None)
            if failed is not None:
                code = codes[failed]
                assert code is not None
                how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
                self.end()
                self.failure = f"rank {self.first_rank + failed} ended first, by {how}; all on this host were ended"
                return code if code > 0 else 128 - code
            if all(code == 0 for code in codes):
                self.end()
                return 0
            time.sleep(POLL_S)

    def end(self) -> None:
        """End those that still run, and what they started."""
        for number, grace in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            for process in self.processes:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
                time.sleep(POLL_S)
        for reader in self._readers:
            reader.join(timeout=1)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prefix(lines: IO[bytes], rank: int, output: IO[bytes]) -> None:
    for line in lines:
        output.write(f"[rank {rank}] ".encode() + line)
        output.flush()


def _say(message: str) -> None:
    print(f"distributed.sh: {message}", file=sys.stderr)


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """This command's own arguments, N among them, and the command to start."""
    index, has_count = 0, False
    while index < len(argv):
        if argv[index].startswith("-"):
            index += 1 if "=" in argv[index] or argv[index] in ("-h", "--help") else 2
        elif not has_count:
            index, has_count = index + 1, True
        else:
            break
    return argv[:index], argv[index:]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: an argument's value; the message names it.
    """
    parser = argparse.ArgumentParser(
        prog="distributed.sh",
        usage="distributed.sh N [--nodes M --node-rank R --master HOST[:PORT]] CMD ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workers", metavar="N", help="workers on this host")
    parser.add_argument("--nodes", metavar="M", default="1", help="hosts (default: 1)")
    parser.add_argument("--node-rank", metavar="R", default="0", help="which of them this is, from 0 (default: 0)")
    parser.add_argument("--master", metavar="HOST[:PORT]", help=f"where host 0 listens (default port: {DEFAULT_PORT})")
    own, command = _split(argv)
    args = parser.parse_args(own)
    args.command = command
    for name, least in (("workers", 1), ("nodes", 1), ("node_rank", 0)):
        text = getattr(args, name)
        if not text.isdecimal() or int(text) < least:
            flag = "N" if name == "workers" else "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: got {text!r}, expected an integer >= {least}")
        setattr(args, name, int(text))
    if args.node_rank >= args.nodes:
        raise ValueError(f"--node-rank: got {args.node_rank}, expected 0 to {args.nodes - 1} (--nodes {args.nodes})")
    if args.nodes > 1 and args.master is None:
        raise ValueError("--master: got none, expected HOST:PORT of the host with --node-rank 0")
    if args.master is not None:
        host, _, port = args.master.partition(":")
        port = port or str(DEFAULT_PORT)
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--master: got {args.master!r}, expected HOST or HOST:PORT")
        args.master = f"{host}:{port}"
    if not args.command:
        raise ValueError("CMD: got nothing, expected a fairseq-train command")
    return args


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; 2 for bad arguments."""
    workers = None

    def end(number: int, frame: object) -> None:
        if workers is not None:
            workers.end()
        sys.exit(128 + number)

    try:
        args = parse(argv)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        workers = Workers(
            args.command, args.workers, args.workers * args.nodes, args.workers * args.node_rank, args.master
        )
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    code = workers.wait()
    if workers.failure and args.workers > 1:
        _say(workers.failure)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
