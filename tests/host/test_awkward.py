"""Models that are large, or are no plain decoder: offloaded, tied, with fused experts, with encoders, with pictures."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from sizes import DEPARTS
from test_export import ARGS, IDS, base
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    MixtralConfig,
    T5Config,
    ViTConfig,
)

from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear
from inlay.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = BertConfig(vocab_size=64, num_labels=2, **SMALL)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)

every_method = pytest.mark.parametrize("method", sorted(m.name for m in METHODS if not m.needs))


def config(method: str = "bone", **more) -> InlayConfig:
    args = {"r": 4} if "r" in ARGS[method] else ARGS[method]
    return InlayConfig(method=method, args=args, **more)


def moved(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


ON_DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@every_method
def test_a_model_whose_second_half_is_on_the_disk(method, tiny, tmp_path, monkeypatch):
    """It starts, it reloads, and it says how to merge."""
    monkeypatch.chdir(tmp_path)  # PEFT writes copies under it
    wanted = moved(get_peft_model(base(tiny), config(method, target_modules="all-linear", task_type="CAUSAL_LM")))
    wanted.save_pretrained(str(tmp_path / "a"))

    def offloaded():
        return AutoModelForCausalLM.from_pretrained(tiny, device_map=ON_DISK, offload_folder=tmp_path / "o")

    fresh = get_peft_model(offloaded(), config(method, target_modules="all-linear")).eval()
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, base(tiny)(IDS).logits) != (method in DEPARTS)
        devices = {f"base_model.model.{k}": v for k, v in ON_DISK.items()}
        loaded = PeftModel.from_pretrained(
            offloaded(), str(tmp_path / "a"), device_map=devices, offload_folder=str(tmp_path / "p")
        )
        torch.testing.assert_close(loaded.eval()(IDS).logits, wanted(IDS).logits, rtol=1e-5, atol=1e-5)
    assert {layer.base_layer.weight.device.type for layer in layers(loaded)} == {"cpu", "meta"}
    for merge in (loaded.merge_adapter, loaded.merge_and_unload):
        with pytest.raises(ValueError, match=r"is kept on the disk; inlay\.merge merges from file to file"):
            merge()


def layers(model) -> list[InlayLinear]:
    return [m for m in model.modules() if isinstance(m, InlayLinear)]


HEADS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "classifier"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "classifier"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
}


@every_method
@pytest.mark.parametrize("task", sorted(HEADS))
def test_an_encoder_with_a_head(task, method, tmp_path):
    """PEFT trains the head whole, whichever of its names a model has; both come back."""
    cls, head = HEADS[task]
    torch.manual_seed(0)
    cls.from_config(BERT).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        cls.from_pretrained(tmp_path / "base"), config(method, task_type=task, target_modules=["query", "value"])
    )
    assert any(head in name and p.requires_grad for name, p in model.named_parameters())
    moved(model).save_pretrained(str(tmp_path / "a"))
    loaded = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), str(tmp_path / "a")).eval()
    one, two = loaded(IDS), model(IDS)
    for name in ("logits", "start_logits", "end_logits"):
        assert torch.equal(getattr(one, name, torch.zeros(1)), getattr(two, name, torch.zeros(1)))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS)[0], two[0], rtol=1e-4, atol=1e-5)


@every_method
def test_an_encoder_and_a_decoder(method, tmp_path):
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(T5).save_pretrained(tmp_path / "base")
    start = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"),
        config(method, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi", "wo"]),
    ).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :8]}
    if method not in DEPARTS:
        torch.testing.assert_close(model(**inputs).logits, start(**inputs).logits, rtol=1e-5, atol=1e-5)
    moved(model).save_pretrained(str(tmp_path / "a"))
    loaded = PeftModel.from_pretrained(start, str(tmp_path / "a")).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_head_that_was_mistyped_is_still_named():
    model = AutoModelForSequenceClassification.from_config(BERT)
    with pytest.raises(ValueError, match="modules_to_save: 'clasifier' matches no module"):
        get_peft_model(model, config(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["clasifier"]))


def test_fused_experts_are_named_when_they_are_asked_for():
    def model():
        more = {"vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
        return AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, **more))

    with pytest.warns(UserWarning, match="the experts of this model stay frozen, and its routers") as said:
        whole = get_peft_model(model(), config(target_modules="all-linear"))
    assert len([one for one in said if one.category is UserWarning]) == 1
    assert {n.rpartition(".")[2] for n, m in whole.named_modules() if isinstance(m, InlayLinear)} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    says = (
        r"here: k_proj, lm_head, o_proj, q_proj, v_proj \(down_proj, gate_up_proj hold all experts in one tensor; exp"
    )
    with pytest.raises(ValueError, match=says):
        get_peft_model(model(), config(target_modules=["q_proj", "w1"]))
    with pytest.raises(ValueError, match="is a MixtralExperts, which Inlay does not adapt"):
        get_peft_model(model(), config(target_modules=["experts"]))
    with pytest.raises(ValueError, match="experts=True"):
        config(target_parameters=["mlp.experts.gate_up_proj"])


def test_a_vision_tower(tmp_path):
    def model():
        torch.manual_seed(0)
        return AutoModelForImageClassification.from_config(ViTConfig(image_size=32, patch_size=8, **SMALL)).eval()

    with pytest.raises(ValueError, match=r"projection is a Conv2d, which Inlay does not adapt; target nn\.Linear"):
        get_peft_model(model(), config(target_modules=["projection"]))
    adapted = get_peft_model(model(), config(target_modules="all-linear", modules_to_save=["classifier"])).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapted(pixel_values=pixels).logits, model()(pixel_values=pixels).logits)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_embedding_is_refused_and_a_head_is_not(tiny):
    with pytest.raises(ValueError, match="embed_tokens is a Embedding, which Inlay does not adapt"):
        get_peft_model(base(tiny), config(target_modules=["embed_tokens"]))
    model = get_peft_model(base(tiny), config(target_modules=["lm_head"])).eval()
    assert torch.equal(model(IDS).logits, base(tiny)(IDS).logits)
    before = model.get_input_embeddings()(IDS)
    logits = moved(model)(IDS).logits
    assert torch.equal(model.get_input_embeddings()(IDS), before)  # tied, and still the base's
    assert not torch.equal(logits, base(tiny)(IDS).logits)
