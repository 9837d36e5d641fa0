"""The decoder and whole training steps traced on fake NPU tensors through torch_npu's own autograd."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracing import NPU, PANGU_1B, Watch, fake_batch, fake_decoder, objective, tracing

from npd_ascend.config import GrpoConfig, OptimizerConfig
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.trainer.objectives import Objective, batch_loss, with_reference
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_kernels import streaming
from npd_kernels.layer_ops import impl_npu as layer_ops

ONE_LAYER = replace(PANGU_1B, num_layers=1)
LENS = [700, 300, 20]


def _layer(config=ONE_LAYER, loss_impl="chunked"):
    """(model with gradients, what was seen) of forward and backward of a layer, the last norm and the loss."""
    with tracing() as watch:
        model = fake_decoder(config)
        watch.waits.clear()
        batch = fake_batch(LENS, top_k=10)
        hidden_TD = model(batch.layout.token_ids_T, batch.layout.cu_seqlens)
        loss_sum, _ = batch_loss(hidden_TD[batch.layout.predict_A], model.head_weight_VD, batch, objective(loss_impl))
        loss_sum.backward()
    return model, watch


def _check_arguments(watch: Watch) -> None:
    """What the operators' documents ask for and their shape functions do not check."""
    for name, given in watch.fused_calls:
        if name == "npu_fusion_attention":
            assert given["input_layout"] == "TND"
            assert (given["head_num"], given["sparse_mode"]) == (12, 3)
            assert [tuple(given[x].shape) for x in ("query", "key", "value")] == [(1020, n, 128) for n in (12, 6, 6)]
            assert (given["atten_mask"].dtype, given["atten_mask"].shape) == (torch.bool, (2048, 2048))
            assert given["actual_seq_qlen"] == given["actual_seq_kvlen"] == [700, 1000, 1020]
        elif name == "npu_rotary_mul":
            assert tuple(given["input"].shape) in [(1, 1020, 12, 128), (1, 1020, 6, 128)]
            assert tuple(given["r1"].shape) == tuple(given["r2"].shape) == (1, 1020, 1, 128)


QWEN3_LAYER = replace(ONE_LAYER, qk_norm=True, tie_embeddings=False)


@pytest.mark.parametrize("config", [ONE_LAYER, QWEN3_LAYER], ids=["openPangu", "Qwen3"])
def test_every_parameter_gets_a_gradient_of_its_shape_and_dtype(config):
    model, watch = _layer(config)
    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.dtype == parameter.dtype == torch.bfloat16, name
        assert parameter.grad.device == NPU, name
    _check_arguments(watch)


def test_the_fused_operators_run_forward_and_backward_and_nothing_waits_for_the_device():
    watch = _layer()[1]
    forward = {"npu_fusion_attention": 1, "npu_rms_norm": 3, "npu_rotary_mul": 2, "npu_swiglu": 1}
    backward = {f"{name}_backward": count for name, count in forward.items() if name != "npu_fusion_attention"}
    backward["npu_fusion_attention_grad"] = 1
    assert {name: watch.operators[f"npu::{name}"] for name in forward | backward} == forward | backward
    assert watch.waits == []


@torch.library.register_fake("atb::_npu_matmul_add_fp32")
def _matmul_add(x, weight, C):
    """The wheel has none. What nnal's operator does to C, without its values (op-plugin, LinearAtb.cpp)."""
    assert x.dtype == weight.dtype == torch.bfloat16
    assert C.dtype == torch.float32
    assert (x.T @ weight).shape == C.shape


def test_the_matmul_add_of_torch_npu_takes_the_products_of_every_chunk(monkeypatch):
    monkeypatch.setenv("ATB_HOME_PATH", "/nowhere")
    monkeypatch.setitem(streaming.CHUNK_BYTES, "npu", 256 * 4 * ONE_LAYER.vocab_size)
    model, watch = _layer(loss_impl="npu")
    answers = sum(length - max(1, length // 3) for length in LENS)
    assert watch.operators["atb::_npu_matmul_add_fp32"] == -(-answers // 256)
    assert model.embed.weight.grad.dtype == torch.bfloat16
    assert watch.waits == []
    plain = _layer()[1].operators
    # each product would be made and then added
    assert plain["aten::mm"] - watch.operators["aten::mm"] == plain["aten::add_"] - watch.operators["aten::add_"] > 1


def _with_layout(layout):
    return lambda fn: lambda q, k, v, heads, _, **how: fn(q, k, v, heads, layout, **how)


@pytest.mark.parametrize(
    ("module", "name", "mistake", "said"),
    [
        (layer_ops, "rotate", lambda fn: lambda *args: fn(*args).float(), "q, k, v must share one dtype"),
        (layer_ops, "rotary_tables", lambda fn: lambda angle, _: fn(angle, torch.float32), "table is torch.float32"),
        (layer_ops, "rotate", lambda _: lambda *args: torch_npu.npu_rotary_mul(*args), r"\(1020, 12, 128\)"),
        (layer_ops, "swiglu", lambda _: lambda gate_up: torch_npu.npu_swiglu(gate_up, dim=0), "reduction dim"),
        (layer_ops, "rms_norm", lambda _: lambda *args: torch_npu.npu_rms_norm(*args)[1], "reduction dim"),
        # torch-npu 2.13's shape function, or the check here with that of 2.10, which lets it pass
        (torch_npu, "npu_fusion_attention", _with_layout("BSND"), "Dimension out of range|'BSND' == 'TND'"),
        (torch_npu, "npu_fusion_attention", _with_layout("SBH"), "'SBH' == 'TND'"),
    ],
    ids=["float32 q", "float32 tables", "3-D rotary", "split over tokens", "rstd for y", "layout BSND", "layout SBH"],
)
def test_planted_dtypes_and_layouts_fail(module, name, mistake, said, monkeypatch):
    """By our own checks, by the wheel's shape functions, or by _check_arguments where both are silent."""
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    with pytest.raises((ValueError, RuntimeError, IndexError, AssertionError), match=said):
        _check_arguments(_layer()[1])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x[0, :3].tolist(),
        lambda x: float(x.detach().sum()),
        lambda x: x.cpu(),
        lambda x: torch.arange(3).to(x.device),
        lambda x: torch.arange(3).pin_memory().to(x.device),
        lambda x: torch.arange(3).to(x.device, non_blocking=True),
    ],
    ids=["item", "tolist", "float", "cpu", "from the host", "page-locked but blocking", "not page-locked"],
)
def test_planted_waits_are_seen(read, monkeypatch):
    swiglu = layer_ops.swiglu
    monkeypatch.setattr(layer_ops, "swiglu", lambda x: (read(x), swiglu(x))[1])
    assert _layer()[1].waits


@pytest.fixture(scope="module")
def meshes():
    """Rank 0 of each layout; collectives of the `fake` backend move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    tp_group, dp_group = dist.new_group([0, 1]), dist.new_group([0, 2])
    yield {
        "alone": ALONE,
        "tp 2": Mesh(tp=2, tp_group=tp_group),
        "tp 2, dp 2, sequence": Mesh(tp=2, dp=2, sequence_parallel=True, tp_group=tp_group, dp_group=dp_group),
    }
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "recompute", "packs"),
    [("alone", "off", 2), ("tp 2", "selective", 1), ("tp 2, dp 2, sequence", "full", 2)],
)
def test_a_whole_step_of_openpangu_1b(layout, recompute, packs, meshes):
    mesh, layers = meshes[layout], PANGU_1B.num_layers
    with tracing() as watch:
        model = fake_decoder(PANGU_1B, recompute, mesh)
        optimizer = MasterAdamW(model, OptimizerConfig(), mesh)
        watch.waits.clear()
        batches = [fake_batch([1024] * 3 + [333], 10, mesh) for _ in range(packs)]
        train_step(model, batches, optimizer, objective(), weight_sum=1.0, lr=1e-5, mesh=mesh)
    assert watch.operators["npu::npu_fusion_attention_grad"] == packs * layers
    assert watch.operators["npu::npu_rms_norm_backward"] == packs * (2 * layers + 1)
    assert watch.operators["npu::npu_rotary_mul_backward"] == packs * 2 * layers
    assert watch.operators["npu::npu_swiglu_backward"] == packs * layers
    # a group with weight decay and one without
    assert watch.operators["aten::_fused_adamw_"] == 2
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1")
    # the loss and the norm of the gradient, once a step, however many packs it has
    assert watch.waits == ["aten::_local_scalar_dense"] * 2
    if mesh.tp > 1:
        assert any(name.startswith("c10d::") for name in watch.operators)


@pytest.mark.parametrize(
    "asked",
    [
        Objective(),
        Objective(lambda_=0.9, targets="tail"),
        Objective(lambda_=0.9, targets="tail", divergence="reverse", normalise="sample"),
        Objective(lambda_=0.9, targets="tail", divergence="jsd"),
        Objective(grpo=GrpoConfig(steps=2)),
        Objective(grpo=GrpoConfig(steps=2, kl_weight=0.1)),
    ],
    ids=["SFT", "tail", "reverse", "jsd", "GRPO", "GRPO with a reference"],
)
def test_no_objective_waits_for_a_pack(asked):
    def waits(packs: int) -> list[str]:
        with tracing() as watch:
            model, reference = fake_decoder(ONE_LAYER), fake_decoder(ONE_LAYER)
            optimizer = MasterAdamW(model, OptimizerConfig(), ALONE)
            watch.waits.clear()
            batches = [fake_batch(LENS, 10, of=asked) for _ in range(packs)]
            if asked.grpo and asked.grpo.kl_weight:
                batches = [with_reference(batch, reference, asked) for batch in batches]
            train_step(model, batches, optimizer, asked, weight_sum=1.0, lr=1e-5)
        return watch.waits

    # the norm of the gradient, and the loss with what is watched
    assert waits(1) == waits(3) == ["aten::_local_scalar_dense"] * (2 + len(asked.watched))
