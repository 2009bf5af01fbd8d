"""Several processes that train one model: how they find each other, and how they part."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import jax

# JAX has no public name for what recognizes TPU pods, SLURM, Open MPI and Kubernetes.
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from rich.console import Console

from train.config import ConfigError
from train.failures import STOPPED, TrainingError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds that the others have to join, and after which a process that says nothing counts as lost.
JOIN, HEARTBEAT = "CIRCFLAX_JOIN_SECONDS", "CIRCFLAX_HEARTBEAT_SECONDS"
# Seconds between two attempts to reach process 0, and for those that fail alike to say so.
_PAUSE, _LAST_WORDS = 0.2, 3.0


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees it.

    Attributes:
        address: Host and port of process 0, where the others find it.
        count: How many there are.
        number: Which of them this one is, counted from 0.
    """

    address: str
    count: int
    number: int

    @property
    def host(self) -> str:
        """The host of process 0."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return int(self.address.rpartition(":")[2])


def find(environment: Mapping[str, str]) -> Group | None:
    """Finds out from the environment whether there are other processes.

    They are given by ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, or
    by a cluster that JAX recognizes: a TPU pod, SLURM, Open MPI or an indexed Kubernetes job.

    Args:
        environment: Environment variables.

    Returns:
        The processes; None for one alone.

    Raises:
        ConfigError: If the variables do not fit together.
    """
    address = environment.get(ADDRESS)
    given = {name: environment[name] for name in (COUNT, NUMBER) if name in environment}
    if not given:
        return _detect(environment, address)
    if address is None or len(given) < 2:
        missing = next(name for name in (ADDRESS, COUNT, NUMBER) if name not in environment)
        raise ConfigError(
            f"`{missing}` is not set, but `{next(iter(given))}` is; a run of several processes"
            f" needs {ADDRESS}, {COUNT} and {NUMBER}"
        )
    count, number = (_whole(name, text) for name, text in given.items())
    if not number < count:
        raise ConfigError(
            f"`{NUMBER}` {number} must be below `{COUNT}` {count}: processes are counted from 0"
        )
    if not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise ConfigError(f"`{ADDRESS}` must be a host and a port, host:1234, not {address!r}")
    return Group(address, count, number) if count > 1 else None


def join() -> None:
    """Joins the other processes of the run, if there are any.

    Call it before anything touches a device. It returns when all have joined.

    Raises:
        ConfigError: If the environment's variables do not fit together.
        TrainingError: If not all processes join in time; the sentence names those that are missing.
    """
    group = find(os.environ)
    if group is None:
        return
    seconds = _whole(JOIN, os.environ.get(JOIN, "300"))
    heartbeat = _whole(HEARTBEAT, os.environ.get(HEARTBEAT, "100"))
    call_roll(group, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        group.address,
        group.count,
        group.number,
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=heartbeat,
    )


def call_roll(group: Group, seconds: float) -> None:
    """Waits until all processes are there.

    JAX's own joining ends a process that waits in vain without an exception, and without saying
    which processes are missing.

    Args:
        group: The processes.
        seconds: How long to wait.

    Raises:
        TrainingError: If processes are missing or contradict each other; the same on all of them.
    """
    complaint = _hear(group, seconds) if group.number == 0 else _answer(group, seconds)
    if complaint:
        raise TrainingError(complaint)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def console() -> Console:
    """Standard output, on which the first process alone is heard."""
    return Console(quiet=not is_first())


def meet(where: str) -> None:
    """Waits until all processes are here.

    Args:
        where: A name of the place, another for each.
    """
    multihost_utils.sync_global_devices(where)


@contextmanager
def naming_losses() -> Iterator[None]:
    """Turns what a device says when another process is gone into a sentence.

    Raises:
        TrainingError: If another process is gone.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not (jax.process_count() > 1 and any(name in str(error) for name in ("Gloo", "NCCL"))):
            raise
        raise TrainingError(
            "another process ended or cannot be reached; the same command, on all of them, goes on"
            " from the last checkpoint"
        ) from error


def leave(command: Callable[[], int]) -> int:
    """Runs a command and parts from the other processes as its exit code asks for.

    Args:
        command: The command; what it raises is a fault of the program.

    Returns:
        Its exit code, if there are no other processes or all end alike.
    """
    try:
        code = command()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if not jax.distributed.is_initialized():
        return code
    if code in (0, STOPPED):
        jax.distributed.shutdown()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly end would wait for the others, which may be waiting for this process. They end
    # when process 0 does.
    if is_first():
        time.sleep(_LAST_WORDS)
    os._exit(code)


def _detect(environment: Mapping[str, str], address: str | None) -> Group | None:
    """The processes of a cluster, if JAX recognizes one."""
    for cluster in ClusterEnv._cluster_types:
        # A pod that is no part of an indexed job has no number.
        alone = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment
        if alone or cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        count = cluster.get_process_count()
        if count == 1:
            return None
        port = environment.get("JAX_COORDINATOR_PORT")
        address = address or cluster.get_coordinator_address(
            timeout_secs=60, override_coordinator_port=port
        )
        return Group(address, count, cluster.get_process_id())
    if address is not None:
        raise ConfigError(
            f"`{ADDRESS}` is set, but not {COUNT} and {NUMBER}, and there is no cluster that would"
            " give them"
        )
    return None


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"`{name}` must be a whole number, not {text!r}")
    return int(text)


def _hear(group: Group, seconds: float) -> str:
    """Process 0 hears the others, and tells them all what is wrong, or nothing."""
    deadline = time.monotonic() + seconds
    there: set[int] = set()
    connections: list[socket.socket] = []
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    complaint = ""
    with ExitStack() as stack:
        try:
            server = socket.create_server(("", group.port), family=family, dualstack_ipv6=both)
        except OSError as error:
            return f"process 0 cannot listen on port {group.port}: {error.strerror}"
        stack.enter_context(server)
        while len(there) < group.count - 1 and not complaint:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                complaint = _missing(group, there, seconds)
                break
            stack.enter_context(connection)
            call = _read(connection, 1.0)
            # Whoever else knocks at the port.
            if not (isinstance(call, list) and len(call) == 2):
                continue
            number, count = call
            if count != group.count:
                complaint = f"process {number} was told of {count} processes, 0 of {group.count}"
            elif number in (0, *there):
                complaint = f"two processes have the number {number}"
            there.add(number)
            connections.append(connection)
        for connection in connections:
            _write(connection, complaint)
    return complaint


def _answer(group: Group, seconds: float) -> str:
    """Another process calls process 0, and hears from it what is wrong, or nothing."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((group.host, group.port), timeout=5)
        except OSError:
            time.sleep(_PAUSE)
            continue
        with connection:
            _write(connection, [group.number, group.count])
            answer = _read(connection, seconds + 10)
        if answer is not None:
            return answer
    return f"process 0 of {group.count} did not answer at `{group.address}` within {seconds:g} s"


def _missing(group: Group, there: set[int], seconds: float) -> str:
    missing = [str(number) for number in range(1, group.count) if number not in there]
    names = ", ".join(missing)
    which = f"process {names}" if len(missing) == 1 else f"processes {names}"
    return f"{which} of {group.count} did not join within {seconds:g} s"


def _write(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, seconds: float) -> object:
    """The message, or None where there is none."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as lines:
            return json.loads(lines.readline(1000))
    except (OSError, ValueError):
        return None
