"""Process groups: megatron-core's are the mesh's, the small collectives, and a port that is taken."""

import socket
from types import SimpleNamespace

import pytest
import torch.distributed as dist_

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Parallel
from mmtrain.parallel.environment import Place
from mmtrain.parallel.groups import Groups, connect
from tests import dist


def use_groups(parallel: Parallel) -> dict[str, object]:
    """On a rank: join, call everything, leave."""
    groups = connect(parallel)
    kinds = ("tensor", "data", "expert", "replica")
    members = {kind: dist_.get_process_group_ranks(getattr(groups, kind)) for kind in kinds}
    of_mesh = {
        kind: next(ranks for ranks in getattr(groups.mesh, f"{kind}_groups")() if groups.rank in ranks)
        for kind in kinds
    }
    found = {
        "same": members == of_mesh,
        "objects": groups.all_gather_object({"rank": groups.rank}),
    }
    groups.barrier()
    groups.close()
    return found


@pytest.mark.parametrize("parallel", [Parallel(tensor=2), Parallel(expert=2)], ids=["tensor", "expert"])
def test_groups_and_collectives_on_two_ranks(parallel: Parallel) -> None:
    for found in dist.run(use_groups, 2, parallel):
        assert found["same"]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]


def test_a_barrier_waits_for_its_sum() -> None:
    """NCCL would return before the others are there; a stand-in for its tensor knows whether somebody read it."""
    read = []
    total = SimpleNamespace(item=lambda: read.append(True))
    Groups.barrier(SimpleNamespace(device="cpu", sum_over_world=lambda _: total))
    assert read


def join_on_a_taken_port() -> str:
    """On a rank: what connect says when somebody listens on rank 0's port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        try:
            connect(Parallel(), Place(0, 1, 0, "127.0.0.1", port, "torchrun"))
        except ConfigError as error:
            return str(error).replace(str(port), "PORT")
    return ""


def test_a_port_in_use_is_one_clear_line() -> None:
    (message,) = dist.run(join_on_a_taken_port, 1)
    assert message.startswith("port PORT on 127.0.0.1 is in use") and "--master_port" in message
