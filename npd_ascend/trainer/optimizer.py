"""AdamW on float32 master weights, its state cut over the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054).

A rank keeps masters and moments of the rows whose gradient sums it gets (trainer/gradients.py), updates them, and the
ranks gather the new weights. torch's own ways do not fit: ZeroRedundancyOptimizer assigns whole parameters (the
embedding alone is a fifth of openPangu-1B) and has no masters; FSDP2 gathers weights in every forward.

The update itself is torch's fused AdamW, on an NPU too: torch_npu brings its own kernel for it, so its NpuFusedAdamW,
which moves parameters into buffers of its own, is not needed. It is called as a function: a torch.optim.Optimizer
imports torch._dynamo, a second of every start.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

from npd_ascend.checkpoint import Rectangle
from npd_ascend.config import OptimizerConfig
from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import ALONE, Mesh, gather_rows
from npd_ascend.trainer.gradients import GradientSums

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """For a float32 model the parameters' own rows are the masters and nothing is held twice.

    A bfloat16 parameter at lr 1e-5 loses most updates to rounding, so its master is float32.
    """

    def __init__(self, model: Decoder, config: OptimizerConfig, mesh: Mesh = ALONE):
        self._config, self._mesh, self._pieces = config, mesh, model.pieces
        self._params = dict(model.named_parameters())
        self.gradients = GradientSums(model, mesh)
        self._rows = {name: self.gradients.rows(name) for name in self._params}
        self._masters = {}
        for name, param in self._params.items():
            own = param.detach()[self._rows[name]]
            self._masters[name] = own if own.dtype == torch.float32 else own.float()
        self._moments = {name: (torch.zeros_like(m), torch.zeros_like(m)) for name, m in self._masters.items()}
        self._updates = {
            name: torch.zeros((), dtype=torch.float32, device=m.device) for name, m in self._masters.items()
        }

    def reduce_and_clip(self) -> float:
        """Sum the gradients over ranks and scale them to a global norm of at most clip_norm; returns it before."""
        grads = self.gradients.take()
        for name, master in self._masters.items():
            master.grad = grads[name]
        counted = [grads[name][rows] for name in grads for rows in self._counted_rows(name)]
        norm = self._mesh.norm_over_all(get_total_norm(counted))
        clip_grads_with_norm_(self._masters.values(), self._config.clip_norm, norm)
        return float(norm)

    def _counted_rows(self, name: str) -> list[slice]:
        """Runs of own rows, counted from the first of them, that no other rank or slot counts too."""
        own = self._rows[name]
        if not self.gradients.is_cut(name) and self._mesh.dp_rank > 0:
            return []
        runs: list[slice] = []
        for piece in self._pieces[name]:
            start, stop = max(piece.at, own.start), min(piece.at + piece.rows, own.stop)
            if not piece.primary or start >= stop:
                continue
            if runs and runs[-1].stop == start - own.start:
                runs[-1] = slice(runs[-1].start, stop - own.start)
            else:
                runs.append(slice(start - own.start, stop - own.start))
        return runs

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights, give them to the other ranks, clear the gradients."""
        decayed = [name for name, master in self._masters.items() if master.dim() >= 2]
        self._update(decayed, lr, self._config.weight_decay)
        self._update([name for name in self._masters if name not in decayed], lr, 0.0)
        for master in self._masters.values():
            master.grad = None
        self._publish()

    def _update(self, names: list[str], lr: float, weight_decay: float) -> None:
        masters = [self._masters[name] for name in names]
        adamw(
            masters,
            [master.grad for master in masters],
            [self._moments[name][0] for name in names],
            [self._moments[name][1] for name in names],
            [],
            [self._updates[name] for name in names],
            fused=True,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def _publish(self) -> None:
        in_flight = []
        for name, param in self._params.items():
            own = param.detach()[self._rows[name]]
            if own.dtype != torch.float32:
                own.copy_(self._masters[name])
            if self._mesh.dp > 1 and self.gradients.is_cut(name):
                # a copy: input and output of a collective must not share memory
                in_flight.append(gather_rows(own.clone(), self._mesh.dp_group, async_op=True, out=param.detach()))
        for _, handle in in_flight:
            handle.wait()

    def rectangles(self, *, copies: bool) -> Iterator[Rectangle]:
        """Masters and moments of this rank as views, named after the Hugging Face tensors they belong to.

        copies: also those that another rank or slot holds too.
        """
        for name, master in self._masters.items():
            own = self._rows[name]
            if not (copies or self.gradients.is_cut(name) or self._mesh.dp_rank == 0):
                continue
            values = {"master": master, **dict(zip(_MOMENTS, self._moments[name], strict=True))}
            for piece in self._pieces[name]:
                start, stop = max(piece.at, own.start), min(piece.at + piece.rows, own.stop)
                if start >= stop or not (copies or piece.primary):
                    continue
                offsets = (piece.row + start - piece.at, *([piece.col] if len(piece.shape) == 2 else []))
                for key, value in values.items():
                    view = value[start - own.start : stop - own.start]
                    yield Rectangle(f"{key}/{piece.name}", offsets, piece.shape, view)

    @torch.no_grad()
    def restored(self, steps: int) -> None:
        """Call after `rectangles` were filled from a checkpoint made after `steps` updates."""
        for updates in self._updates.values():
            updates.fill_(steps)
        self._publish()
