"""openPangu: its published configurations, and its tokenizer against what its own code is documented to do.

The SentencePiece model is trained here, with the pieces and special tokens of the original.
"""

import json

import pytest
import sentencepiece
from conftest import make_hf_model
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from npd_ascend.__main__ import main
from npd_ascend.errors import UserError
from npd_ascend.model.families import decoder_config, licence_notice
from npd_ascend.pangu_tokenizer import split_thinking
from npd_ascend.tokenizer import ChatTokenizer

CORPUS = [
    "what is two plus three? the answer is five.",
    "系统：你好 用户：二加三等于几？ 助手：五",
    "def add(a, b):\n    return a + b",
    "the quick brown fox jumps over the lazy dog 0123456789",
] * 30
SPECIAL = ["[unused9]", "[unused10]", "[unused11]", "[unused12]", "[unused16]", "[unused17]"]
# one user turn behind an empty system turn, as the original's template renders it; it writes no BOS
TEMPLATE = (
    "{% if messages[0].role != 'system' %}[unused9]系统：[unused10]{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}[unused9]系统：{{ m.content }}[unused10]{% endif %}"
    "{% if m.role == 'user' %}[unused9]用户：{{ m.content }}[unused10]{% endif %}"
    "{% if m.role == 'assistant' %}[unused9]助手：{{ m.content }}[unused10]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[unused9]助手：{% endif %}"
)


def make_tokenizer(folder, corpus=CORPUS, vocab_size=420):
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=SPECIAL,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names = ["<unk>", "<s>", "</s>", *SPECIAL]
    config = {
        "tokenizer_class": "PanguTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "added_tokens_decoder": {
            str(model.piece_to_id(name)): {"content": name, "special": True, "lstrip": False, "rstrip": False}
            for name in names
        },
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("pangu"))


@pytest.fixture(scope="module")
def pieces(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_a_prompt_is_the_published_format_with_one_bos(folder, pieces):
    ids = ChatTokenizer(folder).encode_prompt("two plus three?")
    start, end = (pieces.piece_to_id(name) for name in ("[unused9]", "[unused10]"))
    wanted = [1, start, *pieces.encode("系统："), end, start, *pieces.encode("用户：two plus three?"), end]
    assert list(ids) == [*wanted, start, *pieces.encode("助手：")]


def test_bos_is_not_doubled_where_the_template_writes_it(folder, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    config["chat_template"] = "<s>" + TEMPLATE  # as in the template made for serving
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTokenizer(tmp_path).encode_prompt("x") == ChatTokenizer(folder).encode_prompt("x")


@pytest.mark.parametrize("text", ["five", " 二加三等于几？", "emoji 🦊 ok", "a\n\n  b", "x [unused16] y", ""])
def test_answers_end_with_eos_and_come_back(folder, pieces, text):
    tokenizer = ChatTokenizer(folder)
    ids = tokenizer.encode_answer(text)
    assert ids[-1] == tokenizer.eos_id == pieces.piece_to_id("[unused10]")
    assert tokenizer.decode_answer(ids) == text.replace("[unused16]", "").strip()


@pytest.mark.parametrize("text", [*CORPUS[:4], "5", "五", " two  spaces", "[unused16]a[unused17]b", "\n", "🦊", ""])
def test_prompt_and_answer_are_the_ids_of_the_whole_conversation(folder, text):
    """By transformers' own SentencePiece tokenizer, which splits at added tokens as the original does."""
    original = SentencePieceBackend.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    whole = original.tokenize(original.apply_chat_template(messages, tokenize=False))
    tokenizer = ChatTokenizer(folder)
    got = tokenizer.encode_prompt("x") + tokenizer.encode_answer(text)
    assert list(got) == [1, *original.convert_tokens_to_ids(whole)]


def test_tokens_to_look_at(folder, pieces):
    tokenizer = ChatTokenizer(folder)
    assert "".join(map(tokenizer.decode_token, pieces.encode("the quick\nfox"))) == " the quick\nfox"
    assert tokenizer.decode_token(tokenizer.eos_id) == "[unused10]"
    prompt = tokenizer.encode_prompt("a[unused17]b")
    assert tokenizer.decode_text(prompt) == "系统：用户：ab助手："
    padded = tokenizer.vocab_size  # a head may have more rows than there are tokens
    assert tokenizer.decode_token(padded) == tokenizer.decode_text([padded]) == tokenizer.decode_answer([padded]) == ""


def test_what_no_piece_covers_is_bytes(folder, pieces):
    tokenizer = ChatTokenizer(folder)
    emoji = tokenizer.encode_answer("🦊")
    assert len([i for i in emoji if pieces.id_to_piece(i).startswith("<0x")]) == 4  # bytes, not <unk>


def test_special_tokens_in_a_users_text_are_the_tokens_as_in_the_original(folder, pieces):
    ids = ChatTokenizer(folder).encode_prompt("a[unused17]b")
    assert pieces.piece_to_id("[unused17]") in ids


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("[unused16]2+3 is 5[unused17]five", "2+3 is 5", "five"),
        (" [unused16] hm [unused17] five ", "hm", "five"),
        ("five", "", "five"),
        ("[unused16]never closed", "", "never closed"),
        ("[unused16]a[unused17]b[unused16]c[unused17]d", "a", "d"),
        ("[unused16][unused17]fast", "", "fast"),
    ],
)
def test_thoughts_are_split_from_answers(folder, text, thought, answer):
    assert split_thinking(text) == (thought, answer)
    tokenizer = ChatTokenizer(folder)
    assert tokenizer.decode_answer(tokenizer.encode_answer(text)) == answer


def test_another_model_file_is_another_vocabulary(folder, tmp_path):
    corpus = ["completely different words about seas and ships", "九八七六"] * 30
    other = make_tokenizer(tmp_path, corpus, vocab_size=320)
    difference = ChatTokenizer(folder).difference(ChatTokenizer(other))
    assert difference.startswith("token ")
    assert ChatTokenizer(folder).difference(ChatTokenizer(folder)) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "tokenizer.model: no such file"),
        ("torn", "not a SentencePiece model"),
        ("bos", "token '<bos>'"),
        ("add_eos_token", "add_eos_token=True is not supported"),
        ("template", "the chat template cannot be rendered"),
    ],
)
def test_a_damaged_tokenizer_is_named(folder, tmp_path, damage, said):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if damage != "missing":
        content = (folder / "tokenizer.model").read_bytes()
        (tmp_path / "tokenizer.model").write_bytes(b"no model" if damage == "torn" else content)
    if damage == "bos":
        config["bos_token"] = "<bos>"
    if damage == "add_eos_token":
        config["add_eos_token"] = True
    if damage == "template":
        config["chat_template"] = "{% for m in messages %}{{ m.content }"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        ChatTokenizer(tmp_path).encode_prompt("x")


# config.json as published: 1B V1.0, and 7B (V1.0 and V1.1 are the same)
COMMON = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
    "vocab_size": 153376,
    "rms_norm_eps": 1e-05,
    "bias": True,
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "4.53.2",
}
PANGU_1B = COMMON | {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 26,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "rope_theta": 4000000.0,
    "tie_word_embeddings": True,
}
PANGU_7B = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
}


def test_published_configurations_give_the_published_sizes(tmp_path):
    one, seven = (decoder_config(raw, tmp_path) for raw in (PANGU_1B, PANGU_7B))
    assert one.num_parameters == 1_155_912_192  # 2.312 GB of bfloat16, the size of its safetensors
    assert seven.num_parameters == 8_030_887_936
    assert (one.head_dim, one.rope_theta, one.tie_embeddings, one.o_bias) == (128, 4e6, True, True)
    assert (seven.head_dim, seven.rope_theta, seven.tie_embeddings, seven.qkv_bias) == (128, 16e6, False, True)


def test_biases_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(UserError, match="bias=True and attention_bias=False contradict"):
        decoder_config(PANGU_1B | {"attention_bias": False}, tmp_path / "config.json")


@pytest.mark.parametrize("key", ["bias", "tie_word_embeddings", "num_key_value_heads", "hidden_size", "rope_theta"])
def test_a_dropped_key_is_no_default(tmp_path, key):
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        decoder_config(PANGU_1B | {key: None}, tmp_path / "config.json")
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        decoder_config({k: v for k, v in PANGU_1B.items() if k != key}, tmp_path / "config.json")


@pytest.mark.parametrize("key", ["param_sink_number", "qk_rope_dim", "num_nextn_predict_layers", "sandwich_norm"])
def test_another_network_under_the_same_name_is_refused(tmp_path, key):
    with pytest.raises(UserError, match=key):
        decoder_config(PANGU_1B | {key: 128}, tmp_path / "config.json")


@pytest.fixture
def model_folder(folder, tmp_path):
    """A tiny model in openPangu's form, stray buffers and all."""
    target = tmp_path / "model"
    make_hf_model("pangu", vocab_size=420).save_pretrained(target)
    llama = json.loads((target / "config.json").read_text())
    shape = {key: llama[key] for key in PANGU_1B if key in llama}
    pangu = PANGU_1B | shape | {"model_type": "PanguEmbedded", "architectures": PANGU_1B["architectures"]}
    (target / "config.json").write_text(json.dumps(pangu))
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_licence_is_named_once_per_run(model_folder, tmp_path, caplog):
    assert "European Union" in licence_notice(model_folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "two plus three?", "answer": "five"}\n')
    config = tmp_path / "run.yaml"
    source = {"kind": "jsonl", "path": str(prompts)}
    sections = {
        "run": {"name": "pangu", "folder": str(tmp_path / "run")},
        "student": {"path": str(model_folder)},
        "data": {"gold": source, "heldout": source, "prompt_suffix": " /no_think"},
        "sft": {"epochs": 1, "pack_tokens": 128},
        "evaluate": {"max_new_tokens": 8},
    }
    config.write_text(json.dumps(sections))
    assert main(["sft", "--config", str(config)]) == 0
    assert caplog.text.count("OPENPANGU MODEL LICENSE AGREEMENT") == 1
    assert main(["eval", "--config", str(config)]) == 0
    assert caplog.text.count("OPENPANGU MODEL LICENSE AGREEMENT") == 1
    assert json.loads((tmp_path / "run/student/config.json").read_text())["model_type"] == "PanguEmbedded"


def test_the_suffix_ends_the_users_turn(folder):
    ids = ChatTokenizer(folder).encode_prompt("two?" + " /no_think")
    assert "two? /no_think[unused10]" in ChatTokenizer(folder)._tokenizer.decode(ids)
