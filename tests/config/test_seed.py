import hashlib

import torch

from mmtrain.config.seed import derive


def test_a_seed_is_the_head_of_a_sha256_of_the_key():
    digest = hashlib.sha256(b'[7,"init","decoder.head.weight",3]').hexdigest()
    assert derive(7, "init", "decoder.head.weight", 3) == int(digest[:16], 16) // 2


def test_sites_differ_in_every_component_and_in_type():
    sites = [(), (1,), ("1",), ("a", 1), ("a", "1"), ("a1",), ("a", "", "1"), ('a","1',), ("a", 1, 0)]
    seeds = [derive(seed, *site) for seed in (0, 1, 11) for site in sites]
    assert len(set(seeds)) == len(seeds)


def test_torch_accepts_every_seed():
    for site in range(200):
        seed = derive(0, "site", site)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)
