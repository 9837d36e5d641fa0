"""openPangu's tokenizer without its remote code: SentencePiece and the special tokens that the folder names.

The models come with a slow tokenizer as a Python file of their own, which transformers runs only with
trust_remote_code. What that file does is little: text is split at the added tokens wherever they stand (in a user's
message too), the rest goes through `tokenizer.model` run by run, and prompts are rendered by the folder's template.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from npd_ascend.errors import UserError

THINK_START, THINK_END = "[unused16]", "[unused17]"

# Unicode's last code point is no character and stands in no vocabulary, so no piece spans it: text after it is encoded
# as a continuation, without the space that SentencePiece puts before a text.
_ANCHOR = "\U0010ffff"


def is_pangu(folder: Path) -> bool:
    """Whether tokenizer_config.json names openPangu's own class."""
    config = read_json(folder / "tokenizer_config.json")
    return config.get("tokenizer_class") == "PanguTokenizer"


def split_thinking(text: str) -> tuple[str, str]:
    """(thought, answer) of a decoded answer with its markers.

    As openPangu's own example does: the answer stands behind the last end marker, and without one the whole text is
    the answer, since the 1B model and /no_think produce no thought.
    """
    thought, marker, answer = text.rpartition(THINK_END)
    if not marker:
        return "", text.replace(THINK_START, "").strip()
    return thought.split(THINK_END)[0].split(THINK_START)[-1].strip(), answer.replace(THINK_START, "").strip()


class PanguTokenizer:
    """The part of transformers' tokenizer interface that ChatTokenizer uses."""

    def __init__(self, folder: Path):
        import sentencepiece

        config = read_json(folder / "tokenizer_config.json")
        file = folder / "tokenizer.model"
        if not file.exists():
            raise UserError(f"{file}: no such file; openPangu's tokenizer is this SentencePiece model")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file}: not a SentencePiece model ({error}); fetch it again") from None
        added = config.get("added_tokens_decoder", {})
        self._special = {token["content"]: int(id_) for id_, token in added.items()}
        self._folder = folder
        self.chat_template = _read_text(folder / "chat_template.jinja") or config.get("chat_template")
        self.add_bos_token = config.get("add_bos_token", True)
        for key in ("add_eos_token", "sp_model_kwargs"):
            if config.get(key):
                raise UserError(f"{folder}/tokenizer_config.json: {key}={config[key]!r} is not supported; remove it")
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._id_of(_content(config.get(f"{name}_token")), folder) for name in ("bos", "eos", "pad")
        )
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)")
        self._by_id = {id_: token for token, id_ in self._special.items()}
        self._anchor_ids = self._pieces.encode(_ANCHOR)
        if not self._pieces.is_byte(self._anchor_ids[-1]):
            raise UserError(f"{file}: no byte fallback, which openPangu's has; fetch the file again")

    def _id_of(self, token: str | None, folder: Path) -> int | None:
        if token is None:
            return None
        id_ = self._special.get(token, self._pieces.piece_to_id(token))
        if token not in self._special and self._pieces.id_to_piece(id_) != token:
            raise UserError(f"{folder}/tokenizer_config.json: token {token!r} is neither added nor in tokenizer.model")
        self._special.setdefault(token, id_)
        return id_

    def __len__(self) -> int:
        return max(self._pieces.vocab_size(), max(self._special.values(), default=-1) + 1)

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        if add_special_tokens:
            raise ValueError("ChatTokenizer adds special tokens by itself")
        ids: list[int] = []
        for run in self._split.split(text):
            ids += [self._special[run]] if run in self._special else self._pieces.encode(run)
        return SimpleNamespace(input_ids=ids)

    def continuation(self, text: str) -> list[int]:
        """Ids of text that goes on after other text, as an answer after the header's `助手：`."""
        return self(_ANCHOR + text, add_special_tokens=False).input_ids[len(self._anchor_ids) :]

    def token_text(self, token_id: int) -> str:
        """One token as it stands in a text, its space included; "" for an id that no token has."""
        if token_id in self._by_id or token_id >= self._pieces.vocab_size():
            return self._by_id.get(token_id, "")
        if self._pieces.is_byte(token_id):
            return self._pieces.decode([token_id])
        return self._pieces.id_to_piece(token_id).replace("▁", " ")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids that no token has, as a head padded beyond the vocabulary may give, have no text."""
        text, run = "", []
        for id_ in token_ids:
            if id_ not in self._by_id:
                run += [id_] if id_ < self._pieces.vocab_size() else []
                continue
            text += self._pieces.decode(run)
            text, run = text + ("" if skip_special_tokens else self._by_id[id_]), []
        return text + self._pieces.decode(run)

    def get_vocab(self) -> dict[str, int]:
        return {self._pieces.id_to_piece(id_): id_ for id_ in range(self._pieces.vocab_size())} | self._special

    def apply_chat_template(self, messages: list[dict], *, tokenize: bool, add_generation_prompt: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template  # sandboxed

        if tokenize:
            raise ValueError("ChatTokenizer tokenises by itself")
        names = {f"{name}_token": self._by_id.get(getattr(self, f"{name}_token_id"), "") for name in ("bos", "eos")}
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **names,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self._folder}: the chat template cannot be rendered ({error})") from None
        return rendered[0][0]


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def read_json(path: Path) -> dict:
    """An object of settings; UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it from the published model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: want an object of settings; copy it from the published model again")
    return content


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
