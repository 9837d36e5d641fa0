"""No sample lost, doubled, split or cut; deterministic; full; fast."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npd_ascend.errors import UserError
from npd_ascend.packing import lay_out, pack_fill, pack_samples


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=120), st.randoms())
def test_every_sample_stands_whole_in_exactly_one_pack(sizes, random):
    lengths = {f"s{i}": size for i, size in enumerate(sizes)}
    packs = pack_samples(lengths, 64)
    assert sorted(name for pack in packs for name in pack) == sorted(lengths)
    assert all(0 < sum(lengths[name] for name in pack) <= 64 for pack in packs)
    shuffled = list(lengths.items())
    random.shuffle(shuffled)
    assert pack_samples(dict(shuffled), 64) == packs


@pytest.mark.parametrize(("mean", "sigma", "pack_tokens"), [(6.5, 0.9, 32768), (6.0, 0.9, 8192), (5.3, 0.6, 4096)])
def test_realistic_lengths_fill_the_packs_in_under_a_second(mean, sigma, pack_tokens):
    """Log-normal answer lengths, 10,000 samples: the shape of mathematics answers."""
    drawn = np.random.Generator(np.random.PCG64(0)).lognormal(mean, sigma, 10_000)
    lengths = {f"s{i}": int(np.clip(length, 16, pack_tokens)) for i, length in enumerate(drawn)}
    started = time.process_time()
    packs = pack_samples(lengths, pack_tokens)
    assert time.process_time() - started < 1
    assert pack_fill(sum(lengths.values()), len(packs), pack_tokens) >= 0.97


def test_packs_hold_the_same_mix_of_lengths():
    """Plain best fit decreasing would put all the long samples into the first packs."""
    lengths = {f"s{i:03d}": 20 if i % 2 else 10 for i in range(400)}
    packs = pack_samples(lengths, 600)
    shares = [sum(lengths[name] == 20 for name in pack) / len(pack) for pack in packs]
    assert max(shares) - min(shares) < 0.1


def test_a_sample_longer_than_a_pack_is_refused_by_name():
    with pytest.raises(UserError, match="sample long has 65 tokens but pack_tokens is 64"):
        pack_samples({"short": 3, "long": 65}, 64)


def test_layout_predicts_each_answer_token_from_the_one_before_and_nothing_across_a_seam():
    layout = lay_out([((5, 6, 7, 8), 2), ((9, 4), 1), ((3, 2, 1), 1)], torch.device("cpu"))
    assert layout.token_ids_T.tolist() == [5, 6, 7, 8, 9, 4, 3, 2, 1]
    assert layout.cu_seqlens == (0, 4, 6, 9)
    assert layout.answer_ids_A.tolist() == [7, 8, 4, 2, 1]
    assert layout.token_ids_T[layout.predict_A + 1].tolist() == layout.answer_ids_A.tolist()
    ends = {end - 1 for end in layout.cu_seqlens[1:]}
    assert not ends & set(layout.predict_A.tolist())
