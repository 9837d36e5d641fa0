"""AdamW on float32 master weights, with float32 gradient sums whatever the model computes in."""

import torch

from npd_ascend.config import OptimizerConfig
from npd_ascend.model.decoder import Decoder


class MasterAdamW:
    """For a float32 model the parameters are their own masters and nothing is held twice.

    A bfloat16 parameter at lr 1e-5 loses most updates to rounding, so its master is float32.
    """

    def __init__(self, model: Decoder, config: OptimizerConfig):
        self._clip_norm = config.clip_norm
        self._params = dict(model.named_parameters())
        self._masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().clone() for name, p in self._params.items()
        }
        decayed = [m for m in self._masters.values() if m.dim() >= 2]
        plain = [m for m in self._masters.values() if m.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True
        )

    def accumulate(self) -> None:
        """Move the gradients of one backward into the float32 sums."""
        for name, param in self._params.items():
            master = self._masters[name]
            if master is param or param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad += param.grad
            param.grad = None

    def clip(self) -> float:
        """Scale the gradient sums to at most clip_norm; returns their global norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self._masters.values(), self._clip_norm, foreach=True))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights and clear the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad()
        for name, param in self._params.items():
            if self._masters[name] is not param:
                param.copy_(self._masters[name])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Masters, moments and step counts by name, for a checkpoint."""
        tensors = {}
        for name, master in self._masters.items():
            tensors[f"master/{name}"] = master.detach()
            for key, value in self._adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, master in self._masters.items():
            master.copy_(tensors[f"master/{name}"])
            self._params[name].copy_(master)
            keys = ("step", "exp_avg", "exp_avg_sq")
            self._adam.state[master] = {key: tensors[f"{key}/{name}"].clone() for key in keys}
