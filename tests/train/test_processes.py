"""Several processes train one model: they find each other, feed their own rows, stop and go on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.train.test_run import finished
from train import processes, trainer
from train.__main__ import main
from train.config import ConfigError
from train.failures import STOPPED, TrainingError
from train.processes import ADDRESS, COUNT, JOIN, NUMBER, Group, call_roll, find

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def variables(address: str | None, count: str | None, number: str | None) -> dict[str, str]:
    given = {ADDRESS: address, COUNT: count, NUMBER: number}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, None),
        (variables("host:1", "4", "3"), Group("host:1", 4, 3)),
        (variables("[::1]:1", "2", "0"), Group("[::1]:1", 2, 0)),
        (variables("host:1", "1", "0"), None),
        (SLURM, Group("node3:61447", 2, 1)),
        (SLURM | variables("host:1", None, None), Group("host:1", 2, 1)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # A pod of Kubernetes that is no part of an indexed job.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_the_environment_says_which_processes_there_are(environment, group, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find(os.environ) == group


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (variables(None, "2", "0"), "`JAX_COORDINATOR_ADDRESS` is not set, but"),
        (variables("host:1", "2", None), "`JAX_PROCESS_ID` is not set, but `JAX_NUM_PROCESSES`"),
        (variables("host:1", None, "1"), "`JAX_NUM_PROCESSES` is not set, but `JAX_PROCESS_ID`"),
        (variables("host:1", None, None), "there is no cluster that would give them"),
        (variables("host:1", "2", "2"), "`JAX_PROCESS_ID` 2 must be below `JAX_NUM_PROCESSES` 2"),
        (variables("host:1", "two", "1"), "`JAX_NUM_PROCESSES` must be a whole number"),
        (variables("host:1", "2", "-1"), "`JAX_PROCESS_ID` must be a whole number, not '-1'"),
        (variables("host", "2", "1"), "must be a host and a port"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environment, message) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        find(environment)


@pytest.mark.parametrize(
    ("callers", "message"),
    [
        ([(0, 3), (1, 3), (2, 3)], None),
        ([(0, 3), (2, 3)], "process 1 of 3 did not join within 1 s"),
        ([(0, 5), (3, 5)], "processes 1, 2, 4 of 5 did not join within 1 s"),
        ([(1, 2)], "process 0 of 2 did not answer at `127.0.0.1:"),
        ([(0, 3), (1, 3), (1, 3)], "two processes have the number 1"),
        ([(0, 3), (1, 2)], "process 1 was told of 2 processes, 0 of 3"),
    ],
)
def test_all_are_told_who_is_missing(callers, message) -> None:
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as threads:
        calls = [
            threads.submit(call_roll, Group(address, count, number), 1.0)
            for number, count in callers
        ]
    for call in calls:
        if message is None:
            call.result()
        else:
            with pytest.raises(TrainingError, match=re.escape(message)):
                call.result()


def test_a_stranger_at_the_port_is_no_process() -> None:
    group = Group(f"127.0.0.1:{free_port()}", 2, 0)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(call_roll, group, 5.0)
        while True:
            try:
                stranger = socket.create_connection((group.host, group.port))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
            call_roll(Group(group.address, 2, 1), 5.0)
        first.result()


def test_a_run_that_waits_in_vain_ends_with_a_sentence(
    arguments, tmp_path, capsys, monkeypatch
) -> None:
    environment = {**variables(f"127.0.0.1:{free_port()}", "2", "0"), JOIN: "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 1
    assert capsys.readouterr().err == "error: process 1 of 2 did not join within 1 s\n"
    monkeypatch.setenv(NUMBER, "2")
    assert main(arguments) == 2
    assert not (tmp_path / "run").exists()


def test_one_process_alone_joins_nothing(monkeypatch) -> None:
    monkeypatch.setattr(processes.jax.distributed, "initialize", pytest.fail)
    processes.join()


def start(arguments: list[str], port: int | None = None, number: int = 0) -> subprocess.Popen:
    """`python -m train`: alone, or as one of two processes."""
    joined = variables(f"127.0.0.1:{port}", "2", str(number)) if port else {}
    # Programs are kept however fast they compile.
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        env={**os.environ, **cache, **joined, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(arguments: list[str]) -> list[subprocess.Popen]:
    port = free_port()
    return [start(arguments, port, number) for number in (0, 1)]


def end(running: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Exit codes and what was written; none is left behind."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *written) for p, written in zip(running, outputs, strict=True)]


def losses(directory: Path) -> np.ndarray:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return np.asarray([json.loads(line)["loss"] for line in lines])


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """An unbroken run of two processes."""
    directory = tmp_path_factory.mktemp("two") / "run"
    found = end(start_two([*_settings(tiny_model, tiny_data), "--run.output", str(directory)]))
    assert [code for code, *_ in found] == [0, 0], found
    (_, out, _), (_, silent, _) = found
    assert "best epoch" in out
    assert "epoch" not in silent
    return directory


@pytest.fixture
def arguments_of_two(tiny_model, tiny_data, tmp_path) -> list[str]:
    return [*_settings(tiny_model, tiny_data), "--run.output", str(tmp_path / "run")]


def _settings(model: Path, data: Path) -> list[str]:
    settings = {
        "model.name": model,
        "data.root": data,
        "data.train": "train.jsonl",
        "data.validation": "validation.jsonl",
        "data.max_length": 16,
        "data.buckets": [16],
        "optim.epochs": 3,
        "optim.batch_size": 32,
        "optim.accumulation_steps": 2,
        "run.checkpoint_every": 1,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_go_on(whole, arguments_of_two, tmp_path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    two = start_two(arguments_of_two)
    while two[1].poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            two[1].send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    (code, _, error), (killed, *_) = end(two, seconds=60)
    assert killed == -signal.SIGKILL
    assert code == 1 and "process 0: another process ended" in error, error
    (code, out, error), (other, *_) = end(start_two(arguments_of_two))
    assert (code, other) == (0, 0) and "resumed from step" in out, error
    assert finished(tmp_path / "run") == finished(whole)


@pytest.mark.slow
def test_sigterm_stops_one_alone_two_go_on_and_stop_and_one_goes_on(
    whole, arguments_of_two, tmp_path, capsys, monkeypatch
) -> None:
    made = trainer.make_train_step

    def stopped(*args):
        step = made(*args)

        def wrapped(state, *rest):
            if int(state.step) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, *rest)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_train_step", stopped)
        before = signal.getsignal(signal.SIGTERM)
        assert main(arguments_of_two) == STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped: SIGTERM came, and step 4 of 9 is saved" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 5
    two = start_two(arguments_of_two)
    # They have joined when the first speaks.
    said = two[0].stdout.readline()
    two[1].send_signal(signal.SIGTERM)
    (code, out, error), (other, _, silent) = end(two)
    assert (code, other) == (STOPPED, STOPPED), (said, error)
    assert "resumed from step 4 of 9" in said + out
    stop = re.search(r"^stopped: SIGTERM came, and step (\d) of 9 is saved; the same", error, re.M)
    assert stop and int(stop[1]) > 4, error
    assert "stopped:" not in silent
    assert main(arguments_of_two) == 0
    assert f"resumed from step {stop[1]} of 9" in capsys.readouterr().out
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-5)
