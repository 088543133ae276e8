"""FourierFT: a few entries of the change's spectrum, at places that are drawn once.

    ΔW = α Re ifft2(F),   F (out × in) = 0 but F[E_k] = c_k,   c (n) = 0

Gao, Wang, Chen, Zhang, Li, Chen, Cai 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
arXiv 2405.03003. It trains n numbers a weight, however large the weight is.

The paper draws c at the start. ΔW is linear in c and the start's change is subtracted, so that is the same as c = 0.
[ours] Merge for inference; in training each step costs an inverse FFT of W's size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Method, Params


@dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    name = "fourierft"
    title = "FourierFT: entries of the change's spectrum"
    equation = "ΔW = α Re ifft2(F), F[E_k] = c_k"
    paper = "Gao et al. 2024, arXiv 2405.03003"
    trains = "c (n)"
    size = "n"  # what `inlay plan` and the budgets of `inlay compare` set
    frozen = frozenset({"E"})  # kept beside c and never trained
    learning_rate = 0.05  # what `learning_rate: auto` takes; other models want other rates
    zero_init = True  # ΔW(θ₀) = 0, so θ₀ need not be stored

    n: int = field(default=1000, metadata={"help": "entries of the spectrum that are trained", "min": 1})
    alpha: float = field(default=300.0, metadata={"help": "factor on the spectrum", "above": 0})
    places: int = field(default=777, metadata={"help": "seed of the entries' places", "min": 0})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        if self.n > W.numel():
            raise ValueError(
                f"fourierft: n={self.n} is more than the {W.numel()} entries of the weight; choose n <= {W.numel()}"
            )
        c = torch.zeros(self.n, device=W.device)
        if W.is_meta:  # parameter counts and a checkpoint's slots come from the same lines
            return {"c": c, "E": torch.empty(self.n, dtype=torch.int32, device=W.device)}
        drawn = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(self.places))
        return {"c": c, "E": drawn[: self.n].to(W.device, torch.int32)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        c = p["c"].float() if p["c"].itemsize < 4 else p["c"]  # no FFT takes bf16
        F = torch.zeros(W.numel(), dtype=c.dtype, device=c.device).scatter(0, p["E"].long(), c)
        return (self.alpha * torch.fft.ifft2(F.view(W.shape)).real).to(p["c"].dtype)
