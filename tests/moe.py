"""Small models with fused experts, and adapters on these, for tests of several folders."""

import torch
import transformers
from contract import BY_NAME
from peft import PeftModel, get_peft_model
from sizes import sized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

import inlay
from inlay.host.config import InlayConfig
from inlay.host.experts import InlayExperts

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
         "vocab_size": 48, "max_position_embeddings": 32, "num_experts_per_tok": 2}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)


def mixtral(implementation="grouped_mm", dtype=torch.float32, **more) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**{**SMALL, **more}, intermediate_size=24, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation).eval()
    for p in model.parameters():
        p.data.mul_(5)  # so that experts differ, and answers with them
    return model


def config(name="pissa", size=4, **more) -> InlayConfig:
    return InlayConfig(**{"method": name, "args": sized(name, size), "target_modules": [], "experts": True, **more})


def adapt(model: nn.Module, name="pissa", **more) -> PeftModel:
    model = get_peft_model(model, config(name, **more)).eval()
    if BY_NAME[name].method.needs:
        batches = [{"x": torch.arange(48 * 4).remainder(48).view(16, 12)}] * 2
        inlay.calibrate(model, batches, loss=lambda m, b: m(b["x"]).logits.float().square().mean())
    return model


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def wander(model: nn.Module, size=0.05) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=size)


def layers(model: nn.Module) -> dict[str, InlayExperts]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, InlayExperts)}


MORE = {"moe_intermediate_size": 24, "intermediate_size": 24}
ARCHITECTURES = {  # of transformers, each with what its configuration calls the number of experts
    "Qwen3Moe": {**MORE, "num_experts": 4},
    "GptOss": {"intermediate_size": 24, "num_local_experts": 4},
    "DeepseekV3": {
        **MORE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
        "kv_lora_rank": 8, "q_lora_rank": 8, "head_dim": 4, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
    "Olmoe": {"intermediate_size": 24, "num_experts": 4},
    "GraniteMoe": {"intermediate_size": 24, "num_local_experts": 4},
    "Llama4": {
        "intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4, "interleave_moe_layer_step": 1,
    },
}  # fmt: skip


def model_of(kind: str, implementation: str) -> nn.Module:
    made = getattr(transformers, f"{kind}TextConfig" if kind == "Llama4" else f"{kind}Config")
    torch.manual_seed(0)
    more = {"pad_token_id": 0} if kind != "Llama4" else {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    own = made(**SMALL | ARCHITECTURES[kind] | more)
    own._experts_implementation = implementation
    model = getattr(transformers, f"{kind}ForCausalLM")(own).eval()
    for n, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + ("norm" in n)
    return model
