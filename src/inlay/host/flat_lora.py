"""Flat-LoRA: noise on the merged weight while it is trained, so that it ends where the loss is flat around it.

    y = W' x + ε x,   ε_jk ~ N(0, σ_t² / n · ‖W'_j‖²),   σ_t = σ/2 (1 − cos πt),   W' = W + s (ΔW(θ) − ΔW(θ₀)) (m × n)

Li, He, Li, Wang, Huang 2024, "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", arXiv 2409.14396, with any
method. Nothing is added to a weight and subtracted again, which would move a half-precision one bit by bit: ε x is
added to the layer's output, and ε is built from a seed in the forward pass and once more in the backward pass. [ours]:
one ε for all micro-batches of a step.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback

from inlay.host.layer import InlayLinear
from inlay.numerics.ops import seed_of


def flat_noise(model: nn.Module, t: float, sigma: float = 0.05, seed: int = 0) -> None:
    """Set the noise with which the adapted layers of `model` compute in training mode, before every step.

    Args:
        model: adapted.
        t: the fraction of all steps that is done, 0 to 1; another t gives other noise.
        sigma: the noise on a row of the weight at the end, over the row's norm; 0 ends it.
        seed: of the noise.

    Raises:
        ValueError: t is not in [0, 1], or sigma is below 0.
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t={t} is not the fraction of the training that is done: it must be in [0, 1]")
    if sigma < 0:
        raise ValueError(f"sigma={sigma} is below 0")
    size = sigma / 2 * (1 - math.cos(math.pi * t))
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, InlayLinear)):
        scale = size / math.sqrt(layer.in_features)
        layer.noise = (scale * layer.row_norms(), seed_of(seed, i, str(t))) if size else None


class Flat(TrainerCallback):
    """Call `flat_noise` in transformers' Trainer and trl's trainers: `Trainer(..., callbacks=[Flat(0.05)])`."""

    def __init__(self, sigma: float = 0.05, seed: int = 0) -> None:
        self.sigma, self.seed = sigma, seed

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        flat_noise(model, min(1.0, state.global_step / max(1, state.max_steps)), self.sigma, self.seed)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        flat_noise(model, 0.0)
