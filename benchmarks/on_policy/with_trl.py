"""One row of vs_on_policy.py by TRL: GKDTrainer or DistillationTrainer, always on-policy.

    python benchmarks/on_policy/with_trl.py JOB.json        in the environment of requirements-vs-on-policy.txt

The trainers run as they are; what is added looks on: a clock around generation and teacher, weights saved on the way.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
import transformers
import trl
from clock import Clock
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Watch(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock
        self.batch = (0, 0, 0)  # what the step under way trains on

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.clock.enter("other")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.clock.enter("other")
        self.clock.trained(*self.batch)
        control.should_training_stop = self.clock.done
        if self.clock.done or self.clock.save_is_due:
            self.clock.save(dict(model.named_parameters()))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    prompts = json.loads(Path(job["prompts"]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    for prompt in prompts[:3]:
        turn = [{"role": "user", "content": prompt["text"]}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert ids == prompt["token_ids"], "TRL would see other prompts than the rows beside it"
    random.seed(job["seed"])  # GKD throws a coin even where lmbda is 1
    clock = Clock(job)
    trainer = {"gkd": make_gkd, "distillation": make_distillation}[job["trainer"]](job, prompts, tokenizer, clock)
    trainer.train()
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    (Path(job["folder"]) / "result.json").write_text(json.dumps(clock.result() | {"versions": versions}))
    os._exit(0)  # threads of the data loader would be waited for


def common(job: dict) -> dict:
    """Beside what a row changes. transformers divides by the tokens of the batch and clips at 1.0, as ours does."""
    return {
        "output_dir": job["folder"],
        "use_cpu": True,
        "max_steps": 10**6,  # the clock ends it
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": job["warmup_steps"],
        "adam_beta2": job["beta2"],
        "seed": job["seed"],
    } | job["settings"]


def kinds(job: dict) -> dict:
    """Arguments that decide in which numbers the two models are held."""
    return {} if job["dtype"] is None else {key: {"dtype": job["dtype"]} for key in _INIT}


_INIT = ("model_init_kwargs", "teacher_model_init_kwargs")


def make_gkd(job: dict, prompts: list[dict], tokenizer, clock: Clock) -> GKDTrainer:
    config = GKDConfig(**common(job), **kinds(job), lmbda=1.0, max_new_tokens=job["max_new_tokens"])
    # the reference answer is not trained on where lmbda is 1, but GKD divides the loss by its tokens, not the sampled
    turns = [[{"role": "user", "content": p["text"]}, {"role": "assistant", "content": p["answer"]}] for p in prompts]
    trainer = GKDTrainer(
        job["student"],
        job["teacher"],
        args=config,
        train_dataset=Dataset.from_dict({"messages": turns}),
        processing_class=tokenizer,
    )
    generate = clock.timed("generation", trainer.generate_on_policy_outputs)
    watch = _look_on(trainer, clock)

    def counted(*args):
        ids, mask, labels = generate(*args)
        watch.batch = (len(ids), int(mask.sum()), int((labels != -100).sum()))
        clock.generated += len(ids)
        return ids, mask, labels

    trainer.generate_on_policy_outputs = counted
    return trainer


def make_distillation(job: dict, prompts: list[dict], tokenizer, clock: Clock) -> DistillationTrainer:
    tokenizer.padding_side = "left"
    config = DistillationConfig(**common(job), **kinds(job), max_completion_length=job["max_new_tokens"])
    turns = [[{"role": "user", "content": p["text"]}] for p in prompts]
    trainer = DistillationTrainer(
        job["student"],
        job["teacher"],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": turns}),
        processing_class=tokenizer,
    )
    generate = clock.timed("generation", trainer._generate_single_turn)
    watch = _look_on(trainer, clock)

    def counted(prompt_ids, *args, **kwargs):
        answers = generate(prompt_ids, *args, **kwargs)
        answer_tokens = sum(map(len, answers))
        watch.batch = (len(answers), sum(map(len, prompt_ids)) + answer_tokens, answer_tokens)
        clock.generated += len(answers)
        return answers

    trainer._generate_single_turn = counted
    return trainer


def _look_on(trainer, clock: Clock) -> Watch:
    """All between the beginning of a step and its end is the student's but generation and teacher."""
    step, teacher = trainer.training_step, trainer.teacher_model

    def training_step(*args, **kwargs):
        clock.enter("student")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    # GKD calls the teacher, DistillationTrainer what is below its head
    teacher.forward = clock.timed("teacher", teacher.forward)
    teacher.base_model.forward = clock.timed("teacher", teacher.base_model.forward)
    watch = Watch(clock)
    trainer.add_callback(watch)
    return watch


if __name__ == "__main__":
    main()
