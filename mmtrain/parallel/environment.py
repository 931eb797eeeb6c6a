"""Who am I among the processes? Read from the launcher's environment variables, without starting anything."""

import os
import random
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from mmtrain.config.errors import ConfigError

SLURM_PORTS = range(20000, 30000)  # below Linux's ephemeral range, so that no outgoing connection holds one


@dataclass(frozen=True)
class Place:
    """A process of the job, and where its rank 0 listens."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    launcher: str


def discover(environment: Mapping[str, str] | None = None) -> Place:
    """The place of this process: from torchrun or deepspeed, else srun, else alone.

    ConfigError: half of it is said, or a number is none.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_launcher(env)
    if "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", "1") > 1:
        return _from_slurm(env)
    return Place(0, 1, 0, "127.0.0.1", free_port(), "none")


def _from_launcher(env: Mapping[str, str]) -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as torchrun and deepspeed set them.

    Without LOCAL_RANK a process is the only one of its machine: operators that start one a pod do not set it.
    """
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(key)]
    if missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} not set beside RANK / WORLD_SIZE: start with deepspeed, torchrun or "
            f"srun, or unset RANK and WORLD_SIZE to run one process"
        )
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if rank >= world:
        raise ConfigError(f"environment: RANK={rank} with WORLD_SIZE={world}: ranks go from 0 to {world - 1}")
    return Place(
        rank, world, _number(env, "LOCAL_RANK", "0"), env["MASTER_ADDR"], _number(env, "MASTER_PORT"), "torchrun"
    )


def _number(env: Mapping[str, str], key: str, default: str = "") -> int:
    """The variable as a whole number that is not negative."""
    text = env.get(key) or default
    if not text.isdecimal():
        raise ConfigError(
            f"environment: {key}={text!r} is not a whole number; correct it, or unset it to run one process"
        )
    return int(text)


def _from_slurm(env: Mapping[str, str]) -> Place:
    """srun's variables; rank 0 listens on the first host of the job, on a port that follows from the job's number."""
    tasks = _number(env, "SLURM_NTASKS")
    if "SLURM_STEP_ID" not in env:  # the batch script itself is no task of a step: the others would never come
        raise ConfigError(
            f"environment: a job of {tasks} tasks, but this process was not started by srun: start it with "
            "`srun python ...`, or with SLURM_NTASKS=1 before it to run one process"
        )
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not hosts:
        raise ConfigError("environment: SLURM_PROCID without SLURM_JOB_NODELIST: start the program with srun in a job")
    port = SLURM_PORTS[_number(env, "SLURM_JOB_ID", "0") % len(SLURM_PORTS)]
    return Place(
        _number(env, "SLURM_PROCID"),
        tasks,
        _number(env, "SLURM_LOCALID", "0"),
        env.get("MASTER_ADDR") or first_host(hosts),
        _number(env, "MASTER_PORT", str(port)),
        "srun",
    )


def first_host(nodelist: str) -> str:
    """First name of SLURM's compressed list: "gpu[03-07,9],login" -> "gpu03", "r1i[0-3]n[0-8]" -> "r1i0n0"."""
    match = re.match(r"([^\[\],]|\[\w[^\[\]]*\])+(?=,|$)", nodelist)  # to the first comma outside of brackets
    if match is None:
        raise ConfigError(f"environment: cannot read SLURM_JOB_NODELIST {nodelist!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def device_number(place: Place, visible: int) -> int:
    """Which of the `visible` GPUs of this process is its own.

    srun may show a task only the GPU that it was given (--gpus-per-task=1): that is number 0 in every task.
    ConfigError: there are fewer GPUs than ranks on this machine.
    """
    if place.launcher == "srun" and visible == 1:
        return 0
    if place.local_rank >= visible:
        raise ConfigError(
            f"rank {place.rank} is number {place.local_rank} on this machine and sees {visible} GPU"
            f"{'s' if visible > 1 else ''}: start one rank a GPU, or show this rank its own"
        )
    return place.local_rank


FREE_PORTS = range(SLURM_PORTS.stop, 32768)  # below Linux's ephemeral range too


def free_port() -> int:
    """A port on this machine that nobody listens on now; drawn, so that two who ask at once get different ones."""
    draw = random.SystemRandom()
    while True:
        port = draw.choice(FREE_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def port_in_use(place: Place) -> ConfigError:
    """The error of a rank 0 whose port is taken."""
    remedy = {
        "none": "start again: a free port is chosen at every start",
        "srun": "set MASTER_PORT to another port in the job script",
        "torchrun": "choose another, e.g. `deepspeed --master_port 29511` or `torchrun --master-port 29511`",
    }[place.launcher]
    return ConfigError(
        f"port {place.port} on {place.address} is in use, by another job or by one that did not end: {remedy}"
    )
