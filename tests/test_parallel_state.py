"""What outlives a step on several ranks: checkpoints of any layout, exports, and how much was said between ranks."""

import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import make_hf_model, make_samples
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from npd_ascend.checkpoint import Checkpoints
from npd_ascend.config import OptimizerConfig
from npd_ascend.model.load import load_decoder
from npd_ascend.parallel import layers
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.parallel.plan import cut_model
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_ascend.weights.disk import DiskChannel
from npd_ascend.weights.export import export
from npd_ascend.weights.gather import whole_tensors

CPU = torch.device("cpu")
OBJECTIVE = Objective(lambda_=0.9)
SAMPLES = make_samples([20, 1, 7, 13])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """openPangu's form with its ratio of heads, so that TP 4 holds key heads twice."""
    path = tmp_path_factory.mktemp("pangu") / "model"
    changes = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96}
    make_hf_model("pangu", **changes).save_pretrained(path)
    return path


def open_trainer(mesh, folder, dtype=torch.float32):
    cut = partial(cut_model, mesh=mesh)
    model = load_decoder(folder, dtype=dtype, device=CPU, cut=cut)
    return model, MasterAdamW(model, OptimizerConfig(lr=1e-3), mesh)


def run_steps(model, optimizer, mesh, steps):
    batches = [make_batch(SAMPLES, OBJECTIVE, CPU, mesh.row_multiple)] if mesh.dp_rank == 0 else []
    for _ in range(steps):
        total = weight_sum(SAMPLES, OBJECTIVE)
        train_step(model, batches, optimizer, OBJECTIVE, weight_sum=total, lr=1e-3, mesh=mesh)


def weights(model, mesh):
    return {name: value.clone() for name, value in whole_tensors(model, mesh)}


def train_and_save(mesh, folder, checkpoints, dtype=torch.float32):
    """Three steps, a checkpoint, two more; the weights at both points."""
    model, optimizer = open_trainer(mesh, folder, dtype)
    run_steps(model, optimizer, mesh, 3)
    store = Checkpoints(checkpoints, mesh)
    store.save({"step": 3}, optimizer.rectangles(copies=False))
    saved = weights(model, mesh)
    run_steps(model, optimizer, mesh, 2)  # while it is being written
    store.wait()
    return saved, weights(model, mesh)


def resume(mesh, folder, checkpoints, save_to=None, dtype=torch.float32):
    """The weights as loaded, and after two more steps."""
    model, optimizer = open_trainer(mesh, folder, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)  # whatever is not restored would show
    store = Checkpoints(checkpoints, mesh)
    assert store.load(optimizer.rectangles(copies=True)) == {"step": 3}
    optimizer.restored(3)
    loaded = weights(model, mesh)
    if save_to:
        again = Checkpoints(save_to, mesh)
        again.save({"step": 3}, optimizer.rectangles(copies=False))
        again.wait()
    run_steps(model, optimizer, mesh, 2)
    return loaded, weights(model, mesh)


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 1)], ids=str)
def test_the_same_layout_goes_on_bit_equal(ranks, folder, tmp_path, layout, dtype):
    if layout == (1, 1):
        (saved, after), (loaded, again) = (fn(ALONE, folder, tmp_path, dtype=dtype) for fn in (train_and_save, resume))
    else:
        saved, after = ranks.run(train_and_save, (*layout, False), folder, tmp_path, dtype)[0]
        loaded, again = ranks.run(resume, (*layout, False), folder, tmp_path, None, dtype)[0]
    assert differing(loaded, saved) == []
    assert differing(again, after) == []


def test_a_checkpoint_moves_between_layouts_without_losing_a_bit(ranks, folder, tmp_path):
    saved, after = ranks.run(train_and_save, (2, 2, True), folder, tmp_path / "tp2dp2")[0]
    on_one = resume(ALONE, folder, tmp_path / "tp2dp2", save_to=tmp_path / "one")
    on_four = ranks.run(resume, (4, 1, False), folder, tmp_path / "one")[0]
    for loaded, again in (on_one, on_four):
        assert differing(loaded, saved) == []
        for name, value in after.items():
            assert (again[name] - value).norm() <= 2e-5 * value.norm(), name


def test_a_checkpoint_with_a_lost_file_is_set_aside_by_all_ranks(ranks, folder, tmp_path, caplog):
    ranks.run(train_and_save, (2, 2, False), folder, tmp_path)
    (tmp_path / "step-00000009").mkdir()
    for file in (tmp_path / "step-00000003").iterdir():
        (tmp_path / "step-00000009" / file.name).write_bytes(file.read_bytes())
    next((tmp_path / "step-00000009").glob("*.safetensors")).unlink()
    ranks.run(resume, (1, 2, False), folder, tmp_path)  # asserts that step 3 is the one that was loaded
    assert (tmp_path / "damaged-step-00000009").exists()


def export_there(mesh, folder, target):
    model, _ = open_trainer(mesh, folder)
    export(target, model, folder, mesh)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 1)], ids=str)
def test_export_import_export_is_byte_identical_on_any_layout(ranks, folder, tmp_path, layout):
    if layout == (1, 1):
        export_there(ALONE, folder, tmp_path / "once")
    else:
        ranks.run(export_there, (*layout, False), folder, tmp_path / "once")
    export_there(ALONE, tmp_path / "once", tmp_path / "twice")
    first, second = (tmp_path / name / "model.safetensors" for name in ("once", "twice"))
    assert first.read_bytes() == second.read_bytes()
    original = load_file(folder / "model.safetensors")
    assert differing(load_file(first), original) == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight, original["model.embed_tokens.weight"])


def count_collectives(mesh, folder, recompute):
    """Collectives of one forward and backward over the layers: kind -> (calls, bytes that this rank puts in)."""
    calls, sent = Counter(), Counter()
    patch = pytest.MonkeyPatch()

    def counted(kind, fn, sizes):
        def call(*args, **kwargs):
            calls[kind] += 1
            sent[kind] += sizes(args)
            return fn(*args, **kwargs)

        return call

    def size(args):
        return args[0].numel() * args[0].element_size()

    patch.setattr(layers, "gather_rows", counted("gather", layers.gather_rows, size))
    patch.setattr(layers, "reduce_scatter_rows", counted("scatter", layers.reduce_scatter_rows, size))
    patch.setattr(layers, "sum_over", counted("reduce", layers.sum_over, size))
    patch.setattr(layers, "dist", SimpleNamespace(all_reduce=counted("reduce", dist.all_reduce, size)))
    try:
        cut = partial(cut_model, mesh=mesh)
        model = load_decoder(folder, dtype=torch.float32, device=CPU, recompute=recompute, cut=cut)
        batch = make_batch(SAMPLES, OBJECTIVE, CPU, mesh.row_multiple)
        model(batch.layout.token_ids_T, batch.layout.cu_seqlens).sum().backward()
    finally:
        patch.undo()
    return dict(calls), dict(sent), len(batch.layout.token_ids_T) * model.config.hidden_size * 4


LAYERS, TP = 2, 2


def test_collectives_are_those_of_megatrons_scheme(ranks, folder):
    """Two all-reduces of [T, D] a layer forward and two backward, one more each for embedding and output."""
    for calls, sent, hidden_bytes in ranks.run(count_collectives, (TP, 1, False), folder, "off"):
        assert calls == {"reduce": 4 * LAYERS + 2}
        assert sent == {"reduce": (4 * LAYERS + 2) * hidden_bytes}


def test_recomputing_a_layer_repeats_one_all_reduce(ranks, folder):
    """The one behind attention; torch stops before the one behind the MLP, since nothing needs its result again."""
    for calls, _, _ in ranks.run(count_collectives, (TP, 1, False), folder, "full"):
        assert calls == {"reduce": 5 * LAYERS + 2}
    for calls, _, _ in ranks.run(count_collectives, (TP, 1, False), folder, "selective"):
        assert calls == {"reduce": 4 * LAYERS + 2}


def test_sequence_parallelism_says_as_much_in_halves(ranks, folder):
    """Each all-reduce becomes a gather and a reduce-scatter, and the column layers gather once more in backward."""
    for calls, sent, hidden_bytes in ranks.run(count_collectives, (TP, 1, True), folder, "off"):
        assert calls == {"gather": 6 * LAYERS + 2, "scatter": 4 * LAYERS + 2}
        assert sent == {
            "gather": (6 * LAYERS + 2) * hidden_bytes // TP,
            "scatter": (4 * LAYERS + 2) * hidden_bytes,
        }


def publish_late(mesh, folder, target):
    """The last rank comes when rank 0 has published already."""
    model, _ = open_trainer(mesh, folder)
    if mesh.rank == mesh.tp * mesh.dp - 1:
        for _ in range(600):
            if (target / "v0").exists():
                break
            time.sleep(0.05)
    DiskChannel(target).publish(0, model, folder, [], mesh)


@pytest.mark.parametrize("layout", [(1, 2, False), (2, 2, True)], ids=str)
def test_a_version_is_published_once_and_a_late_rank_is_no_second_time(ranks, folder, layout, tmp_path):
    ranks.run(publish_late, layout, folder, tmp_path)
    assert DiskChannel(tmp_path).versions() == [0]
    with pytest.raises(AssertionError, match="already published"):
        DiskChannel(tmp_path).publish(0, load_decoder(folder, dtype=torch.float32, device=CPU), folder, [])
