"""Two gloo processes against one that holds every row."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from eosin.encoders.ranks import all_reduce_, gather_rows, rank, world_size
from eosin.pretrain.losses import CenteredSoftmax, dino_loss, ibot_loss, kde, koleo, simclr, sinkhorn_knopp
from eosin.pretrain.masking import block_masks

SPREADING = {"koleo": koleo, "kde": kde, "simclr": lambda z: simclr(z, z.roll(1, dims=1) + z.square())}


def uneven(x, rank):
    """5 rows to rank 0, the rest to rank 1."""
    return x[:5] if rank == 0 else x[5:]


def encoder():
    generator = torch.Generator().manual_seed(4)
    model = nn.Linear(16, 8)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
        model.bias.normal_(generator=generator)
    return model


def data():
    generator = torch.Generator().manual_seed(3)
    masks = block_masks(8, 6, generator=generator)
    return {
        "teacher": torch.randn(12, 20, generator=generator) * 2,
        "images": torch.randn(12, 16, generator=generator),
        "masks": masks,
        "patches": torch.randn(8, 36, 20, generator=generator),
        "student": torch.randn(5, 12, 20, generator=generator),
    }


def measure(model, part, halves):
    """Everything that depends on other ranks, of this rank's part; `part` cuts rows unevenly, `halves` evenly."""
    d, found = data(), {}
    found["sinkhorn"] = sinkhorn_knopp(part(d["teacher"]), 0.07)
    found["empty"] = sinkhorn_knopp(part(torch.cat([d["teacher"][:0], d["teacher"]])), 0.04)
    centred = CenteredSoftmax(20)
    for shift in (0, 1, 2):
        found[f"centred {shift}"] = centred(part(d["teacher"] + shift), 0.07)
    found["centre"] = centred.center.clone()
    for name, loss in SPREADING.items():
        model.zero_grad()
        value = loss(model(halves(d["images"])))
        value.backward()
        found[name] = value.detach()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[f"{name} gradient"] = all_reduce_(gradient) / world_size()  # as DistributedDataParallel averages
    masks, patches = halves(d["masks"]), halves(d["patches"])
    found["ibot"] = ibot_loss(patches[masks], sinkhorn_knopp(2 * patches[masks], 0.07), masks)
    student = [halves(s) for s in d["student"]]
    targets = sinkhorn_knopp(torch.cat([halves(d["student"][0]), halves(d["student"][1])]), 0.05)
    found["dino"] = dino_loss(student, targets.chunk(2))
    return found


def work(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2)
    found = measure(encoder(), lambda x: uneven(x, index), lambda x: x.chunk(2)[index])
    nothing = torch.randn(6, 9, generator=torch.Generator().manual_seed(8))
    found["one rank has none"] = sinkhorn_knopp(nothing if index == 0 else nothing[:0], 0.05)
    found["alone"] = koleo(data()["images"].chunk(2)[index], gather=False)
    one_each = sinkhorn_knopp(nothing[index : index + 1], 0.05)
    found["one row each"] = one_each
    found["pair"] = kde(nothing[index : index + 1])
    found["world"] = torch.tensor([world_size(), rank()])
    torch.save(found, f"{folder}/{index}.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in the usual way


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


@pytest.fixture(scope="module")
def alone():
    return measure(encoder(), lambda x: x, lambda x: x)


@pytest.mark.parametrize("name", ["sinkhorn", "empty", "centred 0", "centred 1", "centred 2"])
def test_targets_of_two_ranks_are_those_of_one_process(ranks, alone, name):
    both = torch.cat([r[name] for r in ranks])
    torch.testing.assert_close(both, alone[name], atol=1e-6, rtol=0)


def test_the_centre_is_the_same_on_every_rank_and_in_one_process(ranks, alone):
    assert torch.equal(ranks[0]["centre"], ranks[1]["centre"])
    torch.testing.assert_close(ranks[0]["centre"], alone["centre"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [*SPREADING, "ibot", "dino"])
def test_mean_loss_of_two_ranks_is_that_of_one_process(ranks, alone, name):
    torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, alone[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(SPREADING))
def test_averaged_gradient_of_two_ranks_is_that_of_one_process(ranks, alone, name):
    for found in ranks:
        torch.testing.assert_close(found[f"{name} gradient"], alone[f"{name} gradient"], atol=1e-6, rtol=0)


def test_sinkhorn_goes_on_where_one_rank_has_no_row(ranks):
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(ranks[0]["one rank has none"], sinkhorn_knopp(rows, 0.05), atol=1e-6, rtol=0)
    assert ranks[1]["one rank has none"].shape == (0, 9)
    both = torch.cat([r["one row each"] for r in ranks])
    torch.testing.assert_close(both, sinkhorn_knopp(rows[:2], 0.05), atol=1e-6, rtol=0)


def test_gathering_changes_the_neighbours(ranks, alone):
    halves = data()["images"].chunk(2)
    for found, half in zip(ranks, halves, strict=True):
        torch.testing.assert_close(found["alone"], koleo(half), atol=1e-6, rtol=0)
    assert abs(float(ranks[0]["alone"] + ranks[1]["alone"]) / 2 - float(koleo(torch.cat(halves)))) > 1e-3


def test_one_row_a_rank_is_enough_when_gathered(ranks):
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(8))[:2]
    torch.testing.assert_close((ranks[0]["pair"] + ranks[1]["pair"]) / 2, kde(rows), atol=1e-6, rtol=0)


def test_one_process_is_left_alone(ranks):
    x = torch.arange(4.0)
    assert all_reduce_(x) is x
    assert gather_rows(x[:, None]).equal(x[:, None])
    assert (world_size(), rank()) == (1, 0)
    assert [r["world"].tolist() for r in ranks] == [[2, 0], [2, 1]]
