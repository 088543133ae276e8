"""Methods on the fused experts of mixture-of-experts models: exact starts, right gradients, files, merges, refusals."""

import contextlib
import copy
import warnings
from pathlib import Path

import pytest
import torch
from contract import BY_NAME
from moe import ARCHITECTURES, TOKENS, adapt, config, layers, logits, mixtral, model_of, wander
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import inlay
from inlay.host.experts import EXPERTS_STAY
from inlay.host.layer import PREFIX
from inlay.host.routing import busiest_experts, routed_tokens

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large

LINEAR = [name for name, row in BY_NAME.items() if not row.method.shared]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def dense(model: PeftModel, name="default") -> dict[str, Tensor]:
    """Every expert's whole weight with its change in it, by the equation: the contract's, not the library's."""
    weights = {}
    for path, layer in layers(model).items():
        method, p, p0 = layer.theta(name)
        delta = BY_NAME[method.name].delta
        W, changed = layer.matrix().detach(), []
        for e in range(len(W)):
            D = delta({k: v[e] for k, v in p.items()}, W[e])
            if p0 is not None:
                D = D - delta({k: v[e] for k, v in p0.items()}, W[e])
            changed.append(W[e] + method.s * D)
        weight = layer.base_layer.matrices(torch.stack(changed))
        head, _, last = path.rpartition(".")
        weights[f"{head}.base_layer.{last}"] = weight
    return weights


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_method_is_a_dense_change_of_each_expert(name):
    before = logits(mixtral())
    model = adapt(mixtral(), name)
    assert ((logits(model) - before).abs().max() == 0) != BY_NAME[name].method.departs
    wander(model, BY_NAME[name].stride * 30)
    y = logits(model)
    assert (y - before).abs().max() > 1e-4
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    symbols = {n.split(PREFIX)[1].split(".")[0] for n in trained}
    assert symbols == BY_NAME[name].trained or name == "dota"  # of another number of cores
    slope = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(trained.values()), slope)
    base = model.get_base_model()
    with disabled(model):
        there = {n for n, _ in base.named_parameters()}
        weights = dense(model)
        assert weights.keys() <= there
        expected = torch.func.functional_call(base, weights, (TOKENS,)).logits
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if BY_NAME[name].stops or name == "snell":  # its gradients are not those of what it computes
        return
    for own, right in zip(grads, torch.autograd.grad(expected, list(trained.values()), slope), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-3, atol=1e-3 * right.abs().max().item() + 1e-6)


@contextlib.contextmanager
def disabled(model: PeftModel):
    for layer in layers(model).values():
        layer._disable_adapters = True
    yield
    for layer in layers(model).values():
        layer._disable_adapters = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_starts_exactly_and_agrees(implementation, dtype):
    for name in ("lora", "lamda", "bat", "hira"):
        before = logits(mixtral(implementation, dtype))
        model = adapt(mixtral(implementation, dtype), name)
        assert (logits(model) - before).abs().max() == 0
        wander(model)
        y = logits(model)
        eager = mixtral("eager", dtype)
        other = adapt(eager, name)
        other.load_state_dict(model.state_dict())
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(y, logits(other), rtol=tolerance, atol=tolerance * y.abs().max().item())
        y.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lora", "pissa", "lamda", "dota", "spiel"])
def test_saved_and_loaded_to_the_bit(name, tmp_path):
    model = adapt(mixtral(), name)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].experts
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()
    with torch.no_grad():
        other = mixtral()
        other.model.layers[0].mlp.experts.down_proj[2, 1] += 1
    with pytest.raises(ValueError, match=r"experts\.down_proj: the adapter was cut from another base model"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_leaves_the_range_of_float16_is_refused_and_changes_nothing(merge):
    model = adapt(mixtral(dtype=torch.float16), "lora")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "down_proj.inlay_B" in n).fill_(1e6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"experts\.down_proj: the merged weight reaches .*, and float16 ends at 65,504"
    ):
        getattr(model, merge)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_unmerged_and_unloaded(dtype):
    base = mixtral(dtype=dtype)
    before, weights = logits(base), copy.deepcopy(base.state_dict())
    model = adapt(base, "pissa")
    wander(model)
    adapted = logits(model)
    model.merge_adapter()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(logits(model), adapted, **close)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), adapted)
    back = twin.unload()
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(v, weights[k]) for k, v in back.state_dict().items())
    whole = model.merge_and_unload()
    assert whole.state_dict().keys() == weights.keys()
    torch.testing.assert_close(logits(whole), adapted, **close)


def test_several_adapters_with_linears_beside_them(tmp_path):
    model = adapt(mixtral(), "pissa", target_modules=["q_proj"])
    start = logits(model)
    wander(model)
    first = logits(model)
    model.add_adapter("other", config("bat"))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), start)
    wander(model)
    second = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert min((both - one).abs().max() for one in (first, second)) > 1e-3
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-4)
    with inlay.scaled(model, {"default": 0.0, "other": 1.0}):
        assert torch.equal(logits(model), second)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="adapter_names: the rows of experts"):
        model(TOKENS, adapter_names=["default", "__base__"])


def test_patterns_excluded_modules_and_layers():
    chosen = adapt(
        mixtral(num_hidden_layers=2),
        patterns={r"0\.mlp\.experts\.down_proj": {"r": 2}},
        exclude_modules=["1.mlp.experts.down_proj"],
    )
    sizes = {n.removeprefix("model.layers."): layer.cuts["default"].method.r for n, layer in layers(chosen).items()}
    assert sizes == {"0.mlp.experts.gate_up_proj": 4, "0.mlp.experts.down_proj": 2, "1.mlp.experts.gate_up_proj": 4}
    few = adapt(mixtral(num_hidden_layers=2), layers_to_transform=[1])
    assert {n.split(".")[2] for n in layers(few)} == {"1"}


def test_experts_that_get_no_rows_have_no_gradient_and_the_rest_trains():
    model = adapt(mixtral(), "lora").train()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TOKENS[:1, :1], labels=None).logits.square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    A = next(p for n, p in model.named_parameters() if "down_proj.inlay_B" in n)
    assert A.grad.flatten(1).norm(dim=1).count_nonzero() == 2


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        model = adapt(mixtral(), "pissa").train()
        wander(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits(model).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_cannot_be_is_refused_by_name_and_leaves_the_model_alone():
    model = mixtral()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"experts: lorta shares .* over layers, which experts cannot hold"):
        adapt(model, "lorta")
    with pytest.raises(ValueError, match=r"patterns: 'nowhere' matches no adapted module"):
        adapt(model, patterns={"nowhere": {"r": 2}})
    assert [n for n, _ in model.named_modules()] == names
    with pytest.raises(ValueError, match="this model has no fused experts"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config())
    with pytest.raises(ValueError, match="experts='yes' is not true or false"):
        config(experts="yes")

    class Reads(nn.Module):
        def forward(self, x):
            return torch.einsum("ti,eoi->to", x, self.w)

    experts = Reads()
    experts.is_transposed, experts.w = False, nn.Parameter(torch.randn(2, 8, 4))
    strange = get_peft_model(nn.Sequential(experts), config("lora"))
    with pytest.raises(ValueError, match="read their weights through einsum, which Inlay does not know"):
        strange(torch.randn(3, 4))
    unknown = nn.ModuleDict({"experts": Reads()})
    unknown["experts"].w = nn.Parameter(torch.randn(2, 8, 4))
    with pytest.raises(ValueError, match="experts is a Reads, which is outside transformers' interface for experts"):
        get_peft_model(unknown, config("lora"))


def test_all_linear_says_once_what_it_leaves_out():
    with pytest.warns(UserWarning, match="experts=True takes the experts in") as said:
        get_peft_model(mixtral(num_hidden_layers=2), config(target_modules="all-linear", experts=False))
    assert [str(one.message) for one in said if one.category is UserWarning] == [EXPERTS_STAY]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(mixtral(), config(target_modules="all-linear"))
    assert len(layers(model)) == 2


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "GptOss" else pytest.mark.slow) for k in ARCHITECTURES]
)
def test_architectures(kind):
    for implementation in ["eager"] if kind == "Llama4" else IMPLEMENTATIONS:
        for name in ("pissa", "bat"):
            base = model_of(kind, implementation)
            before = logits(base)
            model = adapt(base, name, size=2)
            assert (logits(model) - before).abs().max() == 0, (kind, implementation, name)
            wander(model, 0.1)
            y = logits(model)
            assert (y - before).abs().max() > 1e-3
            weights = dense(model)
            trained = [p for p in model.parameters() if p.requires_grad]
            slope = torch.randn_like(y)
            grads = torch.autograd.grad(y, trained, slope)
            with disabled(model):
                expected = torch.func.functional_call(model.get_base_model(), weights, (TOKENS,)).logits
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * y.abs().max().item())
            for own, right in zip(grads, torch.autograd.grad(expected, trained, slope), strict=True):
                torch.testing.assert_close(own, right, rtol=1e-2, atol=1e-3 * right.abs().max().item() + 1e-6)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/moe.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert (tmp_path / "my-adapter/adapter_config.json").is_file()


def test_an_expert_has_a_rank_of_its_own_and_some_have_none(tmp_path):
    ranks = {r"experts\.down_proj\.1": {"r": 2}, r"experts\.down_proj": {"r": 3}}
    chosen = {"layers.0.mlp.experts": [0, 1, 3]}
    base = mixtral(num_hidden_layers=2)
    before = logits(base)
    model = adapt(base, patterns=ranks, experts=chosen)
    assert torch.equal(logits(model), before)
    wander(model)
    own = layers(model)
    assert list(own) == [f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    assert {e: m.r for e, m in own["model.layers.0.mlp.experts.down_proj"].shares["default"].methods.items()} == {
        0: 3, 1: 2, 3: 3,
    }  # fmt: skip
    shapes = {n.partition("experts.")[2]: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert shapes["gate_up_proj.inlay_A.default.weight"] == (3, 4, 16)
    assert shapes["down_proj.inlay_A.default.weight"] == (8 * 24,)
    y = logits(model)
    layer = own["model.layers.0.mlp.experts.down_proj"]
    D = layer.get_delta_weight("default")
    assert [torch.linalg.matrix_rank(own).item() for own in D] == [6, 4, 0, 6]
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtral(num_hidden_layers=2), tmp_path).eval()
    assert torch.equal(logits(loaded), y)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, rtol=1e-4, atol=1e-4)
    for wrong, says in (
        ({"no": [1]}, "'no' is none of model.layers.0.mlp.experts"),
        ({"experts": [4]}, "has no expert 4"),
    ):
        with pytest.raises(ValueError, match=says):
            adapt(mixtral(), experts=wrong)
    with pytest.raises(ValueError, match="nor numbers of experts as"):
        config(experts={"experts": 3})
    with pytest.raises(ValueError, match="matches no adapted module"):
        adapt(mixtral(), patterns={r"experts\.down_proj\.7": {"r": 2}})


def test_the_busiest_experts_are_counted_without_padding():
    base = mixtral(num_hidden_layers=2)
    name = "model.layers.1.mlp.experts"
    mask = torch.ones_like(TOKENS)
    mask[1, 5:] = 0
    counts = routed_tokens(base, [{"input_ids": TOKENS, "attention_mask": mask}])
    assert {n: own.sum().item() for n, own in counts.items()} == {name.replace("1", "0"): 34, name: 34}
    rows = []
    hook = base.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[1]))
    base(input_ids=TOKENS, attention_mask=mask)
    hook.remove()
    assert torch.equal(counts[name], rows[0][mask.flatten().bool()].flatten().bincount(minlength=4))
    chosen = busiest_experts(counts, 2)
    assert set(chosen[name]) == set(counts[name].topk(2).indices.tolist())
    model = adapt(base, experts=chosen)
    assert {
        n.removesuffix(".down_proj"): list(m.shares["default"].methods) for n, m in layers(model).items() if "down" in n
    } == chosen
    with pytest.raises(ValueError, match=r"experts=5: .* has 4 experts; choose 1 to 4"):
        busiest_experts(counts, 5)
    with pytest.raises(ValueError, match="this model has no fused experts"):
        routed_tokens(nn.Linear(2, 2), [])


@pytest.mark.parametrize("name", ["lamda", "xgblora", "spiel"])
def test_what_changes_as_training_goes_on_does_so_for_each_expert(name):
    model = adapt(mixtral(), name).train()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, steps = [], 6
    for i in range(steps):
        loss = logits(model).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        inlay.step(model, (i + 1) / steps, optimizer=adam)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in layers(model).values():
        whole, one = layer.theta("default")[1], BY_NAME[name].method
        if name == "lamda":
            assert sum(slot.parameter is None for slot in layer.slots("default").values()) > 0
        if name == "spiel":  # positions within each expert's own weight
            assert whole["eta"].shape[0] == 4
            assert whole["eta"].max() < layer.in_features * layer.out_features
        if name == "xgblora":
            assert whole["B_past"].abs().flatten(1).sum(1).count_nonzero() == 4
        assert one.name == name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_start_is_exact_under_autocast(implementation):
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(mixtral(implementation))
        for name in ("pissa", "bat"):
            model = adapt(mixtral(implementation), name)
            assert (logits(model) - before).abs().max() == 0
            logits(model).float().square().mean().backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look, where it resumes
def test_a_compiled_model_computes_the_same():
    model = adapt(mixtral(), "pissa")
    wander(model)
    y = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), y, rtol=1e-4, atol=1e-4)


def test_a_base_in_4_bits_has_its_experts_in_16_and_these_are_adapted(tmp_path):
    wide = {"hidden_size": 64, "head_dim": 32}
    mixtral(**wide).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.bfloat16).eval()
    experts = base.model.layers[0].mlp.experts
    assert experts.down_proj.dtype == torch.bfloat16
    model = adapt(base, "pissa", target_modules="all-linear")
    assert type(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    with torch.no_grad():  # bitsandbytes takes another kernel where there are gradients
        y = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), y)
    wander(model)
    assert (logits(model) - y).abs().max() > 1e-3
    logits(model).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_experts_of_a_device_map_are_adapted_and_offloaded_ones_are_refused(tmp_path):
    mixtral(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1")

    def loaded(**places):
        mapped = {**dict.fromkeys(names, "cpu"), **{f"model.layers.{n[-1]}": place for n, place in places.items()}}
        where = {"device_map": mapped, "offload_folder": tmp_path / "offload"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **where).eval()

    base = loaded(layer0="cpu")
    before = logits(base)
    model = adapt(base)
    assert torch.equal(logits(model), before)
    wander(model)
    assert not torch.allclose(logits(model), before)
    base = loaded(layer1="disk")
    torch.testing.assert_close(logits(base), before)
    with pytest.raises(ValueError, match=r"the device map keeps model\.layers\.1\.mlp\.experts off the device"):
        adapt(base)
    torch.testing.assert_close(logits(base), before)
    model = adapt(base, exclude_modules=["layers.1.mlp.experts"])
    torch.testing.assert_close(logits(model), before)
