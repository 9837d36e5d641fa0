"""AdamW on float32 master weights, its state cut over the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054).

A rank keeps masters and moments of the rows whose gradient sums it gets (trainer/gradients.py), updates them, and the
ranks gather the new weights. torch's own ways do not fit: ZeroRedundancyOptimizer assigns whole parameters (the
embedding alone is a fifth of openPangu-1B) and has no masters; FSDP2 gathers weights in every forward.

The update itself is torch's fused AdamW, on an NPU too: torch_npu brings its own kernel for it, so its NpuFusedAdamW,
which moves parameters into buffers of its own, is not needed.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from npd_ascend.checkpoint import Rectangle
from npd_ascend.config import OptimizerConfig
from npd_ascend.model.decoder import Decoder
from npd_ascend.parallel.mesh import ALONE, Mesh, gather_rows
from npd_ascend.trainer.gradients import GradientSums

_STATE = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """For a float32 model the parameters' own rows are the masters and nothing is held twice.

    A bfloat16 parameter at lr 1e-5 loses most updates to rounding, so its master is float32.
    """

    def __init__(self, model: Decoder, config: OptimizerConfig, mesh: Mesh = ALONE):
        self._clip_norm, self._mesh, self._pieces = config.clip_norm, mesh, model.pieces
        self._params = dict(model.named_parameters())
        self.gradients = GradientSums(model, mesh)
        self._rows = {name: self.gradients.rows(name) for name in self._params}
        self._masters = {}
        for name, param in self._params.items():
            own = param.detach()[self._rows[name]]
            self._masters[name] = own if own.dtype == torch.float32 else own.float()
        decayed = [m for m in self._masters.values() if m.dim() >= 2]
        plain = [m for m in self._masters.values() if m.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True
        )

    def reduce_and_clip(self) -> float:
        """Sum the gradients over ranks and scale them to a global norm of at most clip_norm; returns it before."""
        grads = self.gradients.take()
        for name, master in self._masters.items():
            master.grad = grads[name]
        counted = [grads[name][rows] for name in grads for rows in self._counted_rows(name)]
        norm = self._mesh.norm_over_all(get_total_norm(counted))
        clip_grads_with_norm_(self._masters.values(), self._clip_norm, norm)
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
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad()
        self._publish()

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
            state = self._adam.state[master]
            for key in _STATE:
                if key not in state:  # a checkpoint is about to fill it
                    state[key] = torch.zeros_like(master)
            values = {"master": master, **{key: state[key] for key in _STATE}}
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
        for master in self._masters.values():
            self._adam.state[master]["step"] = torch.tensor(float(steps), device=master.device)
        self._publish()
