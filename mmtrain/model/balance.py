"""What routers carry from one optimizer step to the next: the experts' shares, and the loss-free bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.config.schema import Model
from mmtrain.model.probe import GradientProbe
from mmtrain.model.stepio import PartRouterInput, StepInputs, first_inputs


@dataclass
class RouterState:
    """State of all sparse layers, by part; the same on every rank."""

    model: Model
    shares: dict[str, torch.Tensor]
    """Part -> [layers, E] each expert's share of the choices in the last step's global batch."""
    bias: dict[str, torch.Tensor]
    """Part -> [layers, E] loss-free bias."""

    @classmethod
    def first(cls, model: Model, device: torch.device | str = "cpu") -> "RouterState":
        """Before the first step: every expert's share is 1/E, no bias."""
        routers = first_inputs(model, device=device).routers
        return cls(
            model,
            {part: router.load_share for part, router in routers.items()},
            {part: router.bias for part, router in routers.items()},
        )

    def inputs(
        self,
        label_weight: torch.Tensor,
        valid_tokens: Mapping[str, torch.Tensor],
        probe: GradientProbe | None = None,
    ) -> StepInputs:
        """Inputs of a step's forwards. label_weight [] and valid_tokens (part -> []) are sums over the global batch."""
        routers = {
            part: PartRouterInput(self.shares[part], self.bias[part], valid_tokens[part].float())
            for part in self.shares
        }
        return StepInputs(label_weight.float(), routers, probe)

    def update(self, counts: Mapping[str, torch.Tensor]) -> None:
        """Take in a step's choices: part -> [layers, E], summed over the global batch.

        Bias (arXiv:2408.15664, algorithm 1): up by bias_rate where an expert had less than the mean, else down.
        A layer that saw no valid token keeps what it had.
        """
        for part, count in counts.items():
            total = count.sum(-1, keepdim=True)
            shares = (count / total.clamp(min=1)).float()  # counts come in fp64, where sums of any size are exact
            self.shares[part] = torch.where(total > 0, shares, self.shares[part])
            moe = getattr(self.model, part).moe
            if moe.balance == "bias":
                self.bias[part] += moe.bias_rate * torch.sign(count.mean(-1, keepdim=True) - count).float()

    def as_json(self) -> dict[str, Any]:
        """Plain lists for a checkpoint; fp32 values survive the way through JSON exactly."""
        return {
            part: {"load_share": self.shares[part].tolist(), "bias": self.bias[part].tolist()} for part in self.shares
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Put back what `as_json` gave."""
        for part in self.shares:
            device = self.shares[part].device
            self.shares[part] = torch.tensor(saved[part]["load_share"], device=device)
            self.bias[part] = torch.tensor(saved[part]["bias"], device=device)
