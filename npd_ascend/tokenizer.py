"""The tokenizer of a model folder, its chat format, and the first thing in which two of them differ."""

import hashlib
import json
from pathlib import Path
from typing import Any

from npd_ascend.errors import UserError
from npd_ascend.pangu_tokenizer import PanguTokenizer, is_pangu, read_json, split_thinking

# what a vocabulary does not show: merges, normalisation, spaces, digits
_SAMPLE = "What is 12,345 + 6.7?\n\tDéjà vu: naïve 数学 🙂 don't  stop"


class ChatTokenizer:
    """A Hugging Face fast tokenizer, or openPangu's, with one fixed convention for training, rollout and evaluation.

    A prompt is the chat template with one user turn and the generation prompt, begun with BOS if the
    tokenizer has `add_bos_token` and the template does not write it; an answer ends with EOS.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "tokenizer_config.json").exists():
            raise UserError(f"{self.folder}/tokenizer_config.json: no such file; a model folder holds its tokenizer")
        self._thinks = is_pangu(self.folder)
        self._tokenizer: Any = PanguTokenizer(self.folder) if self._thinks else _fast_tokenizer(self.folder)
        if self._tokenizer.chat_template is None:
            raise UserError(f"{self.folder}: the tokenizer has no chat_template; add one to tokenizer_config.json")
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"{self.folder}: the tokenizer has no eos_token; add one to tokenizer_config.json")
        self.eos_id: int = self._tokenizer.eos_token_id
        self.pad_id: int = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self.eos_id
        self.vocab_size = len(self._tokenizer)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode_rendered(self._render(text, header=True))

    def render(self, messages: list[dict[str, str]], *, header: bool) -> str:
        """Turns with `role` and `content` as the template writes them; header: with the assistant's at the end."""
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        if self._thinks:
            return (*self._tokenizer.continuation(text), self.eos_id)
        return (*self._tokenizer(text, add_special_tokens=False).input_ids, self.eos_id)

    def decode_text(self, token_ids) -> str:
        """All the text, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_answer(self, token_ids) -> str:
        """The answer as text, without special tokens and without the thought before it."""
        ids = list(token_ids)
        if self._thinks:
            kept = [id_ for id_ in ids if id_ not in (self.eos_id, self.pad_id, self._tokenizer.bos_token_id)]
            return split_thinking(self._tokenizer.decode(kept))[1]
        return self.decode_text(ids)

    def decode_token(self, token_id: int) -> str:
        if self._thinks:
            return self._tokenizer.token_text(token_id)
        return str(self._tokenizer.decode([token_id]))

    def alone_context(self, kind: str) -> tuple[int, ...]:
        """What an answer is conditioned on when it stands alone: BOS only, or the assistant's header.

        The header comes after BOS where prompts begin with it.
        """
        if kind == "bos":
            if self._tokenizer.bos_token_id is None:
                raise UserError(f"{self.folder}: no bos_token; set teacher.alone_context: assistant_header")
            return (self._tokenizer.bos_token_id,)
        turn, with_header = self._render("x", header=False), self._render("x", header=True)
        if not with_header.startswith(turn) or with_header == turn:
            raise UserError(
                f"{self.folder}: the chat template adds no assistant header after the user's turn; "
                f"set teacher.alone_context: bos"
            )
        header, bos = self.encode_rendered(with_header[len(turn) :]), self._tokenizer.bos_token_id
        # a template that writes BOS writes it in front of the turn that was cut off
        begins_with_bos = bos is not None and self.encode_prompt("x")[0] == bos
        return (bos, *header) if begins_with_bos and header[0] != bos else header

    def difference(self, other: "ChatTokenizer") -> str | None:
        """The first thing in which the two disagree, None if they agree."""
        mine, theirs = self._tokenizer.get_vocab(), other._tokenizer.get_vocab()
        if mine != theirs:
            token = min(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
            return (
                f"token {token!r} is {mine.get(token)} in {self.folder} and {theirs.get(token)} in {other.folder}; "
                f"choose models with one tokenizer"
            )
        if self.eos_id != other.eos_id:
            return f"eos is {self.eos_id} in {self.folder} and {other.eos_id} in {other.folder}; {_adopt(self, other)}"
        if self.encode_prompt("x") != other.encode_prompt("x"):
            return f"the chat templates of {self.folder} and {other.folder} render differently; {_adopt(self, other)}"
        return None

    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the end token, the chat template and how a mixed text is cut."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        # the template and not what it renders: some write the date
        parts = [vocabulary, self.eos_id, str(self._tokenizer.chat_template), self.encode_answer(_SAMPLE)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _render(self, text: str, *, header: bool) -> str:
        return self.render([{"role": "user", "content": text}], header=header)

    def encode_rendered(self, rendered: str) -> tuple[int, ...]:
        """Ids of text that holds the template's markers already; BOS in front where prompts begin with it."""
        ids = tuple(self._tokenizer(rendered, add_special_tokens=False).input_ids)
        bos = self._tokenizer.bos_token_id
        if getattr(self._tokenizer, "add_bos_token", False) and bos is not None and ids[:1] != (bos,):
            return (bos, *ids)
        return ids


def _adopt(mine: ChatTokenizer, theirs: ChatTokenizer) -> str:
    """For a base model and a teacher made of it: one vocabulary, another chat format."""
    # the last is not for us: what is trained would else be served with the old end
    files = "tokenizer*, chat_template* and generation_config.json"
    return f"the tokens are the same, so you may copy {files} of {theirs.folder} into {mine.folder}"


def _fast_tokenizer(folder: Path):
    # without it transformers gives some classes an empty vocabulary, and says nothing
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder}/tokenizer.json: no such file; fetch the model's tokenizer again, or save it from transformers"
        )
    config = read_json(folder / "tokenizer_config.json")
    read_json(folder / "tokenizer.json")
    # AutoTokenizer imports generation and the model classes, three seconds of every process. Where the folder names the
    # class that is tokenizer.json as it stands, that is what it would give.
    plain = config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    try:
        return (_load_plain if plain else _load_any)(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: no tokenizer can be made of it ({reason}); fetch it again") from None


def _load_plain(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _load_any(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
