"""The student's answers: transformers on the trainer's own weights, or vLLM in processes that stay alive."""

import multiprocessing
import os
import resource
import time
from pathlib import Path

import torch

from npd_ascend.device import DTYPES
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.hf_weights import hf_views
from npd_ascend.model.load import save_decoder
from npd_ascend.rollout.engine import Completion, Request, Sampling, in_order
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.tokenizer import ChatTokenizer


def request_seed(job: dict, number: int) -> int:
    """Of answer `number` in a run of the comparison with this seed."""
    return 10**9 * job["seed"] + number


def open_generator(job: dict, model: Decoder, tokenizer: ChatTokenizer):
    kind = {"hf": SharedHf, "vllm": VllmProcesses}[job["settings"]["engine"]]
    return kind(job, model, tokenizer)


class SharedHf(HfEngine):
    """No weights travel: transformers' parameters are views of ours."""

    def __init__(self, job: dict, model: Decoder, tokenizer: ChatTokenizer):
        super().__init__(
            dtype=DTYPES[job["dtype"]],
            device=torch.device("cpu"),
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
        )
        self.load_weights(Path(job["student"]))
        theirs = dict(self._model.named_parameters())
        for piece, view in hf_views(model):
            theirs[piece.name].data = view

    def take_weights(self) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Completion]:
        return in_order(super().generate(requests, Sampling(1.0)))

    def versions(self) -> dict:
        return {}

    def usage(self) -> tuple[float, float]:
        return 0.0, 0.0

    def close(self) -> None:
        pass


class VllmProcesses:
    """One of one thread per core: on CPU much of vLLM's step is not parallel."""

    def __init__(self, job: dict, model: Decoder, tokenizer: ChatTokenizer):
        self._job, self._model, self._folder = job, model, Path(job["folder"]) / "published"
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        # read when a child imports torch
        threads, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", ""), "1"
        for _ in range(job["threads"]):
            ours, theirs = context.Pipe()
            self._processes.append(context.Process(target=_serve, args=(job, theirs), daemon=True))
            self._processes[-1].start()
            theirs.close()  # so that a process that died ends the wait for it
            self._pipes.append(ours)
        os.environ["OMP_NUM_THREADS"] = threads
        self._ask(["load", job["student"]])
        self._ask(["generate", [Request((tokenizer.eos_id,), 2, 0)]])  # the first call sets things up
        self.usage()

    def _ask(self, *messages) -> list:
        """One message for each process, or one for all."""
        every = messages if len(messages) == len(self._pipes) else messages * len(self._pipes)
        for pipe, message in zip(self._pipes, every, strict=True):
            pipe.send(message)
        return [pipe.recv() for pipe in self._pipes]

    def take_weights(self) -> None:
        save_decoder(self._model, Path(self._job["student"]), self._folder)
        self._ask(["load", str(self._folder)])

    def generate(self, requests: list[Request]) -> list[Completion]:
        count = len(self._pipes)
        shares = self._ask(*(["generate", requests[i::count]] for i in range(count)))
        completions: list = [None] * len(requests)
        for i, share in enumerate(shares):
            completions[i::count] = share
        return completions

    def versions(self) -> dict:
        return {"vllm": self._ask(["version"])[0]}

    def usage(self) -> tuple[float, float]:
        """Peak GB and processor seconds of all, from the first real request on."""
        peaks, seconds = zip(*self._ask(["usage"]), strict=True)
        return sum(peaks), sum(seconds)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()


def _serve(job: dict, pipe) -> None:
    from npd_ascend.rollout.vllm_engine import VllmEngine

    torch.set_num_threads(1)
    tokenizer = ChatTokenizer(Path(job["student"]))
    engine = VllmEngine(
        dtype=DTYPES[job["dtype"]],
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        max_model_len=job["max_model_len"],
        kv_cache_gib=0.5,
    )
    seconds = 0.0
    while True:
        what, *arguments = pipe.recv()
        started = time.process_time()
        if what == "load":
            engine.load_weights(Path(*arguments))
            seconds += time.process_time() - started
            pipe.send(None)
        elif what == "generate":
            completions = in_order(engine.generate(*arguments, Sampling(1.0))) if arguments[0] else []
            seconds += time.process_time() - started
            pipe.send(completions)
        elif what == "version":
            import vllm

            pipe.send(vllm.__version__)
        else:
            pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, seconds))
            seconds = 0.0
