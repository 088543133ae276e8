"""What of PEFT's tests is left out, and what is known to fail, each with its reason."""

from __future__ import annotations

import re
from typing import NamedTuple

from bitsandbytes.functional import has_avx512bf16


class Entry(NamedTuple):
    """Tests of which `file::class::name[parameters]` matches the regex `tests`."""

    tests: str
    reason: str


LORA = "asks for LoRA's own tensors, options or methods"
HUB = "reads an adapter or a model of the hub that cannot be made here"
LEFT_OUT = [
    Entry(r"test_config.py::.*(test_from_pretrained|cache_dir|with_runtime_config)\[", HUB),
    Entry(r"weight_conversion|prefix_removal|stable_diffusion|OfflineMode", HUB),
    Entry(r"target_parameters|TestLowLevelFunctional|named_like_peft_prefix|missing_keys_warning", LORA),
    Entry(r"TestLowCpuMemUsage::test_get_peft_model", LORA),
    Entry(
        r"TestLowCpuMemUsage::test_mixed|\[PeftMixedModel\]", "PEFT's mixed models are a closed list of its own methods"
    ),
]
FAILS = [
    Entry(
        r"TestRequiresGrad::test_loading_model_",
        "loads an adapter on a base with other random weights, which we refuse by its seal",
    ),
    Entry(
        r"parameters_after_loading_model\[(dota (?!layer norm|Conv1D|tokens)|(lorta|lora_ga|lora_one|deep_lora) both)",
        "trains a product of five factors, of three, or of two from gradients, at a rate of 0.5 until it is NaN, "
        "which we refuse to load; for such methods of its own PEFT lowers the rate by their names",
    ),
    Entry(
        r"test_disable_adapters(_with_merging)?\[lora_one",
        "asks for the outputs of the base model before the first step; LoRA-One begins a step of full fine-tuning away "
        "from it, as its paper does, and for such a method of its own (DEFT's PaRa) PEFT's test passes over that line",
    ),
    Entry(
        r"test_disable_adapters(_with_merging)?\[kasa",
        "asks for the outputs of the base model before the first step; KaSA cuts the minor components off first, as "
        "its paper does, and PEFT's test passes over its own KaSA for the same reason",
    ),
    Entry(
        r"only_params_are_updated\[hira (Conv1D|tokens)",
        "asks that three steps at a rate of 0.5 move parameters by more than 1e-4; the gradients have the weight as a "
        "factor, and PEFT's Conv1D starts at 0.02; for its own HiRA PEFT raises the rate to 100",
    ),
    Entry(
        r"merge_layers_multi\[hira",
        "asks that two random adapters move outputs by 1e-3 apart; HiRA's change has the weight as a factor, and "
        "PEFT's small models have weights of 0.02; PEFT does not run its own HiRA through this test",
    ),
    Entry(
        r"only_params_are_updated\[psoft (Conv1D|tokens)",
        "asks that each tensor move; the weight has one row, so r = 1, and a rotation of one dimension has no numbers",
    ),
    Entry(
        r"only_params_are_updated\[oplora layer norm",
        "asks that three steps at a rate of 0.5 move all parameters by more than 1e-4; B starts at 0 between two "
        "projections, and A moves by the square of the rate: on some draws by less (at 50 on all of them: "
        "tests/methods/test_peft_suite_reasons.py); for GLoRA, which starts at 0 too, PEFT raises the rate to 50",
    ),
    Entry(
        r"layer_indexing\[(.*-)?lorta",
        "counts the parameters of one layer and of all; in LoRTA all layers share theirs, and of methods that share "
        "PEFT's own test passes over those that it knows (VBLoRA, VeRA, UniLora)",
    ),
    Entry(
        r"(only_params_are_updated|save_load_roundtrip)\[peanut (Conv1D|tokens)",
        "asks that three steps at a rate of 0.5 move parameters by more than 1e-4; PEANuT's gradients have the weight "
        "as a factor, A's twice, and PEFT's Conv1D starts at 0.02: with weights 50 times as large they move, but where "
        "the only ReLU of a weight of one row is off (tests/methods/test_peft_suite_reasons.py); PEFT raises the rate "
        "to 100 for HiRA, whose gradient has the weight as a factor too",
    ),
    Entry(
        r"fsdp_wrapped_learnable_bias\[bias_peft_method_only-bat_col the other",
        "compares log-probabilities near 0 to a hundred-thousandth of themselves, with and without FSDP: under it W x "
        "and ΔW x are added, else (W + ΔW) x is one product, and one rounding of logits of about 10 is more than that",
    ),
]
if has_avx512bf16():
    FAILS.append(
        Entry(
            r"test_forward_changes_output\[inlay.*bnb_4bit",
            "runs the 4-bit base before it is adapted: on a CPU with AVX-512 bf16 bitsandbytes repacks the weights "
            "then and no longer reads them back right, which we refuse",
        )
    )


def find(table: list[Entry], nodeid: str) -> str | None:
    """The reason of the first entry that matches."""
    return next((entry.reason for entry in table if re.search(entry.tests, nodeid)), None)
