"""The mesh's arithmetic, against its own definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config.errors import ConfigError
from mmtrain.parallel.mesh import Mesh

SMALL = st.integers(1, 5)


@given(SMALL, SMALL, SMALL)
def test_every_kind_of_group_is_a_partition_of_the_ranks(tensor: int, expert: int, replicas: int) -> None:
    mesh = Mesh(tensor * expert * replicas, tensor, expert)
    sizes = {"tensor": tensor, "data": expert * replicas, "expert": expert, "replica": replicas}
    for kind, size in sizes.items():
        groups = getattr(mesh, f"{kind}_groups")()
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        assert {len(group) for group in groups} == {size}


@given(SMALL, SMALL, SMALL)
def test_coordinates_name_a_rank(tensor: int, expert: int, replicas: int) -> None:
    mesh = Mesh(tensor * expert * replicas, tensor, expert)
    places = {(mesh.tensor_rank(r), mesh.expert_rank(r), mesh.replica(r)) for r in range(mesh.world)}
    assert len(places) == mesh.world
    for group in mesh.expert_groups():
        assert [mesh.expert_rank(rank) for rank in group] == list(range(expert))
        assert len({(mesh.tensor_rank(rank), mesh.replica(rank)) for rank in group}) == 1


def test_a_world_that_does_not_fit_says_which_ones_do() -> None:
    with pytest.raises(ConfigError, match=r"6 processes cannot hold tensor = 2 and expert = 2.*Start 4 or 8"):
        Mesh(6, 2, 2)
    with pytest.raises(ConfigError, match=r"1 processes cannot hold.*Start 4"):
        Mesh(1, 2, 2)
    with pytest.raises(ConfigError, match="must be at least 1"):
        Mesh(4, 0, 1)
