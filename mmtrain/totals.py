"""Numbers of one optimizer step over all ranks: what the loss divides by before it, what it came to after it."""

from dataclasses import dataclass, field

import torch

from mmtrain.config.schema import PARTS, Model
from mmtrain.config.tokens import TokenKind
from mmtrain.data.record import Step
from mmtrain.model.stepio import Losses
from mmtrain.parallel.groups import Groups

STOP_CODES = 8
FAILED = STOP_CODES - 1
"""Stop code of a rank that has no data to go on with: above every reason of run.guard."""


@dataclass(frozen=True)
class StepSums:
    """Sums over the global batch that are known before the first forward. Tensors are fp64 on the device."""

    label_weight: torch.Tensor
    """[] W: all label weights."""
    valid_tokens: dict[str, torch.Tensor]
    """Part -> [] tokens that its routers see."""
    tokens: int
    """Positions that hold a token."""
    positions: int
    """All positions, padding included."""
    labels: int
    """Positions with a target of the loss."""
    images: int
    """Images that are not blank."""
    unusable: int
    """Samples that could not be used."""
    samples: int
    """Samples that were read, or could not be."""
    bad: int
    """Those that could not, without what the recipe withholds."""
    documents: list[int]
    """By source: documents packed; each part of one that was cut counts."""
    stop: int
    """The highest stop code of any rank (run.guard); 0 goes on."""

    @classmethod
    def of(cls, step: Step | None, stop: int, groups: Groups, num_sources: int) -> "StepSums":
        """Add up over the ranks: the one collective before a step's first forward. A rank without a step adds 0."""
        counts = torch.zeros(8 + len(PARTS) + num_sources, dtype=torch.float64)
        if step is not None:
            counts[:] = torch.tensor([step.label_weight, *_counts(step)], dtype=torch.float64)
        stops = torch.zeros(STOP_CODES, dtype=torch.float64)
        stops[stop] = 1.0
        # Tensor ranks hold the same packs: one of them counts. But every rank's stop must be heard.
        mine = torch.cat([counts * (groups.tensor_rank == 0), stops])
        total = groups.sum_over_world(mine.to(groups.device))
        weight, valid, rest = total[0], total[1 : 1 + len(PARTS)], total[1 + len(PARTS) :].tolist()
        tokens, positions, labels, images, unusable, samples, bad, *documents = map(int, rest[:-STOP_CODES])
        return cls(
            label_weight=weight,
            valid_tokens=dict(zip(PARTS, valid.unbind(), strict=True)),
            tokens=tokens,
            positions=positions,
            labels=labels,
            images=images,
            unusable=unusable,
            samples=samples,
            bad=bad,
            documents=documents,
            stop=max(code for code, heard in enumerate(rest[-STOP_CODES:]) if heard),
        )


def _counts(step: Step) -> list[float]:
    """Valid tokens by part, tokens, positions, labels, images, lines of the ledger, samples, bad ones, documents."""
    batches = step.micro_batches
    documents = torch.zeros(batches[0].num_sources, dtype=torch.int64)
    for batch in batches:
        first = (batch.positions == 0) & (batch.kind != TokenKind.PADDING)
        documents += torch.bincount(batch.source_ids[first], minlength=len(documents))
    return [
        *(step.valid_tokens[part] for part in PARTS),
        sum(int((batch.kind != TokenKind.PADDING).sum()) for batch in batches),
        sum(batch.kind.numel() for batch in batches),
        sum(int((batch.weights > 0).sum()) for batch in batches),
        sum(int(batch.image_valid.sum()) for batch in batches),
        len(step.ledger),
        step.samples,
        len(step.bad),
        *documents.tolist(),
    ]


@dataclass
class LossTotals:
    """The step's losses, added over micro-batches and then over data ranks."""

    model: Model
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, losses: Losses) -> None:
        """Take in a micro-batch."""
        values = {
            "source_sum": losses.by_source_sum,
            "source_weight": losses.by_source_weight,
            **{f"balance/{part}": value.detach() for part, value in losses.balance.items()},
            **{f"z/{part}": value.detach() for part, value in losses.z.items()},
            **{f"counts/{part}": value for part, value in losses.counts.items()},
            **{f"probability/{part}": value for part, value in losses.probability.items()},
        }
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def reduce(self, groups: Groups) -> None:
        """Add up over data ranks: the one collective after a step's last backward."""
        flat = torch.cat([value.double().flatten() for value in self.sums.values()])
        # Tensor ranks have the same sums: one of them counts. But a NaN times 0 is a NaN, so all hear of any rank's.
        parts = groups.sum_over_world(flat * (groups.tensor_rank == 0)).split(
            [value.numel() for value in self.sums.values()]
        )
        self.sums = {name: part.view(old.shape) for part, (name, old) in zip(parts, self.sums.items(), strict=True)}

    def by_part(self, kind: str) -> dict[str, torch.Tensor]:
        """Part -> value of one kind: balance, z, counts or probability."""
        return {name.partition("/")[2]: value for name, value in self.sums.items() if name.startswith(f"{kind}/")}

    def language_loss(self) -> float:
        """Weighted mean cross-entropy of the global batch, in nats; 0 without any label."""
        return float(self.sums["source_sum"].sum() / self.sums["source_weight"].sum().clamp(min=1e-30))

    def loss(self) -> float:
        """The language loss with the router losses times their coefficients."""
        total = self.language_loss()
        for part, balance in self.by_part("balance").items():
            moe = getattr(self.model, part).moe
            total += (moe.balance_coef if moe.balance == "loss" else 0.0) * float(balance)
            total += moe.z_coef * float(self.sums[f"z/{part}"])
        return total

    def by_source(self, names: list[str]) -> dict[str, float]:
        """Source -> its language loss; sources without a label in this step are left out."""
        pairs = zip(names, self.sums["source_sum"].tolist(), self.sums["source_weight"].tolist(), strict=True)
        return {name: total / weight for name, total, weight in pairs if weight > 0}

    def switch(self) -> dict[str, float]:
        """Part -> Switch's balance (arXiv:2101.03961, eq. 4) with this step's own shares, mean over its sparse layers.

        E * sum_e f_e * p_e over the global batch, f share of choices, p mean probability; 0 without valid tokens.
        """
        found = {}
        for part, counts in self.by_part("counts").items():
            shares, means = (
                sums / sums.sum(-1, keepdim=True).clamp(min=1e-30)
                for sums in (counts, self.sums[f"probability/{part}"])
            )
            found[part] = float((counts.shape[-1] * shares * means).sum(-1).mean())
        return found

    def expert_shares(self) -> dict[str, dict[str, list[float]]]:
        """Part -> number of the sparse layer in its part -> share of choices by expert."""
        shares = {}
        for part, counts in self.by_part("counts").items():
            moe = getattr(self.model, part).moe
            rows = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
            every = moe.every if part != "connector" else 1
            shares[part] = {str((number + 1) * every - 1): row for number, row in enumerate(rows)}
        return shares
