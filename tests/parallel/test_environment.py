"""Where a process learns who it is."""

import socket

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.parallel import environment
from mmtrain.parallel.environment import FREE_PORTS, SLURM_PORTS, Place, discover, first_host, free_port, port_in_use

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
    [("node", "node"), ("a1,a2", "a1"), ("gpu[03-07,9],x", "gpu03"), ("n[12]", "n12"), ("r[1-2]-ib,s", "r1-ib")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


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
