"""Clusters: described, taken from presets or from this machine, and as TorchRec sees them."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardemb as se
from shardemb.cluster import Cluster, cluster_of
from shardemb.env import Env
from shardemb.host_memory import host_memory_bytes
from shardemb.machines import MACHINES, machine_of
from shardemb.planning.estimates import topology_of
from shardemb.planning.probe import probe
from tests.spmd import spmd

FIELDS: dict[str, Any] = {
    "name": "mine",
    "num_nodes": 2,
    "ranks_per_node": 4,
    "memory_bytes": 1 << 30,
    "memory_gb_per_s": 100.0,
    "intra_node_gb_per_s": 20.0,
    "inter_node_gb_per_s": 5.0,
}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"device": "tpu"}, "cluster 'mine': device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"num_nodes": 0}, "cluster 'mine': num_nodes must be a positive integer, got 0"),
        ({"ranks_per_node": True}, "ranks_per_node must be a positive integer, got True"),
        ({"memory_bytes": 1e9}, "memory_bytes must be a positive integer, got 1000000000.0"),
        ({"memory_bytes": 10**400}, "memory_bytes must be at most 9223372036854775808, got 1000"),
        ({"num_nodes": 1 << 21}, "num_nodes must be at most 1048576, got 2097152"),
        ({"memory_gb_per_s": 10**400}, "memory_gb_per_s must be a positive number .* at most 1e"),
        ({"memory_gb_per_s": 0}, r"memory_gb_per_s must be a positive number of 10\^9 bytes/s"),
        ({"inter_node_gb_per_s": float("nan")}, "inter_node_gb_per_s must be a positive number"),
        ({"intra_node_gb_per_s": "fast"}, "intra_node_gb_per_s must be a positive .* got 'fast'"),
    ],
)
def test_an_impossible_cluster_is_refused(changed: dict[str, Any], text: str) -> None:
    assert Cluster(**FIELDS).world_size == 8
    with pytest.raises(ValueError, match=text):
        Cluster(**FIELDS | changed)


def test_presets_are_the_vendors_figures_per_rank_and_direction() -> None:
    h100 = Cluster.preset("h100", num_nodes=8)
    assert (h100.world_size, h100.ranks_per_node, h100.device) == (64, 8, "cuda")
    assert h100.memory_bytes == 80 * 10**9
    assert (h100.memory_gb_per_s, h100.intra_node_gb_per_s) == (3350, 450)
    assert h100.inter_node_gb_per_s == 400 / 8
    assert Cluster.preset("h200").memory_bytes > h100.memory_bytes
    assert Cluster.preset("b200").memory_gb_per_s * 8 == 64_000
    assert Cluster.preset("l4", ranks_per_node=4).world_size == 4
    for name in MACHINES:
        preset = Cluster.preset(name)
        assert preset.intra_node_gb_per_s > preset.inter_node_gb_per_s
    with pytest.raises(ValueError, match="there is no preset 'p100'; there are h100, h200, b200"):
        Cluster.preset("p100")


def test_a_gpu_is_known_by_its_exact_name_only() -> None:
    assert machine_of("NVIDIA H100 80GB HBM3") is MACHINES["h100"]
    assert machine_of("NVIDIA H100 PCIe") is None
    assert machine_of("NVIDIA L40S") is None


def test_torchrec_sees_the_cluster_s_numbers() -> None:
    for device in ("cpu", "cuda"):
        topology = topology_of(Cluster(**FIELDS | {"device": device}))
        assert (topology.world_size, topology.local_world_size) == (8, 4)
        assert topology.compute_device == device
        storages = [found.storage for found in topology.devices]
        memory = [found.hbm if device == "cuda" else found.ddr for found in storages]
        assert memory == [1 << 30] * 8
        bandwidth = topology.hbm_mem_bw if device == "cuda" else topology.ddr_mem_bw
        assert bandwidth == 100e9 / 1e3  # bytes in a ms
        assert topology.comms_bandwidths.intra_host_bw == 20e9 / 1e3
        assert topology.comms_bandwidths.inter_host_bw == 5e9 / 1e3


def test_an_env_made_by_hand_is_of_another_machine() -> None:
    cpu = cluster_of(Env(world_size=8, num_nodes=2))
    assert (cpu.num_nodes, cpu.ranks_per_node, cpu.device) == (2, 4, "cpu")
    assert cpu.memory_bytes == 128 << 30
    cuda = cluster_of(Env(world_size=8, device=torch.device("cuda")))
    assert (cuda.device, cuda.memory_bytes) == ("cuda", 32 << 30)


@spmd(world_size=2)
def test_ranks_of_this_run_share_this_node_s_memory(env: Env) -> None:
    assert env.is_live
    cluster = cluster_of(env)
    assert cluster.memory_bytes == host_memory_bytes() // 2
    by_hand = Env(rank=env.rank, local_rank=env.rank, world_size=2)
    assert not by_hand.is_live
    assert not replace(env, num_nodes=2).is_live
    assert by_hand == replace(env, run_id=None)
    assert "of_this_run" not in repr(env)
    model = se.EmbeddingBagCollection(
        [se.TableConfig(name="a", num_embeddings=9, embedding_dim=4, feature_names=("a",))]
    )
    assert se.plan_sharding(model, env).cluster == cluster


def test_a_plan_for_a_cluster_is_that_for_an_env_like_it() -> None:
    tables = [
        se.TableConfig(name=f"t{i}", num_embeddings=9**i, embedding_dim=8, feature_names=(f"t{i}",))
        for i in range(1, 7)
    ]
    model = se.EmbeddingBagCollection(tables)
    env = Env(world_size=4, num_nodes=2)
    assert se.plan_sharding(model, env) == se.plan_sharding(model, cluster_of(env))


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_the_memory_is_what_the_control_groups_leave(tmp_path: Path) -> None:
    built_in = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory_bytes(tmp_path) == built_in
    write(tmp_path, "proc/self/cgroup", "0::/job/step")
    assert host_memory_bytes(tmp_path) == built_in
    write(tmp_path, "sys/fs/cgroup/job/step/memory.max", "max")
    assert host_memory_bytes(tmp_path) == built_in
    write(tmp_path, "sys/fs/cgroup/job/memory.max", "123456789")
    assert host_memory_bytes(tmp_path) == 123456789
    write(tmp_path, "sys/fs/cgroup/memory.max", "4096000")
    assert host_memory_bytes(tmp_path) == 4096000


def test_the_memory_is_what_old_control_groups_leave(tmp_path: Path) -> None:
    built_in = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write(tmp_path, "proc/self/cgroup", "3:cpuset:/a\n4:memory,other:/b\n0::/")
    write(tmp_path, "sys/fs/cgroup/memory/b/memory.limit_in_bytes", str((1 << 63) - 4096))
    assert host_memory_bytes(tmp_path) == built_in
    write(tmp_path, "sys/fs/cgroup/memory/b/memory.limit_in_bytes", "77777777")
    assert host_memory_bytes(tmp_path) == 77777777


@pytest.mark.distributed
def test_probe_measures_ranks_that_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    measured = probe(num_ranks=2, out=out)
    assert (measured.world_size, measured.num_nodes) == (2, 1)
    if not torch.cuda.is_available():
        assert measured.memory_bytes == host_memory_bytes() // 2
    assert measured.intra_node_gb_per_s > 0.001
    assert measured.memory_gb_per_s > 0.01
    assert "2 ranks" in out.getvalue()
    assert f"{measured.memory_gb_per_s:.3g} GB/s, by copies" in out.getvalue()
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"probe: num_ranks must be from 1 to .*, got 0"):
        probe(num_ranks=0)
