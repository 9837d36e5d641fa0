"""The vocabulary-parallel loss on several ranks against the whole head in float64."""

import pytest
import torch
import torch.distributed as dist

from npd_kernels import streaming
from npd_kernels.token_loss import VocabShard, entropies, greedy_ids, token_logprobs, token_loss

TOKENS, VOCAB, HIDDEN, SLOTS = 67, 251, 29, 4


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight_VD = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    ids_TK = torch.randint(VOCAB, (TOKENS, SLOTS), generator=generator)
    weights_TK = torch.rand(TOKENS, SLOTS, generator=generator)
    decades = torch.tensor([0.01, 1.0, 100.0]).repeat(TOKENS)[:TOKENS]
    return hidden_TD, weight_VD, ids_TK, weights_TK, decades


def on_one_rank(mesh, impl, dtype, mistake=""):
    """(loss_sum, loss_T, summed d_hidden, this rank's rows of d_weight, log-probs and their gradients alike)."""
    streaming.CHUNK_BYTES = {"cpu": 16 * 4 * 128}  # several chunks and a ragged one
    hidden, whole, ids, weights, token_weight = inputs(dtype)
    rows = -(-VOCAB // mesh.tp)
    start = mesh.tp_rank * rows
    stop = min(start + rows, VOCAB)
    # padding holds what would be noticed
    weight = torch.cat([whole[start:stop], torch.full((rows - (stop - start), HIDDEN), 2.0, dtype=dtype)])
    shard = VocabShard(start, stop, mesh.tp_group)
    if mistake == "padding unmasked":
        shard = VocabShard(start, start + rows, mesh.tp_group)
    if mistake == "wrong offset":
        shard = VocabShard(start + 1, stop + 1, mesh.tp_group)
    results = []
    for fn in ("loss", "logprobs"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if fn == "loss":
            loss_sum, loss_T = token_loss(*leaves, ids, weights, token_weight, shard=shard, impl=impl)
            results += [loss_sum.detach()[None], loss_T]
        else:
            logprobs_TK = token_logprobs(*leaves, ids, shard=shard, impl=impl)
            results.append(logprobs_TK.detach())
            loss_sum = (logprobs_TK * weights * token_weight[:, None]).sum()
        d_hidden, d_weight = torch.autograd.grad(loss_sum, leaves)
        dist.all_reduce(d_hidden, group=mesh.tp_group)
        results += [d_hidden, d_weight[: stop - start]]
    return results


def _whole(impl, dtype):
    """The same list on one rank with the whole head; float64 for the reference."""
    hidden, weight, ids, weights, token_weight = inputs(dtype)
    results = []
    for fn in ("loss", "logprobs"):
        leaves = [(x.double() if impl == "reference" else x.clone()).requires_grad_() for x in (hidden, weight)]
        if fn == "loss":
            loss_sum, loss_T = token_loss(*leaves, ids, weights, token_weight, impl=impl)
            results += [loss_sum.detach()[None], loss_T]
        else:
            logprobs_TK = token_logprobs(*leaves, ids, impl=impl)
            results.append(logprobs_TK.detach())
            loss_sum = (logprobs_TK * weights * token_weight[:, None]).sum()
        results += list(torch.autograd.grad(loss_sum, leaves))
    return results


def _worst(got, truth):
    return [float((g.double() - t).abs().max() / t.abs().max()) for g, t in zip(got, truth, strict=True)]


def _joined(parts):
    """Rank 0's values, the rows of d_weight put together."""
    joined = list(parts[0])
    for at in (3, 6):
        joined[at] = torch.cat([part[at] for part in parts])
    return joined


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("layout", [(2, 1, False), (4, 1, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cut_head_is_no_worse_than_a_whole_one(ranks, layout, dtype, impl):
    truth = _whole("reference", dtype)
    plain = _worst(_whole("chunked", dtype), truth)
    parts = ranks.run(on_one_rank, layout, impl, dtype)
    for got, have in zip(_worst(_joined(parts), truth), plain, strict=True):
        # in bfloat16 each rank rounds its part of d_hidden before the sum, as plain Megatron does
        assert got <= max(1.2 * have, 1e-6 if dtype == torch.float32 else 2**-7)
    for part in parts[1:]:
        assert torch.equal(part[1], parts[0][1])  # the loss has the same bits on every rank


def test_the_reference_means_the_same_cut_or_whole(ranks):
    truth = _whole("reference", torch.float32)
    parts = ranks.run(on_one_rank, (4, 1, False), "reference", torch.float32)
    assert max(_worst(_joined(parts), truth)) < 1e-6


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("mistake", ["padding unmasked", "wrong offset"])
def test_planted_mistakes_are_caught(ranks, mistake, impl):
    truth = _whole("reference", torch.float32)
    parts = ranks.run(on_one_rank, (4, 1, False), impl, torch.float32, mistake)
    assert _worst(parts[0][:1], truth[:1])[0] > 1e-4


def test_only_a_few_numbers_per_token_cross_the_group(ranks):
    sent = ranks.run(count_gathered, (2, 1, False))
    assert sent == [TOKENS * (1 + SLOTS)] * 2


def count_gathered(mesh):
    sent, gather = [], dist.all_gather
    dist.all_gather = lambda parts, mine, group: sent.append(mine.numel()) or gather(parts, mine, group=group)
    try:
        hidden, whole, ids, weights, token_weight = inputs()
        rows = -(-VOCAB // mesh.tp)
        start, stop = mesh.tp_rank * rows, min((mesh.tp_rank + 1) * rows, VOCAB)
        weight = torch.nn.functional.pad(whole[start:stop], (0, 0, 0, rows - (stop - start)))
        token_loss(
            hidden, weight, ids, weights, token_weight, shard=VocabShard(start, stop, mesh.tp_group), impl="chunked"
        )
    finally:
        dist.all_gather = gather
    return sum(sent)


def greedy_inputs():
    """Small whole numbers, so that every second token has several largest logits."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-2, 3, (TOKENS, 5), generator=generator).float(), torch.randint(
        -2, 3, (VOCAB, 5), generator=generator
    ).float()


def greedy_on_one_rank(mesh, vocab_size, mistake=""):
    streaming.CHUNK_BYTES = {"cpu": 16 * 4 * 128}
    hidden_TD, whole_VD = greedy_inputs()
    rows = -(-VOCAB // mesh.tp)
    start, stop = mesh.tp_rank * rows, min((mesh.tp_rank + 1) * rows, VOCAB)
    padding = 9 * hidden_TD[:1].expand(rows - (stop - start), -1)  # what would be noticed
    if mistake == "padding unmasked":
        stop, vocab_size = start + rows, mesh.tp * rows  # either alone still masks it
    shard = VocabShard(start, stop, None if mistake == "each for itself" else mesh.tp_group)
    head_VD = torch.cat([whole_VD[start:stop], padding])
    with pytest.MonkeyPatch.context() as patch:
        if mistake == "the last of equals":
            patch.setattr(VocabShard, "first_largest", last_largest)
        return greedy_ids(hidden_TD, head_VD, vocab_size=vocab_size, shard=shard)


def last_largest(shard, value_T, id_T):
    values_RT, ids_RT = shard._gather(value_T).flip(0), shard._gather(id_T).flip(0)
    return ids_RT.gather(0, values_RT.argmax(0, keepdim=True))[0]


@pytest.mark.parametrize("layout", [(2, 1, False), (3, 1, False), (4, 1, False)], ids=str)
@pytest.mark.parametrize("vocab_size", [VOCAB, 60])  # with 60 some ranks have no row of the tokenizer's
def test_greedy_decoding_takes_the_same_token_cut_or_whole(ranks, layout, vocab_size):
    hidden_TD, whole_VD = greedy_inputs()
    logits_TV = hidden_TD @ whole_VD[:vocab_size].T
    assert ((logits_TV == logits_TV.amax(-1, keepdim=True)).sum(-1) > 1).sum() > 5
    for ids_T in [
        greedy_ids(hidden_TD, whole_VD, vocab_size=vocab_size),
        *ranks.run(greedy_on_one_rank, layout, vocab_size),
    ]:
        assert torch.equal(ids_T, logits_TV.argmax(-1))


@pytest.mark.parametrize("mistake", ["padding unmasked", "the last of equals", "each for itself"])
def test_mistakes_in_greedy_decoding_are_caught(ranks, mistake):
    hidden_TD, whole_VD = greedy_inputs()
    right_T = (hidden_TD @ whole_VD.T).argmax(-1)
    assert not all(
        torch.equal(ids_T, right_T) for ids_T in ranks.run(greedy_on_one_rank, (4, 1, False), VOCAB, mistake)
    )


def entropies_on_one_rank(mesh, mistake=""):
    streaming.CHUNK_BYTES = {"cpu": 16 * 4 * 128}
    hidden_TD, whole_VD = (x.float() for x in entropy_inputs())
    rows = -(-VOCAB // mesh.tp)
    start, stop = mesh.tp_rank * rows, min((mesh.tp_rank + 1) * rows, VOCAB)
    head_VD = torch.cat([whole_VD[start:stop], whole_VD[: rows - (stop - start)]])
    stop = start + rows if mistake == "padding unmasked" else stop
    shard = VocabShard(start, stop, None if mistake == "each for itself" else mesh.tp_group)
    return entropies(hidden_TD, head_VD, shard=shard)


def entropy_inputs():
    """Float64; from almost certain to almost flat."""
    hidden_TD, weight_VD, _, _, decades = inputs(torch.float64)
    return hidden_TD * decades[:, None].clamp(max=10), weight_VD


def entropies_by_hand(dtype):
    hidden_TD, weight_VD = (x.to(dtype) for x in entropy_inputs())
    logprobs_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
    return -(logprobs_TV.exp() * logprobs_TV).sum(-1)


@pytest.mark.parametrize("layout", [(2, 1, False), (3, 1, False), (4, 1, False)], ids=str)
def test_entropies_cut_or_whole(ranks, layout):
    wanted_T = entropies_by_hand(torch.float64)
    assert wanted_T.min() < 0.1 < 5 < wanted_T.max()
    plain_error = (entropies_by_hand(torch.float32) - wanted_T).abs().max()
    whole_T = entropies(*(x.float() for x in entropy_inputs()))
    for entropy_T in [whole_T, *ranks.run(entropies_on_one_rank, layout)]:
        assert (entropy_T - wanted_T).abs().max() < 4 * plain_error


@pytest.mark.parametrize("mistake", ["padding unmasked", "each for itself"])
def test_mistakes_in_entropies_are_caught(ranks, mistake):
    wanted_T = entropies_by_hand(torch.float64)
    for entropy_T in ranks.run(entropies_on_one_rank, (4, 1, False), mistake):
        assert (entropy_T - wanted_T).abs().max() > 1e-3
