"""Gloo ranks that live for all tests that want them, so that a case on several ranks costs milliseconds."""

import queue
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from npd_ascend.parallel.mesh import make_mesh

WORLD = 8
LAYOUTS = [(2, 1), (3, 1), (4, 1), (6, 1), (1, 2), (2, 2), (4, 2), (1, 4)]
TIMEOUT = timedelta(seconds=200)  # a new group does not inherit one


def _serve(rank, folder, inbox, outbox):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    meshes = {
        (tp, dp, sp): make_mesh(tp, dp, rank, sequence_parallel=sp, timeout=TIMEOUT)
        for tp, dp in LAYOUTS
        for sp in ((False, True) if tp > 1 else (False,))
    }
    while (job := inbox.get()) is not None:
        fn, layout, args = job
        if rank < layout[0] * layout[1]:
            try:
                outbox.put((rank, fn(meshes[layout], *args), None))
            except BaseException:
                outbox.put((rank, None, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()


_pool: "RankPool | None" = None


def shared_pool() -> "RankPool":
    """The pool of this pytest process, started when it is first asked for."""
    global _pool
    _pool = _pool or RankPool()
    return _pool


def close_pool() -> None:
    global _pool
    if _pool:
        _pool.close()
    _pool = None


class RankPool:
    """run(fn, (tp, dp, sequence_parallel), *args) calls fn(mesh, *args) on tp * dp ranks; fn lives at module level."""

    def __init__(self):
        self._start()

    def _start(self):
        # fork would inherit threads and locks; what is imported before the fork is imported once and not WORLD times
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", "npd_ascend.trainer.loop"])
        self._folder = tempfile.TemporaryDirectory()  # a file store: no port to race for
        self._inboxes = [context.Queue() for _ in range(WORLD)]
        self._outbox = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, self._folder.name, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, fn, layout, *args):
        for inbox in self._inboxes:
            inbox.put((fn, layout, args))
        values = {}
        while len(values) < layout[0] * layout[1]:
            try:
                rank, values[rank], error = self._outbox.get(timeout=300)
            except queue.Empty:
                error = f"only ranks {sorted(values)} answered within 300 s"
            if error:
                self.close()  # the others may be stuck in a collective
                self._start()
                raise AssertionError(error)
        return [values[rank] for rank in sorted(values)]

    def close(self):
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
