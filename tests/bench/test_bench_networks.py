"""`ldm bench unet, vae, traverse, load`: what is counted and compared. No time itself is asserted."""

import json
from types import SimpleNamespace

import pytest
import torch
from ldm_tools import cli
from torch import nn
from torch.nn import functional as F

import ldm
from ldm import pipeline
from ldm.bench import networks, traversal
from ldm.config import CONTEXT_TOKENS, PHANTOM
from ldm.probe.trace import trace_unet
from ldm.traversal.plan import Traversal
from ldm.unet import UNet


@pytest.fixture
def plan():
    return Traversal(
        neutral="a", styles={"b": "b", "c": "c"}, seeds=(0,), steps=4, swap_steps=(1, 3), guidance=2.0, bezier_points=0
    )


def test_a_product_of_matrices_counts_two_operations_an_entry():
    a, b = torch.zeros(10, 20), torch.zeros(20, 30)
    assert networks.count_gflop(lambda: a @ b) == 2 * 10 * 20 * 30 / 1e9


def test_a_fused_attention_counts_both_of_its_products():
    q, k = torch.zeros(2, 3, 40, 8), torch.zeros(2, 3, 77, 8)
    count = networks.count_gflop(lambda: F.scaled_dot_product_attention(q, k, k))
    assert count == 2 * (2 * 2 * 3 * 40 * 77 * 8) / 1e9


def test_the_count_is_that_of_the_trace():
    unet, config = ldm.load(pipeline.PHANTOM_WEIGHTS).unet, PHANTOM.unet
    x_t = torch.zeros(1, 4, config.sample_size, config.sample_size)
    count = networks.count_gflop(lambda: unet(x_t, 500, torch.zeros(1, CONTEXT_TOKENS, config.context_width)))
    with torch.device("meta"):
        blocks = trace_unet(UNet(config), (config.sample_size, config.sample_size))
    assert count == pytest.approx(sum(block.flops for block in blocks) / 1e9)


def test_ways_that_disagree_are_not_timed():
    x = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"other: .* away from eager"):
        networks.measure({"eager": lambda: x @ x, "other": lambda: 1.01 * (x @ x)}, torch.float32, "cpu", 1, "x")


def test_operations_and_blocks_share_all_of_the_time():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
    x = torch.zeros(2, 3, 32, 32)
    shares = networks.by_operation(lambda: network(x))
    assert {"convolution", "activation"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1)
    blocks = networks.by_block({"first": network[0], "last": network[2]}, lambda: network(x))
    assert blocks.keys() == {"first", "last", "rest"}
    assert sum(blocks.values()) == pytest.approx(1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network)  # nothing is left behind


def test_the_longest_operations_come_first():
    network, x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.SiLU()), torch.zeros(2, 3, 32, 32)
    rows = networks.longest(lambda: network(x), "cpu", most=3)
    assert len(rows) == 3
    assert [row["us"] for row in rows] == sorted((row["us"] for row in rows), reverse=True)
    assert 0 < sum(row["share"] for row in rows) <= 1
    everything = networks.longest(lambda: network(x), "cpu", most=1000)
    assert sum(row["share"] for row in everything) == pytest.approx(1)
    assert {"aten::silu"} <= {row["kernel"] for row in everything}


class Profiler:
    """What torch's says of a GPU: an operation of the CPU, which waits for its kernels, and the kernels."""

    def __init__(self, kernels):
        cpu, cuda = SimpleNamespace(name="CPU"), SimpleNamespace(name="CUDA")
        self.events = [SimpleNamespace(key="aten::mm", count=3, device_type=cpu, self_device_time_total=9.0)]
        self.events += [
            SimpleNamespace(key=name, count=1, device_type=cuda, self_device_time_total=us) for name, us in kernels
        ]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def key_averages(self):
        return self.events


def test_of_a_gpu_its_kernels_are_listed_and_not_what_launches_them(monkeypatch):
    monkeypatch.setattr(networks, "profile", lambda activities: Profiler([("short", 1.0), ("long", 3.0)]))
    assert networks.longest(lambda: torch.zeros(1), "cuda") == [
        {"kernel": "long", "launches": 1, "us": 3.0, "share": 0.75},
        {"kernel": "short", "launches": 1, "us": 1.0, "share": 0.25},
    ]
    monkeypatch.setattr(networks, "profile", lambda activities: Profiler([]))
    with pytest.raises(ValueError, match="profiler: it saw no kernels on cuda"):
        networks.longest(lambda: torch.zeros(1), "cuda")


def test_parts_are_timed_when_a_gpu_is_done_with_them(monkeypatch):
    """Each part, and the whole, begins and ends with a wait: what was only queued is not counted for another part."""
    waits, network = [], nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    monkeypatch.setattr(networks, "synchronise", lambda: waits.append(len(waits)))
    networks.by_block({"first": network[0], "last": network[1]}, lambda: network(torch.zeros(1, 4)))
    assert len(waits) == 2 * 3


def test_the_kernels_operations_are_counted_as_torchs_are(monkeypatch):
    from ldm.fast.ops import Ops

    q, context = torch.zeros(2, 16, 80), torch.zeros(2, 77, 80)
    for keys in (q, context):
        ours, theirs = (
            networks.count_gflop(lambda ops=ops, keys=keys: ops.attention(q, keys, keys, 2))
            for ops in (Ops("triton"), Ops("torch"))
        )
        assert ours == theirs == 2 * 2 * 2 * 2 * 16 * keys.shape[1] * 40 / 1e9


@pytest.mark.parametrize("options", [["--backend", "triton"], ["--backend", "torch"]])
def test_the_backend_that_was_asked_for_is_timed_beside_plain_torch(options, tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(networks, "measure", lambda ways, *rest: {"ways": list(ways)})  # the interpreter takes minutes
    monkeypatch.setattr(networks, "by_block", lambda *rest: {})
    assert cli.main(["bench", "unet", "--weights", str(tiny), "--rounds", "1", "--json", "--size", "8", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == options[1]
    assert ("kernels" in found["ways"]) == (options[1] == "triton")
    assert not torch.backends.cudnn.allow_tf32


def test_the_tree_and_the_branches_alone_are_the_same_images(tiny, plan):
    found = traversal.tree_against_separate(ldm.load(tiny), plan, rounds=1)
    assert (found["unet_rows"], found["unet_rows_separate"]) == (4 + 2 * (3 + 1), 5 * 4)
    assert list(found["timings"]) == ["separate runs", "tree"]


def test_a_tree_that_differs_from_its_branches_is_not_timed(tiny, plan, monkeypatch):
    alone = traversal.run_alone
    monkeypatch.setattr(traversal, "run_alone", lambda *args: 1.1 * alone(*args))
    with pytest.raises(ValueError, match="away from the branch run alone"):
        traversal.tree_against_separate(ldm.load(tiny), plan, rounds=1)


@pytest.mark.parametrize("subject", ["unet", "vae", "traverse", "load"])
def test_the_commands_print_json(subject, tiny, capsys):
    more = ["--steps", "10"] if subject == "traverse" else []
    assert cli.main(["bench", subject, "--weights", str(tiny), "--rounds", "1", "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_memory_mib"] > 0
    assert found["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["unet", "--batch", "0"], "--batch: got 0"),
        (["vae", "--rounds", "0"], "--rounds: got 0"),
        (["traverse", "--steps", "5"], "--rounds, --steps: got 3, 5"),
        (["load", "--weights", "missing.safetensors"], "--weights: got missing.safetensors"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, complaint, capsys):
    assert cli.main(["bench", *options]) == 2
    assert complaint in capsys.readouterr().err
