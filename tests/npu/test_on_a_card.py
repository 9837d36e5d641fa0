"""Every implementation that an NPU can run, and training steps with it, against float64 on the CPU.

Last, where there are cards enough, the ranks of a trainer on HCCL against one rank on the CPU.
"""

import bodies
import pytest
import torch

from npd_ascend.model.decoder import PLAIN, Kernels
from npd_kernels import streaming, token_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("impl", ["npu", "sdpa", "triton"])
def test_attention(card, check, impl, heads, dtype):
    check(bodies.attention(card, dtype, impl, heads))


@DTYPES
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_loss(card, check, impl, dtype):
    check(bodies.loss(card, dtype, impl))


@pytest.mark.parametrize("impl", ["npu", "mindspeed"])
def test_loss_with_a_matmul_add(card, check, impl, monkeypatch):
    if impl == "mindspeed" and (reason := token_loss.IMPLEMENTATIONS[impl].unavailable_reason(card)):
        pytest.skip(reason)
    monkeypatch.setitem(streaming.CHUNK_BYTES, card.type, 64 * 4 * 5003)  # several chunks
    check(bodies.loss(card, torch.bfloat16, impl))


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_divergence(card, check, impl, beta, dtype):
    check(bodies.divergence(card, dtype, impl, beta))


@DTYPES
@pytest.mark.parametrize("impl", ["npu", "torch"])
def test_layers(card, check, impl, dtype):
    check(bodies.layers(card, dtype, impl))


@DTYPES
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_gradients_of_a_step(card, check, recompute, dtype):
    check(bodies.step_gradients(card, dtype, Kernels("npu", "npu"), "chunked", recompute))


@DTYPES
def test_gradients_of_a_step_with_plain_operators(card, check, dtype):
    check(bodies.step_gradients(card, dtype, PLAIN, "chunked"))


@DTYPES
def test_three_updates(card, check, dtype):
    check(bodies.whole_steps(card, dtype, Kernels("npu", "npu"), "chunked"))


@pytest.mark.parametrize("layout", [(1, 2), (2, 1), (2, 2)], ids="tp {0[0]}, dp {0[1]}".format)
def test_ranks_on_cards_train_the_student_of_a_cpu(card, check, tmp_path, layout):
    tp, dp = layout
    if (count := torch.get_device_module(card).device_count()) < tp * dp:
        pytest.skip(f"wants {tp * dp} cards, {count} are visible")
    words = [f"device.kind={card.type}", f"parallel.tp={tp}", f"parallel.dp={dp}"]
    words += [f"parallel.sequence_parallel={str(tp > 1).lower()}", "kernels.attention=npu", "kernels.layer=npu"]
    check(bodies.ranks(words, tmp_path))
