"""The decoder against transformers, which is the truth: logits, gradients, names both ways."""

import json

import pytest
import torch
from conftest import make_hf_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from npd_ascend.errors import UserError
from npd_ascend.model.families import read_config
from npd_ascend.model.hf_weights import hf_views
from npd_ascend.model.load import copy_model_files, load_decoder, save_decoder

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
LENGTHS = [7, 1, 12, 12, 3]
CU = [0, 7, 8, 20, 32, 35]


def _samples(vocab_size):
    generator = torch.Generator().manual_seed(1)
    # transformers gives the padding token (0) no embedding gradient; ours has no padding
    return [torch.randint(1, vocab_size, (n,), generator=generator) for n in LENGTHS]


def test_packed_logits_equal_transformers_sample_by_sample(hf_pair):
    hf, ours, _ = hf_pair
    samples = _samples(ours.config.vocab_size)
    got = ours(torch.cat(samples), CU) @ ours.head_weight_VD.T
    wanted = torch.cat([hf(sample[None]).logits[0] for sample in samples])
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # planted mistake: samples that see each other are far outside
    leaking = ours(torch.cat(samples), [0, sum(LENGTHS)]) @ ours.head_weight_VD.T
    assert (leaking - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_gradients_equal_transformers(hf_pair):
    hf, ours, _folder = hf_pair
    samples = _samples(ours.config.vocab_size)
    (ours(torch.cat(samples), CU) @ ours.head_weight_VD.T).logsumexp(-1).sum().backward()
    sum(hf(sample[None]).logits[0].logsumexp(-1).sum() for sample in samples).backward()
    for parameter in ours.parameters():
        parameter.data = parameter.grad  # so that hf_views names the gradients
    wanted = {name: parameter.grad for name, parameter in hf.named_parameters()}
    got = {piece.name: view for piece, view in hf_views(ours)}
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (got[name] - grad).abs().max() <= 2e-5 * grad.abs().max() + 1e-6, name


def test_export_loads_in_transformers_and_is_byte_identical_the_second_time(hf_pair, tmp_path):
    hf, ours, folder = hf_pair
    save_decoder(ours, folder, tmp_path / "once")
    again = load_decoder(tmp_path / "once", **CPU)
    save_decoder(again, tmp_path / "once", tmp_path / "twice")
    assert (tmp_path / "once/model.safetensors").read_bytes() == (tmp_path / "twice/model.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    sample = _samples(ours.config.vocab_size)[0][None]
    assert torch.equal(loaded(sample).logits, hf(sample).logits)


def test_what_travels_with_a_model_is_no_weights_in_any_format(addition_student, tmp_path):
    for name in (
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        ".git/lfs/blob",
        "tf_model.h5",
        "flax_model.msgpack",
    ):
        (file := addition_student / name).parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    kept = {"LICENSE", "Open Source Software Notice", "tokenizer.model", "additional_chat_templates/tools.jinja"}
    for name in kept:
        (file := addition_student / name).parent.mkdir(exist_ok=True)
        file.touch()
    copy_model_files(addition_student, tmp_path / "copy")
    copied = {str(file.relative_to(tmp_path / "copy")) for file in (tmp_path / "copy").rglob("*") if file.is_file()}
    assert copied == kept | {"config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


def _edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"param_sink_number": 128}, "unknown key ['param_sink_number']"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "rope_parameters"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
    ],
)
def test_a_config_that_means_another_network_is_refused(tmp_path, changes, said):
    make_hf_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        read_config(_edited(tmp_path, **changes))
    assert said in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape", "torn", "inv_freq"])
def test_weights_that_do_not_fit_are_named(tmp_path, damage):
    make_hf_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "surplus":
        tensors["model.layers.0.sink"] = torch.ones(3)
    elif damage == "shape":
        tensors["model.norm.weight"] = torch.ones(63)
    elif damage == "inv_freq":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    if damage == "inv_freq":
        load_decoder(tmp_path, **CPU)
        return
    with pytest.raises(UserError, match=r"model.norm.weight|layers.0.sink|damaged"):
        load_decoder(tmp_path, **CPU)
