"""Tensor and data parallelism against one rank: same loss, gradients and weights from the same checkpoint."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import make_hf_model, make_samples

from npd_ascend.config import OptimizerConfig
from npd_ascend.model.families import read_config
from npd_ascend.model.load import load_decoder
from npd_ascend.packing import share_packs
from npd_ascend.parallel import layers
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.parallel.plan import cut_model, refusal
from npd_ascend.trainer.gradients import GradientSums
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_ascend.weights.gather import whole_tensors

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(lr=3e-4, weight_decay=0.1, clip_norm=1.0)


# three packs a step, of which one rank of four gets none
PACKS = [make_samples([20, 1, 7], seed=1), make_samples([3], seed=2), make_samples([13, 2, 5, 1], seed=3)]


def train(mesh, folder, steps=5, recompute="off", targets="renormalised", packs=PACKS, dtype=torch.float32):
    """(losses, gradient norms, first gradients, final weights); tensors by Hugging Face name, whole."""
    model = load_decoder(
        folder,
        dtype=dtype,
        device=CPU,
        recompute=recompute,
        cut=partial(cut_model, mesh=mesh),
    )
    objective = Objective(lambda_=0.9, targets=targets)
    optimizer = MasterAdamW(model, OPTIMIZER, mesh)
    total = weight_sum([sample for pack in packs for sample in pack], objective)
    mine = share_packs([sum(len(s.token_ids) for s in pack) for pack in packs], mesh.dp)[mesh.dp_rank]
    batches = [make_batch(packs[i], objective, CPU, mesh.row_multiple) for i in mine]
    losses, norms, grads = [], [], {}
    start = {name: value.clone() for name, value in whole_tensors(model, mesh)}
    for step in range(steps):
        if step == 0:
            taken = optimizer.gradients.take

            def take_and_keep(taken=taken):
                sums = taken()
                grads.update({name: grad.clone() for name, grad in sums.items()})
                return sums

            optimizer.gradients.take = take_and_keep
        stats = train_step(model, batches, optimizer, objective, weight_sum=total, lr=OPTIMIZER.lr, mesh=mesh)
        optimizer.gradients.take = taken
        losses.append(stats.loss)
        norms.append(stats.grad_norm)
    weights = {name: value.clone() for name, value in whole_tensors(model, mesh)}
    moved = {name: value - start[name] for name, value in weights.items()}
    return losses, norms, _whole_gradients(model, optimizer, grads, mesh), weights, moved


def _whole_gradients(model, optimizer, grads, mesh):
    """Put the rows of every data-parallel rank together, then those of the tensor-parallel ranks."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.detach().float()
        parameter.detach()[optimizer.gradients.rows(name)] = grads[name]
    saved, optimizer._masters = optimizer._masters, dict(model.named_parameters())
    optimizer._publish()  # gathers the rows over data-parallel ranks
    optimizer._masters = saved
    return {name: value.clone() for name, value in whole_tensors(model, mesh)}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Model folders by family; `pangu1b` has openPangu-1B's ratio of heads: 12 query, 6 key."""
    made = {}
    for name, family, extra in [
        ("llama", "llama", {}),
        ("pangu", "pangu", {}),
        ("qwen3", "qwen3", {}),
        ("pangu1b", "pangu", {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96}),
    ]:
        made[name] = tmp_path_factory.mktemp(name) / "model"
        make_hf_model(family, **extra).save_pretrained(made[name])
    return made


def assert_same(got, wanted):
    """Losses, norms, gradients and weights within 1e-5; the five updates themselves, which Adam's division makes
    large where a gradient is near its rounding noise (the bias on k), within 1% of their size."""
    for have, truth in zip(got[:2], wanted[:2], strict=True):
        assert have == pytest.approx(truth, rel=1e-5)
    for have, truth, tolerance in zip(got[2:], wanted[2:], (1e-5, 1e-5, 1e-2), strict=True):
        assert have.keys() == truth.keys()
        for name, tensor in truth.items():
            assert (have[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-8, name


LAYOUTS = [
    (tp, dp, sp) for tp in (1, 2, 4) for dp in (1, 2) for sp in ((False, True) if tp > 1 else (False,)) if tp * dp > 1
]


# every layout in every mode, with one family each; the others are below
@pytest.mark.parametrize(("family", "recompute"), [("llama", "off"), ("pangu", "full"), ("qwen3", "selective")])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_trains_as_one_rank(ranks, folders, layout, family, recompute):
    wanted = train(ALONE, folders[family])
    for got in ranks.run(train, layout, folders[family], 5, recompute)[: layout[0]]:
        assert_same(got, wanted)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_bit(folders, recompute):
    wanted, got = train(ALONE, folders["qwen3"]), train(ALONE, folders["qwen3"], recompute=recompute)
    assert got[:2] == wanted[:2]
    assert all(torch.equal(got[3][name], value) for name, value in wanted[3].items())


@pytest.mark.parametrize("layout", [(2, 1, False), (3, 1, False), (4, 1, True), (6, 1, False)], ids=str)
def test_key_heads_that_do_not_divide_are_held_more_than_once(ranks, folders, layout):
    wanted = train(ALONE, folders["pangu1b"])
    for got in ranks.run(train, layout, folders["pangu1b"])[: layout[0]]:
        assert_same(got, wanted)


def test_layouts_that_cannot_be_are_refused_with_the_reason(folders):
    config = read_config(folders["pangu1b"])
    assert [refusal(config, tp) for tp in (1, 2, 3, 4, 6)] == [None] * 5
    assert refusal(config, 8) == "12 attention heads do not divide over parallel.tp=8"
    assert "intermediate_size=96" in refusal(dataclasses.replace(config, num_heads=5), 5)
    assert "without rows" in refusal(dataclasses.replace(config, vocab_size=5), 4)


@pytest.mark.parametrize("targets", ["renormalised", "tail"])
def test_ranks_without_a_pack_join_in(ranks, folders, targets):
    wanted = train(ALONE, folders["llama"], targets=targets, packs=PACKS[:1])
    for got in ranks.run(train, (1, 4, False), folders["llama"], 5, "off", targets, PACKS[:1]):
        assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    assert_same(ranks.run(train, (2, 2, True), folders["llama"], 5, "off", targets, PACKS[:1])[0], wanted)


def train_wrongly(mesh, folder, mistake):
    """train() with one line of the parallel code broken."""
    patch = pytest.MonkeyPatch()
    if mistake == "f without its all-reduce":
        patch.setattr(layers, "dist", SimpleNamespace(all_reduce=lambda *_, **__: SimpleNamespace(wait=lambda: None)))
    elif mistake == "g reduces in backward too":
        patch.setattr(layers._Reduce, "backward", lambda ctx, d_y: (layers.sum_over(d_y.clone(), mesh.tp_group), None))
    elif mistake == "bias added on every rank":
        patch.setattr(
            layers.RowLinear,
            "forward",
            lambda self, x: layers._Reduce.apply(torch.nn.functional.linear(x, self.weight, self.bias), mesh),
        )
    elif mistake == "partial gradients not summed":
        patch.setattr(GradientSums, "_sum_partial", lambda self: None)
    elif mistake == "copies of key heads not summed":
        patch.setattr(GradientSums, "_sum_copies", lambda self, name: None)
    elif mistake == "norm of the own rows only":
        patch.setattr(Mesh, "norm_over_all", lambda self, norm: norm)
    elif mistake == "copies counted in the norm":
        patch.setattr(
            MasterAdamW, "_counted_rows", lambda self, name: [slice(0, self._rows[name].stop - self._rows[name].start)]
        )
    elif mistake == "gradients averaged":
        take = GradientSums.take
        patch.setattr(GradientSums, "take", lambda self: {n: g / mesh.dp for n, g in take(self).items()})
    elif mistake == "new rows kept to itself":
        patch.setattr(MasterAdamW, "_publish", lambda self: None)
    try:
        return train(mesh, folder)
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("mistake", "family", "layout"),
    [
        ("f without its all-reduce", "llama", (2, 1, False)),
        ("g reduces in backward too", "llama", (2, 1, False)),
        ("bias added on every rank", "pangu", (2, 1, False)),
        ("partial gradients not summed", "llama", (2, 1, True)),
        ("partial gradients not summed", "qwen3", (2, 1, False)),
        ("copies of key heads not summed", "pangu1b", (4, 1, False)),
        ("norm of the own rows only", "llama", (2, 1, False)),
        ("copies counted in the norm", "pangu1b", (4, 1, False)),
        ("gradients averaged", "llama", (1, 2, False)),
        ("new rows kept to itself", "llama", (1, 2, False)),
    ],
    ids=str,
)
def test_planted_mistakes_are_caught(ranks, folders, mistake, family, layout):
    wanted = train(ALONE, folders[family])
    got = ranks.run(train_wrongly, layout, folders[family], mistake)[0]
    with pytest.raises(AssertionError):
        assert_same(got, wanted)


def test_costs_are_shared_evenly_and_every_pack_is_trained_once():
    costs = [float(c) for c in (9, 1, 1, 8, 5, 5, 3)]
    shares = share_packs(costs, 3)
    assert sorted(pack for share in shares for pack in share) == list(range(7))
    loads = [sum(costs[pack] for pack in share) for share in shares]
    assert max(loads) <= 1.1 * sum(costs) / 3
    assert share_packs(costs[:1], 3) == [[0], [], []]


def test_long_samples_cost_more_than_short_ones_of_the_same_tokens(folders):
    config = read_config(folders["llama"])
    one, many = config.forward_flops([1000], 500), config.forward_flops([100] * 10, 500)
    assert one - many == 2 * config.num_layers * config.qkv_rows[0] * (1000**2 - 10 * 100**2)
    # by hand: 2 flops per weight and token, the head for answers only
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert config.forward_flops([1], 1) == 2 * (2 * layer + 2 * 64) + 2 * 61 * 64
