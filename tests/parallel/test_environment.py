"""Where a process learns who it is."""

import socket

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.parallel import environment
from mmtrain.parallel.environment import (
    FREE_PORTS,
    SLURM_PORTS,
    Place,
    device_number,
    discover,
    first_host,
    free_port,
    port_in_use,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345"}
SLURM = {**BATCH, "SLURM_STEP_ID": "0"}


def test_torchrun_and_deepspeed() -> None:
    assert discover(TORCHRUN) == Place(3, 8, 1, "n1", 29500, "torchrun")


def test_srun_takes_the_first_host_and_a_port_of_the_job() -> None:
    place = discover({**SLURM, "SLURM_JOB_NODELIST": "gpu[03-07,9],login"})
    assert place == Place(5, 8, 1, "gpu03", 22345, "srun")
    assert discover({**SLURM, "SLURM_JOB_NODELIST": "a,b", "MASTER_PORT": "7"}).port == 7
    step = {**SLURM, "SLURM_JOB_NODELIST": "a,b", "SLURM_STEP_NODELIST": "b"}
    assert discover(step).address == "b"


def test_alone_without_a_launcher_or_with_one_task() -> None:
    assert (discover({}).world, discover({}).launcher) == (1, "none")
    assert discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).world == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node", "node"),
        ("a1,a2", "a1"),
        ("gpu[03-07,9],x", "gpu03"),
        ("n[12]", "n12"),
        ("r[1-2]-ib,s", "r1-ib"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("r1i[0-3]n[0,4-8],s[1-2]", "r1i0n0"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", [",n1", "n[1-2", "n[]"])
def test_a_list_of_hosts_that_cannot_be_read(nodes: str) -> None:
    with pytest.raises(ConfigError, match="cannot read SLURM_JOB_NODELIST"):
        first_host(nodes)


def test_every_rank_of_a_machine_has_its_own_gpu() -> None:
    def place(local_rank: int, launcher: str) -> Place:
        return Place(8 + local_rank, 16, local_rank, "n1", 29500, launcher)

    assert [device_number(place(local, "torchrun"), 8) for local in (0, 7)] == [0, 7]
    assert [device_number(place(local, "srun"), 8) for local in (0, 7)] == [0, 7]
    assert [device_number(place(local, "srun"), 1) for local in (0, 7)] == [0, 0]  # --gpus-per-task=1
    with pytest.raises(ConfigError, match=r"rank 12 is number 4 on this machine and sees 4 GPUs: start one rank a GPU"):
        device_number(place(4, "srun"), 4)
    with pytest.raises(ConfigError, match=r"rank 9 is number 1 on this machine and sees 1 GPU: start one rank a GPU"):
        device_number(place(1, "torchrun"), 1)


def test_a_rank_without_local_rank_is_alone_on_its_machine() -> None:
    assert discover({key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}).local_rank == 0


def test_half_an_environment_is_an_error_that_names_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set.*unset RANK"):
        discover({"RANK": "0"})
    with pytest.raises(ConfigError, match="SLURM_PROCID without SLURM_JOB_NODELIST"):
        discover(SLURM)


def test_a_batch_script_without_srun_is_told_so_instead_of_waiting_for_others() -> None:
    with pytest.raises(ConfigError, match=r"a job of 8 tasks.*not started by srun.*`srun python .*SLURM_NTASKS=1"):
        discover({**BATCH, "SLURM_JOB_NODELIST": "a,b"})
    assert discover({**BATCH, "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "a,b"}).world == 1


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"environment: {key}='two' is not a whole number"):
        discover({**TORCHRUN, key: "two"})
    with pytest.raises(ConfigError, match="environment: SLURM_PROCID='-1' is not a whole number"):
        discover({**SLURM, "SLURM_PROCID": "-1", "SLURM_JOB_NODELIST": "a"})


def test_a_rank_outside_of_the_world_is_an_error() -> None:
    with pytest.raises(ConfigError, match="RANK=8 with WORLD_SIZE=8: ranks go from 0 to 7"):
        discover({**TORCHRUN, "RANK": "8"})


@pytest.mark.parametrize(
    ("launcher", "remedy"), [("torchrun", "--master_port"), ("srun", "set MASTER_PORT"), ("none", "start again")]
)
def test_a_port_in_use_comes_with_a_remedy(launcher: str, remedy: str) -> None:
    message = str(port_in_use(Place(0, 2, 0, "n1", 29500, launcher)))
    assert "port 29500 on n1 is in use" in message and remedy in message


def test_a_free_port_is_none_that_somebody_has_or_that_a_connection_may_take(monkeypatch) -> None:
    assert FREE_PORTS.stop <= 32768 and not set(FREE_PORTS) & set(SLURM_PORTS)
    found = {free_port() for _ in range(50)}
    assert found <= set(FREE_PORTS) and len(found) > 10
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        taken = held.getsockname()[1]
        monkeypatch.setattr(environment, "FREE_PORTS", [taken, min(found)])
        assert {free_port() for _ in range(20)} == {min(found)}
