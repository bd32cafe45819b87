"""Muon for the matrices inside the networks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) makes each matrix's momentum orthogonal; its step
is scaled to AdamW's usual size as in arXiv:2502.16982.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, batched [n, rows, columns]."""
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def is_matrix(name: str, parameter: Tensor) -> bool:
    if "probe" in name or "embed_tokens" in name or "position" in name or "pos_emb" in name:
        return False
    return parameter.dim() >= 2 and parameter.flatten(1).shape[1] > 9


class Optimizer:
    """One `step(rate)` a batch; `rate` in 0..1 scales both learning rates."""

    def __init__(
        self, model: nn.Module, *, muon_rate: float = 3e-3, adam_rate: float = 2e-3
    ) -> None:
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        self.parameters = dict(model.named_parameters())
        self.master = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.second = {
            name: torch.zeros_like(p) for name, p in self.master.items() if not is_matrix(name, p)
        }
        self.average: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float, *, clip: float = 1.0) -> float:
        self.steps += 1
        present = {
            name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None
        }
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in present.values()))
        scale = min(1.0, clip / (norm + 1e-6))
        by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        plain = []
        for name, grad in present.items():
            if name in self.second:
                plain.append(name)
            else:
                matrix = grad.flatten(1)
                by_shape[tuple(matrix.shape)].append(name)
        for shape, names in by_shape.items():
            stacked = []
            for name in names:
                momentum = self.first[name]
                momentum.lerp_(present[name], 0.05)
                stacked.append(present[name].lerp(momentum, 0.95).flatten(1))
            size = self.muon_rate * rate * 0.2 * math.sqrt(max(shape))
            for name, update in zip(names, orthogonal(torch.stack(stacked)), strict=True):
                master = self.master[name]
                master.mul_(1 - self.muon_rate * rate * 0.05)
                master.add_(update.float().view_as(master), alpha=-size)
        if plain:
            grads = [present[name] * scale for name in plain]
            firsts = [self.first[name] for name in plain]
            seconds = [self.second[name] for name in plain]
            torch._foreach_lerp_(firsts, grads, 0.1)
            torch._foreach_mul_(seconds, 0.98)
            torch._foreach_addcmul_(seconds, grads, grads, 0.02)
            debias = math.sqrt(1 - 0.98**self.steps) / (1 - 0.9**self.steps)
            roots = torch._foreach_sqrt(seconds)
            torch._foreach_add_(roots, 1e-8)
            masters = [self.master[name] for name in plain]
            torch._foreach_addcdiv_(masters, firsts, roots, value=-self.adam_rate * rate * debias)
        for name, p in self.parameters.items():
            if name in present:
                p.copy_(self.master[name])
            p.grad = None
        return norm

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Keeps a running average of the masters, which is what gets exported."""
        if not self.average:
            self.average = {name: p.clone() for name, p in self.master.items()}
            return
        torch._foreach_lerp_(list(self.average.values()), list(self.master.values()), 1 - decay)

    def state(self) -> dict[str, Any]:
        return {
            "master": self.master,
            "first": self.first,
            "second": self.second,
            "average": self.average,
            "steps": self.steps,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes up a saved run; parameters that it lacks stay as they are."""
        for part in ("master", "first", "second"):
            own = getattr(self, part)
            for name, value in state[part].items():
                if name in own and own[name].shape == value.shape:
                    own[name].copy_(value)
        self.steps = state["steps"]
        self.average = state["average"]
        for name, p in self.parameters.items():
            p.copy_(self.master[name])
