"""lm-eval's view of a model: prompts in the model's own chat format, answered by an engine of this project."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from npd_ascend.errors import UserError
from npd_ascend.evaluate.answers import AnswerFile
from npd_ascend.progress import progress
from npd_ascend.rollout.engine import Engine, Request, Sampling, in_order
from npd_ascend.tokenizer import ChatTokenizer

_DEFAULT_NEW_TOKENS = 256  # lm-eval's, where neither the task nor the user says


class EngineLM(TemplateLM):
    """Prompts, stops, filters and metrics are lm-eval's; tokens, samples and log-probs are the engine's.

    The engine stops at the end token alone, so an answer is cut at the task's stop texts after it was generated.
    max_tokens: of a prompt with its answer. A prompt above it is refused where lm-eval's own models cut its beginning.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        *,
        prompt_suffix: str,
        batch_size: int,
        max_tokens: int,
        seed: int,
    ):
        super().__init__()
        self._engine, self._chat, self._suffix = engine, tokenizer, prompt_suffix
        self._batch_size, self._max_tokens, self._seed = batch_size, max_tokens, seed
        self._answers: AnswerFile = None
        self._place, self._sample = "", 0

    def begin(self, place: str, sample: int, answers: AnswerFile) -> None:
        """From here on: answer number `sample` to every question of `place`, kept in `answers`."""
        self._place, self._sample, self._answers = place, sample, answers

    @property
    def eot_token_id(self) -> int:
        return self._chat.eos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._chat.folder)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None  # lm-eval would only log it

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without add_generation_prompt the last turn is the beginning of the answer, which the model continues."""
        turns = [dict(turn) for turn in chat_history]
        begun = "" if add_generation_prompt else turns.pop()["content"]
        for turn in turns:
            turn["content"] += self._suffix if turn["role"] == "user" else ""
        return self._chat.render(turns, header=True) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self._chat.encode_rendered(string))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, wishes = [], []
        for request in requests:
            context, given = request.args
            wish: Any = normalize_gen_kwargs(given, _DEFAULT_NEW_TOKENS)
            prompts.append((context, self._fitting(self.tok_encode(context), wish["max_gen_toks"])))
            wishes.append(wish)

        def ask(batch: Sequence[int]) -> list[str]:
            samplings = {Sampling(float(wishes[i]["temperature"]), float(wishes[i].get("top_p", 1.0))) for i in batch}
            if len(samplings) > 1:
                raise ValueError(f"{self._place}: a benchmark samples in one way, not in {samplings}")
            finished = self._engine.generate(
                [Request(prompts[i][1], wishes[i]["max_gen_toks"], self._seed_of(prompts[i][0])) for i in batch],
                samplings.pop(),
            )
            return [
                postprocess_generated_text(
                    self._chat.decode_answer(completion.token_ids),
                    handle_stop_sequences(wishes[i].get("until"), eos=None),
                    None,
                )
                for i, completion in zip(batch, in_order(finished), strict=True)
            ]

        lengths = [len(ids) for _, ids in prompts]
        return self._in_batches(
            "generate_until", [(context, w) for (context, _), w in zip(prompts, wishes, strict=True)], lengths, ask
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-prob of the continuation in nats, False): whether it is also the greedy answer is not found out, since
        accuracy, the only metric here that compares given answers, does not ask."""
        pairs = [(self._fitting(context, len(answer)), tuple(answer)) for _, context, answer in requests]

        def ask(batch: Sequence[int]) -> list[float]:
            asked = [(*pairs[i][0], *pairs[i][1][:n]) for i in batch for n in range(len(pairs[i][1]))]
            logprobs = iter(self._engine.next_logprobs(asked, [id_ for i in batch for id_ in pairs[i][1]]).tolist())
            return [sum(next(logprobs) for _ in pairs[i][1]) for i in batch]

        lengths = [len(context) for context, _ in pairs]
        sums = self._in_batches("loglikelihood", [list(texts) for texts, _, _ in requests], lengths, ask)
        return [(logprob, False) for logprob in sums]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no benchmark of the eleven asks for it")

    def _in_batches(self, kind: str, questions: list, lengths: list[int], ask: Callable[[Sequence[int]], list]) -> list:
        """Long prompts first, equal ones beside each other; the answers in the order of the questions."""
        order = sorted(range(len(questions)), key=lambda i: (-lengths[i], str(questions[i])))
        answers: list = [None] * len(questions)
        with progress(f"eval {self._place}", len(questions), "requests") as bar:
            for number, batch in enumerate(self._cut(order)):
                given = self._answers.batch(kind, number, [questions[i] for i in batch], lambda b=batch: ask(b))  # type: ignore[misc]
                for i, answer in zip(batch, given, strict=True):
                    answers[i] = answer
                bar.update(len(batch))
        return answers

    def _cut(self, order: list[int]) -> Iterator[list[int]]:
        for at in range(0, len(order), self._batch_size):
            yield order[at : at + self._batch_size]

    def _fitting(self, token_ids: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        if len(token_ids) + new_tokens > self._max_tokens:
            raise UserError(
                f"benchmarks.{self._place}: a prompt of {len(token_ids)} tokens and {new_tokens} new ones do not fit "
                f"into {self._max_tokens}; lower shots or max_new_tokens, or raise model.max_tokens"
            )
        return tuple(token_ids)

    def _seed_of(self, context: str) -> int:
        """63 bits that are the same wherever in the order the question stands."""
        text = f"{self._seed}:{self._sample}:{context}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class Rehearsal(EngineLM):
    """Nobody is asked: prompts are made and measured, and what is not an answer is scored."""

    requests = 0  # so far

    def _in_batches(self, kind: str, questions: list, lengths: list[int], ask: Callable[[Sequence[int]], list]) -> list:
        self.requests += len(questions)
        return ["" if kind == "generate_until" else 0.0] * len(questions)
