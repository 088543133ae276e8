"""A checkpoint that is not what was saved, or a base that is not what it was cut from, is refused."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.host import seal
from inlay.host.config import InlayConfig

IDS = torch.arange(12)[None]


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, attention_bias=bias,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture
def saved(tmp_path):
    """A PiSSA adapter that is away from its start, in a folder, with its logits."""
    config = InlayConfig(method="pissa", args={"r": 4}, scale=2.0, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(str(tmp_path))
    return tmp_path, model(IDS).logits


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))


def flip(folder, tensor: str):
    """Flip the lowest bit of one number of the stored tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if tensor in name)
    tensors[name].view(torch.int32).flatten()[3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_was_saved_loads(saved):
    folder, logits = saved
    assert torch.equal(PeftModel.from_pretrained(llama(), str(folder)).eval()(IDS).logits, logits)


@pytest.mark.parametrize("tensor", ["inlay_A", "inlay_B", "inlay_start_A"])
def test_a_flipped_bit_is_refused(saved, tensor):
    flip(saved[0], tensor)
    with pytest.raises(ValueError, match="not those it was saved with"):
        PeftModel.from_pretrained(llama(), str(saved[0]))


def spoiled(how):
    def change(tensors, name):
        tensors[name] = how(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoiled(lambda t: t + 1), "not those it was saved with"),
        (spoiled(lambda t: t * torch.nan), "holds NaN or Inf"),
        (spoiled(lambda t: t[:-1]), "has shape"),
    ],
)
@pytest.mark.parametrize("beside", ["lm_head", "bias"])
def test_what_an_adapter_holds_beside_its_own_tensors_is_sealed_too(beside, change, says, tmp_path):
    """Seals of before they were are as good as they were."""
    whole = {"modules_to_save": ["lm_head"]} if beside == "lm_head" else {"bias": "all"}
    model = get_peft_model(llama(bias=True), InlayConfig(method="bone", target_modules=["q_proj"], **whole)).eval()
    nn.init.normal_(next(p for n, p in model.named_parameters() if p.requires_grad and beside in n))
    model.save_pretrained(str(tmp_path))
    logits = PeftModel.from_pretrained(llama(bias=True), str(tmp_path)).eval()(IDS).logits
    assert torch.equal(logits, model(IDS).logits)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if beside in name))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says):
        PeftModel.from_pretrained(llama(bias=True), str(tmp_path))
    if says.startswith("not those"):
        found = json.loads((tmp_path / "adapter_config.json").read_text())["seals"]
        edit(tmp_path, seals={name: own for name, own in found.items() if name != "*"})
        PeftModel.from_pretrained(llama(bias=True), str(tmp_path))


@pytest.mark.parametrize("lost", ["all", "one"])
def test_a_seal_that_is_taken_away_is_missed(saved, lost):
    found = json.loads((saved[0] / "adapter_config.json").read_text())["seals"]
    edit(saved[0], seals={} if lost == "all" else {name: own for name, own in found.items() if "q_proj" not in name})
    with pytest.raises(ValueError, match="q_proj: the adapter's tensors are not those"):
        PeftModel.from_pretrained(llama(), str(saved[0]))


def test_a_flipped_bit_is_refused_by_transformers_too(saved):
    flip(saved[0], "inlay_B")
    model = llama()
    model.load_adapter(str(saved[0]))
    with pytest.raises(ValueError, match="not those it was saved with"):
        model(IDS)


@pytest.mark.parametrize("change", [{"scale": 1.0}, {"args": {"r": 5}}, {"method": "milora"}, {"dropout": 0.5}])
def test_an_edited_hyperparameter_is_refused_unless_one_insists(saved, change):
    edit(saved[0], **change)
    with pytest.raises(ValueError, match="edited after it was saved"):
        PeftModel.from_pretrained(llama(), str(saved[0]))
    edit(saved[0], hyperparameters="gone")
    if "scale" in change:
        PeftModel.from_pretrained(llama(), str(saved[0]))


def test_another_base_is_refused_unless_one_insists(saved):
    with pytest.raises(ValueError, match="cut from another base model"):
        PeftModel.from_pretrained(llama(seed=1), str(saved[0]))
    config = InlayConfig.from_pretrained(str(saved[0]))
    config.seals = None
    PeftModel.from_pretrained(llama(seed=1), str(saved[0]), config=config)


def test_one_changed_number_of_the_base_is_another_base(saved):
    base = llama()
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[5, 7] += 0.5
    with pytest.raises(ValueError, match=r"down_proj: the adapter was cut from another base"):
        PeftModel.from_pretrained(base, str(saved[0]))


def test_a_mark_sees_every_number_of_a_large_weight():
    torch.manual_seed(0)
    W = torch.randn(513, 1027)  # a sample takes one number in eight
    mark = seal.of_base(W)
    for i in (0, 1, 262_147, W.numel() - 1):
        V = W.clone()
        V.view(-1)[i] = V.view(-1)[i] * 1.01
        assert seal.of_base(V) != mark
    V = W.clone()
    V[[3, 5]] = V[[5, 3]]
    assert seal.of_base(V) != mark
    whole = torch.cat([torch.zeros(3), W.flatten()]).bfloat16()
    assert seal.of_base(whole[3:].view(W.shape)) == mark  # words that start within one


def test_a_seal_of_the_sample_alone_still_counts(saved):
    """As adapters had before every number was looked at."""
    folder, logits = saved
    found = json.loads((folder / "adapter_config.json").read_text())["seals"]
    old = {m: {**s, "base": s["base"].rpartition(":")[0]} for m, s in found.items()}
    edit(folder, seals=old)
    assert torch.equal(PeftModel.from_pretrained(llama(), str(folder)).eval()(IDS).logits, logits)
    with pytest.raises(ValueError, match="cut from another base model"):
        PeftModel.from_pretrained(llama(seed=1), str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_base(saved, dtype):
    PeftModel.from_pretrained(llama(dtype=dtype), str(saved[0]))


def test_seals_hold_under_another_adapter_name_and_after_a_merge(saved, tmp_path):
    model = PeftModel.from_pretrained(llama(), str(saved[0]), adapter_name="one").eval()
    model.merge_adapter()
    model.save_pretrained(str(tmp_path / "again"))
    model.unmerge_adapter()
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "again" / "one"), adapter_name="two").eval()
    assert torch.equal(again(IDS).logits, saved[1])


def test_a_trained_state_may_be_loaded_over_a_sealed_one(saved, tmp_path):
    """As a trainer does that goes back to its best checkpoint."""
    model = PeftModel.from_pretrained(llama(), str(saved[0]), is_trainable=True)
    model.save_pretrained(str(tmp_path / "early"))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    model.save_pretrained(str(tmp_path / "late"))
    model.load_adapter(str(tmp_path / "early"), "default", is_trainable=True)
    assert torch.equal(model.eval()(IDS).logits, saved[1])


def test_a_reference_adapter_under_the_same_config_shares_the_start(saved):
    """trl's DPO copies the parameters of a loaded adapter to a second one, and not its buffers."""
    model = PeftModel.from_pretrained(llama(), str(saved[0]), is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    model.set_adapter("ref")
    assert torch.equal(model.eval()(IDS).logits, saved[1])


def test_a_layer_of_one_row_is_sealed(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 1)), InlayConfig(args={"r": 2}, target_modules=["0"]))
    model.save_pretrained(str(tmp_path))
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["seals"]) == {"0"}


def test_an_adapter_added_over_a_merged_one_is_cut_from_the_base(saved):
    config = InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"])
    alone = get_peft_model(llama(), config).state_dict()
    model = PeftModel.from_pretrained(llama(), str(saved[0]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.add_adapter("second", InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"]))
    key = "base_model.model.model.layers.0.self_attn.q_proj.inlay_A.{}.weight"
    assert torch.equal(model.state_dict()[key.format("second")], alone[key.format("default")])


def test_a_config_is_saved_the_same_however_it_came_about(tmp_path):
    """Sets have the order of their history, and it went into the file."""
    names = [f"layers.{i}.{part}" for i in range(40) for part in ("q_proj", "v_proj")]
    for folder, order in (("one", names), ("other", names[::-1])):
        InlayConfig(method="lora", target_modules=order).save_pretrained(str(tmp_path / folder))
    one, other = ((tmp_path / folder / "adapter_config.json").read_text() for folder in ("one", "other"))
    assert one == other
