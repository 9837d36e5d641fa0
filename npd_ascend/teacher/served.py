"""Log-probs of given answers from a vLLM server: its OpenAI-compatible /v1/completions with prompt_logprobs.

Dimensions: A answer tokens, K top-k.
"""

import json
import math
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

import numpy as np

from npd_ascend.config import TeacherConfig
from npd_ascend.errors import UserError
from npd_ascend.model.families import read_config
from npd_ascend.teacher.scorer import AnswerScore

_TIMEOUT_S = 600  # of one batch
Row = tuple[Sequence[int], int]


class ServedScorer:
    """vocab_size: of the served model; the server's softmax runs over all of it."""

    def __init__(self, url: str, vocab_size: int):
        self._url, self._vocab_size = url.rstrip("/"), vocab_size
        self._opener: OpenerDirector = build_opener(ProxyHandler({}))  # the server is near, a proxy is not for it
        served = (self._call("/v1/models").get("data") or [{}])[0]
        if "max_model_len" not in served:
            raise UserError(f"teacher.url={self._url}: answers, but is no vLLM server; is the port right?")
        self._name, self._max_model_len = served["id"], served["max_model_len"]

    def check(self, top_k: int) -> None:
        """UserError if the server has another vocabulary or gives fewer than `top_k` log-probs per token."""
        for token_id, there in ((self._vocab_size - 1, True), (self._vocab_size, False)):
            # asked with a sampling rule: as a prompt, a token without a row could end the server
            if self._accepts(allowed_token_ids=[token_id]) != there:
                raise UserError(
                    f"{self._url}: the model {self._name!r} {'lacks' if there else 'has'} token {token_id}, but "
                    f"teacher.path/config.json says vocab_size={self._vocab_size}; serve the model of teacher.path"
                )
        if not self._accepts(prompt_logprobs=top_k):
            raise UserError(
                f"{self._url}: refuses {top_k} log-probs per token; start the server with --max-logprobs {top_k}, or "
                f"lower teacher.top_k"
            )

    def score(self, rows: Sequence[Row], *, top_k: int, pack_tokens: int) -> list[AnswerScore]:
        """As of the whole model, but for entropy_A: the largest that agrees with the top-k (a flat remainder)."""
        longest = max(len(ids) for ids, _ in rows)
        if longest >= self._max_model_len:
            raise UserError(
                f"{self._url}: max_model_len={self._max_model_len}, but a sample of {longest} tokens needs "
                f"{longest + 1}; start the server with --max-model-len {longest + 1} or more"
            )
        scores = []
        for batch in _batches(rows, pack_tokens):
            prompts = [list(map(int, ids)) for ids, _ in batch]
            said = self._call("/v1/completions", self._body(prompt=prompts, prompt_logprobs=top_k))
            try:
                choices = sorted(said["choices"], key=lambda c: c["index"])
                for (ids, prompt_len), choice in zip(batch, choices, strict=True):
                    scores.append(self._answer(choice["prompt_logprobs"][prompt_len:], ids[prompt_len:], top_k))
            except (LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self._url}/v1/completions: not what vLLM answers to prompt_logprobs ({error!r}); is another "
                    f"program between, or another model served now? See the server's log"
                ) from None
        return scores

    def _answer(self, entries: list[dict[str, dict]], answer: Sequence[int], top_k: int) -> AnswerScore:
        """entries: per answer token its top-k by id, and the token itself where that is not among them."""
        logprobs, ids_AK, top_AK = [], [], []
        for entry, token_id in zip(entries, answer, strict=True):
            by_id = {int(id_): value["logprob"] for id_, value in entry.items()}
            # NaN has no place in JSON, so null may stand for it
            if any(logprob is None or not math.isfinite(logprob) for logprob in by_id.values()):
                raise UserError(
                    f"{self._url}: the teacher's log-probs are not numbers: damaged weights, or an overflow in the "
                    f"server's --dtype; nothing of this batch is trained on"
                )
            logprobs.append(by_id[token_id])
            if len(by_id) > top_k:
                del by_id[token_id]
            ids_AK.append(sorted(by_id, key=lambda id_: -by_id[id_]))
            top_AK.append([by_id[id_] for id_ in ids_AK[-1]])
        top = np.array(top_AK, np.float64)
        if np.exp(top).sum(-1).max() > 1 + 1e-3:
            raise UserError(f"{self._url}: what it gives are no log-probs; start it with --logprobs-mode raw_logprobs")
        return AnswerScore(
            logprob_A=np.array(logprobs, np.float32),
            topk_ids_AK=np.array(ids_AK, np.int32),
            topk_logprobs_AK=top.astype(np.float32),
            entropy_A=_largest_entropy(top, self._vocab_size).astype(np.float32),
        )

    def _body(self, **more: Any) -> dict:
        return {"model": self._name, "prompt": [0], "max_tokens": 1, "temperature": 0} | more

    def _accepts(self, **more: Any) -> bool:
        try:
            self._call("/v1/completions", self._body(**more))
        except _RefusedError:
            return False
        return True

    def _call(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as reply:
                return json.load(reply)
        except HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())
            kind = _RefusedError if error.code == 400 else UserError
            raise kind(f"{self._url}{path}: {error.code} {said[:300]}; see the server's log") from None
        except (OSError, HTTPException, json.JSONDecodeError) as error:
            raise UserError(
                f"teacher.url={self._url}: no vLLM server answers ({error}); start one, `python -m "
                f"vllm.entrypoints.openai.api_server --model FOLDER --host 127.0.0.1 --port 8000`, or set "
                f"teacher.engine: local"
            ) from None


class _RefusedError(UserError):
    """The server found the request wrong."""


def open_served(config: TeacherConfig, vocab_size: int) -> ServedScorer:
    """The server at config.url, checked. vocab_size: what teacher and student share."""
    own = read_config(config.path).vocab_size
    if own > vocab_size:
        raise UserError(
            f"{config.path}/config.json: vocab_size={own}, but the student has {vocab_size}; a server spreads "
            f"probability over the rest too, so set teacher.engine: local"
        )
    scorer = ServedScorer(config.url, vocab_size)
    scorer.check(min(config.top_k, vocab_size))
    return scorer


def _batches(rows: Sequence[Row], pack_tokens: int) -> Iterator[list[Row]]:
    """In order, up to `pack_tokens` tokens each, or one row."""
    batch: list[Row] = []
    for row in rows:
        if batch and sum(len(ids) for ids, _ in batch) + len(row[0]) > pack_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _largest_entropy(top_AK: np.ndarray, vocab_size: int) -> np.ndarray:
    """Nats, [A]; top_AK: log-probs. A teacher that knows nothing still has ln(vocab_size)."""
    rest_A = np.clip(1 - np.exp(top_AK).sum(-1), 0, None)
    others = max(vocab_size - top_AK.shape[1], 1)
    flat_A = np.where(rest_A > 0, -rest_A * np.log(np.maximum(rest_A, 1e-300) / others), 0)
    return -(np.exp(top_AK) * top_AK).sum(-1) + flat_A
