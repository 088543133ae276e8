"""An adapter is saved whole or not at all, whatever is around it, and what PEFT saves along loads again."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM

import inlay
from inlay.host.adapter_state import plain_key, saved_key
from inlay.host.config import InlayConfig

TOKENS = torch.arange(24).view(2, 12)
ARGS = {"pissa": {"r": 4}, "bone": {"r": 8}}


def config(name="pissa", target_modules=("q_proj", "down_proj"), **more) -> InlayConfig:
    return InlayConfig(method=name, args=ARGS[name], target_modules=list(target_modules), **more)


@torch.no_grad()
def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move what is trained, as a training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens=TOKENS) -> torch.Tensor:
    return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("other", ["mlp", "0", "inlay_B", "model", "weight", "base_model"])
def test_an_adapter_called_like_a_module_takes_nothing_from_another(other, llama, llama_original, tmp_path):
    model = trained(get_peft_model(llama, config()))
    before = logits(model)
    model.add_adapter(other, config())
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)), before)
    model.set_adapter(other)
    after = logits(trained(model, seed=2))
    again = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / other)  # not there yet
    assert not torch.equal(logits(again), after)
    model.save_pretrained(tmp_path, selected_adapters=[other])
    for name in ("default", other):
        again = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / other, adapter_name=name)
        assert torch.equal(logits(again), after)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_undone_in_a_given_state(prefix, llama, tmp_path):
    model = trained(get_peft_model(llama, config(bias="inlay_only", modules_to_save=["lm_head"])))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "given", state_dict={f"{prefix}{k}": v for k, v in model.state_dict().items()})
    plain, given = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "given"))
    assert plain.keys() == given.keys()
    assert all(torch.equal(plain[key], given[key]) for key in plain)


def test_compiled_and_checkpointed_layers_are_saved_by_their_plain_names(llama, llama_original, tmp_path):
    for i, layer in enumerate(llama.model.layers):
        llama.model.layers[i] = torch.compile(layer, backend="eager") if i else layer
    model = trained(get_peft_model(llama, config()))
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "LlamaMLP")
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 16
    assert all(key == plain_key(key) for key in keys)
    assert all("_" not in name.split(".")[-2][:1] for name in model.peft_config["default"].seals)
    again = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    own = get_peft_model_state_dict(again)
    assert all(torch.equal(own[key], keys[key]) for key in own)


def test_a_wrapper_around_the_whole_model_serves_save_and_load(llama, llama_original):
    model = trained(get_peft_model(llama, config()))
    saved = get_peft_model_state_dict(torch.compile(model, backend="eager"))
    again = get_peft_model(copy.deepcopy(llama_original), config())
    assert not set_peft_model_state_dict(torch.compile(again, backend="eager"), saved).unexpected_keys
    assert torch.equal(logits(again), logits(model))


def test_a_state_without_some_slots_is_not_saved(llama, tmp_path):
    model = get_peft_model(llama, config())
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.down_proj.inlay_start_A" not in k}
    with pytest.raises(ValueError, match=r"would not be saved whole.*layers\.1\.mlp\.down_proj\.inlay_start_A"):
        model.save_pretrained(tmp_path, state_dict={k: v.clone() for k, v in state.items()})
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_copy_of_the_state_is_never_filled_up_from_the_model(llama, tmp_path):
    model = get_peft_model(llama, config())
    model.add_adapter("mlp", config())
    with pytest.raises(ValueError, match="name no other adapter like a module"):
        model.save_pretrained(
            tmp_path, selected_adapters=["default"], state_dict={k: v.clone() for k, v in model.state_dict().items()}
        )


SAVED = {
    "both saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings saved whole": {"modules_to_save": ["embed_tokens"]},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [90, 91]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "head adapted, tokens": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [90, 91]},
    "head adapted, embeddings saved whole": {
        "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"],
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("grown", [0, 4], ids=["as it was", "grown"])
@pytest.mark.parametrize("more", SAVED.values(), ids=SAVED)
def test_what_peft_saves_along_loads_with_difference_zero(more, grown, tied, tiny_folders, tmp_path):
    def base():
        model = AutoModelForCausalLM.from_pretrained(tiny_folders[tied])
        if grown:
            torch.manual_seed(5)
            model.resize_token_embeddings(96 + grown, mean_resizing=False)
        return model

    model = trained(get_peft_model(base(), config(task_type="CAUSAL_LM", **more)))
    tokens = torch.tensor([[3, 90, 91, 95 + grown, 5]])
    for save in (True, "auto"):
        model.save_pretrained(tmp_path / str(save), save_embedding_layers=save)
        again = PeftModel.from_pretrained(base(), tmp_path / str(save))
        assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Two random Llamas as folders, whose embeddings are tied or not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-saved")
    for tied in (False, True):
        torch.manual_seed(0)
        about = LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(about).save_pretrained(folder / str(tied))
    return {tied: folder / str(tied) for tied in (False, True)}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_grown_vocabulary_on_the_base_as_it_was_says_how_to_grow_it(tiny_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders[False])
    model.resize_token_embeddings(100, mean_resizing=False)
    model = get_peft_model(model, config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folders[False])
    with pytest.raises(ValueError, match=r"\(100, 32\), not \(96, 32\) \(first model.resize_token_embeddings\(100"):
        PeftModel.from_pretrained(base, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folders[False])
    base.resize_token_embeddings(100, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


def test_older_files_with_copies_of_what_is_saved_whole_load(llama, llama_original, tmp_path):
    model = trained(get_peft_model(llama, config(modules_to_save=["lm_head"])))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.modules_to_save.weight"] = tensors["base_model.model.lm_head.weight"].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_keys_in_a_file_have_neither_wrappers_nor_the_name():
    assert saved_key("module._orig_mod.base_model.model.a.inlay_A.foo.weight", "foo") == (
        "base_model.model.a.inlay_A.weight"
    )
    assert saved_key("base_model.model.foo.inlay_A.foo.weight", "foo") == "base_model.model.foo.inlay_A.weight"
    assert saved_key("a.inlay_A.weight.weight", "weight") == "a.inlay_A.weight"
    assert saved_key("head.modules_to_save.foo.weight", "foo") == "head.weight"
    assert saved_key("head.weight", "weight") == "head.weight"


# -- merging a weight that is not one plain tensor ----------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", ["parametrised", "old weight norm", "pruned"])
def test_a_computed_weight_is_adapted_rightly_and_never_merged(kind):
    base = Two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "parametrised":
            parametrizations.weight_norm(base.a)
        elif kind == "old weight norm":
            nn.utils.weight_norm(base.a)
        else:
            prune.l1_unstructured(base.a, "weight", amount=0.3)
    model = trained(get_peft_model(base, config("bone", target_modules=["a"])))
    x = torch.randn(3, 8)
    expected = model.base_model.model.b(
        x @ (model.base_model.model.a.base_layer.weight + model.base_model.model.a.get_delta_weight("default")).T
        + model.base_model.model.a.base_layer.bias
    )
    torch.testing.assert_close(model(x), expected)
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.model.a.merge):
        with pytest.raises(ValueError, match="weight is computed from other tensors"):
            merge()
    torch.testing.assert_close(model(x), expected)


def test_a_module_in_two_places_of_which_one_is_adapted_is_not_merged():
    base = Two()
    base.b = base.a
    model = trained(get_peft_model(base, config("bone", target_modules=["a"])))
    with pytest.raises(ValueError, match="shares its weight with another module"):
        model.merge_and_unload()


def test_a_block_in_two_places_is_merged_for_both():
    block = nn.Sequential(nn.Linear(8, 8))
    model = trained(get_peft_model(nn.Sequential(block, block), config("bone", target_modules=["0.0"])))
    x = torch.randn(3, 8)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


# -- grown vocabularies through merge and export ------------------------------------------------------------------

GROWN = {
    "not trained": {},
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [96, 97]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("more", GROWN.values(), ids=GROWN)
def test_a_grown_vocabulary_merges_and_exports(more, tied, tiny_folders, tmp_path):
    def grown():
        model = AutoModelForCausalLM.from_pretrained(tiny_folders[tied])
        torch.manual_seed(5)
        model.resize_token_embeddings(100, mean_resizing=False)
        return model

    model = trained(get_peft_model(grown(), config(task_type="CAUSAL_LM", **more)))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    if not tied and "target_modules" in more:  # PEFT then leaves the embeddings out, which grew as well
        with pytest.raises(ValueError, match=r"holds no model\.embed_tokens\.weight; save the base with the grown"):
            inlay.merge(tmp_path / "adapter", tmp_path / "merged")
        return
    tokens = torch.tensor([[3, 96, 97, 99, 5]])
    expected = logits(model, tokens)
    assert inlay.merge(tmp_path / "adapter", tmp_path / "merged").logit_error < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 100
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-5, atol=1e-5)
    inlay.export_lora(tmp_path / "adapter", tmp_path / "lora")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(grown(), tmp_path / "lora"), tokens), expected, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"grown vocabulary|which a weighted LoRA has no place for"):
        inlay.export_lora({tmp_path / "adapter": 0.5}, tmp_path / "half")


def test_tokens_beyond_the_vocabulary_are_refused_with_the_fix(tiny_folders):
    base = AutoModelForCausalLM.from_pretrained(tiny_folders[False])
    with pytest.raises(ValueError, match=r"96 is beyond the 96 tokens.*resize_token_embeddings\(98\)"):
        get_peft_model(base, config(task_type="CAUSAL_LM", trainable_token_indices=[96, 97]))


def test_an_adapter_from_before_a_start_was_redefined_is_the_same(llama, llama_original, tmp_path):
    """LaMDA's "svd" was what "svd_core" is now: what is saved are tensors, and no start is computed at a load."""
    method = {"method": "lamda", "target_modules": ["q_proj", "down_proj"]}
    model = trained(get_peft_model(llama, InlayConfig(args={"r": 4, "init": "svd_core"}, **method)))
    after = logits(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    older = InlayConfig(args={"r": 4, "init": "svd"}, **method).to_dict()
    told |= {key: older[key] for key in ("args", "hyperparameters")}
    file.write_text(json.dumps(told))
    again = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path, is_trainable=True)
    assert again.peft_config["default"].args["init"] == "svd"
    assert torch.equal(logits(again), after)
    again.save_pretrained(tmp_path / "again")
    kept, saved = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in kept)


def test_an_adapter_is_never_saved_as_a_pickle(llama, llama_original, tmp_path):
    """PEFT writes one when it is told to; the adapter that was saved there before loads on, and so does the next."""
    model = trained(get_peft_model(llama, config()))
    model.add_adapter("other", config())
    for where, names in ((tmp_path / "new", None), (tmp_path / "old", ["other"]), (tmp_path / "old", None)):
        with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle.*save without safe_serialization=False"):
            model.save_pretrained(where, safe_serialization=False, selected_adapters=names)
        assert not list(where.rglob("adapter_config.json"))
        model.save_pretrained(where)  # a newer file counts, though the pickle is there
        with pytest.raises(ValueError, match="is a pickle"):
            trained(model, seed=2).save_pretrained(where, safe_serialization=False)
        trained(model, seed=3)
        assert not torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama_original), where)), logits(model))
        model.save_pretrained(where)
        assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama_original), where)), logits(model))
        shutil.rmtree(where)
