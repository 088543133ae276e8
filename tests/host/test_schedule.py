"""A method may change what it trains as training goes on (LaMDA does): the hand-written loop, the Trainer, DDP."""

import copy
import faulthandler
import json
import math

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, InlayLinear
from inlay.host.schedule import Schedule, step
from inlay.methods.lamda import LaMDA

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAMDA = LaMDA(r=8, stages=4, eta=0.5)
TOKENS = torch.arange(24).view(2, 12)
STEPS = 10


def adapt(model: nn.Module, method=LAMDA, name: str = "default") -> PeftModel:
    return get_peft_model(model, InlayConfig(method=method, target_modules=LINEARS, task_type="CAUSAL_LM"), name)


def blocks(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """Every block of B, by its path."""
    return {k: v for k, v in model.state_dict().items() if f"{PREFIX}B_" in k and f".{name}." in k}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, pieces: int = 1) -> None:
    for piece in TOKENS.chunk(pieces):
        (model(input_ids=piece, labels=piece, use_cache=False).loss / pieces).backward()
    optimizer.step()


def frozen_names(model: nn.Module) -> set[str]:
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    return {n for n in blocks(model) if n not in trained}


def layer(model: nn.Module) -> InlayLinear:
    return next(m for m in model.modules() if isinstance(m, InlayLinear))


# The schedule itself


@pytest.mark.parametrize("stages", [1, 3, 8, 64])
@pytest.mark.parametrize("r", [1, 8, 10, 64])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_columns_follow_the_formula(r, stages, eta):
    """k = min(r, floor(r t / eta)), rounded down to a border of the blocks, never falling, complete at eta."""
    method = LaMDA(r=r, stages=stages, eta=eta)
    p = method.start(torch.empty(128, 96, device="meta"))
    widths = [v.shape[1] for k, v in p.items() if k.startswith("B_")]
    borders = [sum(widths[:i]) for i in range(len(widths) + 1)]
    assert borders[-1] == r
    assert len(widths) == min(r, stages)
    for i in range(1001):
        columns = sum(p[k].shape[1] for k in method.schedule(p, i / 1000))
        k = min(r, math.floor(r * i / 1000 / eta + 1e-6))
        assert columns == max(border for border in borders if border <= k)
    assert method.schedule(p, 0.0) == frozenset()
    assert method.schedule(p, eta) == {k for k in p if k.startswith("B_")}


def test_which_columns_freeze_first():
    first = {"largest": {"B_1"}, "smallest": {"B_4"}}
    W = torch.randn(24, 40)
    U, S, _ = torch.linalg.svd(W)
    for order, names in first.items():
        method = LaMDA(r=8, stages=4, freeze_order=order)
        p = method.start(W)
        assert method.schedule(p, 0.3 / 4) == names
        column = p[next(iter(names))][:, 0] if order == "largest" else p[next(iter(names))][:, -1]
        at = (U.T @ column).abs().argmax()
        assert at == (0 if order == "largest" else 7)
        assert S[at] == pytest.approx((S[:8].max() if order == "largest" else S[:8].min()).item())
    p = LaMDA(r=8, stages=4, init="kaiming").start(W)  # without Σ the order is that of the columns
    assert LaMDA(r=8, stages=4, init="kaiming", freeze_order="smallest").schedule(p, 0.3 / 4) == {"B_1"}


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_a_time_outside_the_training_is_refused(t, llama):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        step(adapt(llama), t)


def test_methods_without_a_schedule_are_left_alone(llama):
    model = get_peft_model(llama, InlayConfig(method="bone", target_modules=LINEARS))
    before = model.get_nb_trainable_parameters()[0]
    assert step(model, 1.0) == before == model.get_nb_trainable_parameters()[0]


# A loop written by hand


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("init", ["svd", "svd_core", "svd_zero", "kaiming"])
@pytest.mark.parametrize("pieces", [1, 2], ids=["plain", "accumulated"])
def test_frozen_columns_stay_bit_equal_and_lose_their_state(init, order, pieces, llama):
    model = adapt(llama, LaMDA(r=8, stages=4, eta=0.5, init=init, freeze_order=order))
    optimizer, kept, counts = adamw(model), {}, []
    parameters = dict(model.named_parameters())
    start = {k: v.clone() for k, v in blocks(model).items()}
    for i in range(1, STEPS + 1):
        one_step(model, optimizer, pieces)
        counts.append(step(model, i / STEPS, optimizer))
        for name in frozen_names(model) - kept.keys():
            kept[name] = blocks(model)[name].clone()
        assert all(torch.equal(blocks(model)[name], value) for name, value in kept.items())
        assert all(parameters[name].grad is None for name in kept)
        assert all(parameters[name] not in optimizer.state for name in kept)
        optimizer.zero_grad()
    layers = [m for m in model.modules() if isinstance(m, InlayLinear)]
    assert kept.keys() == blocks(model).keys()
    assert sum(not torch.equal(kept[k], start[k]) for k in kept) >= len(kept) * 0.9  # they had moved before
    assert counts[0] == sum(64 + 8 * m.out_features for m in layers)
    assert counts[-1] == sum(64 for _ in layers) == model.get_nb_trainable_parameters()[0]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 5
    assert all(state["exp_avg"].shape == (8, 8) for state in optimizer.state.values())


def test_without_the_optimizer_the_columns_stay_as_they_are_too(llama):
    model = adapt(llama)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9, weight_decay=0.5
    )
    for i in range(1, 5):
        one_step(model, optimizer)
        step(model, i / 4)
        optimizer.zero_grad(set_to_none=False)
        if i == 2:
            kept = {k: v.clone() for k, v in blocks(model).items()}
    assert all(torch.equal(blocks(model)[k], v) for k, v in kept.items())


def test_no_gradient_is_computed_for_what_is_frozen(llama):
    model = adapt(llama)
    step(model, 1.0)
    theta = layer(model).theta("default")[1]
    assert {k for k, v in theta.items() if v.requires_grad} == {"S"}
    seen = []

    def pack(t):
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(model)(torch.randn(2, 5, 64))
    assert y.requires_grad
    grads = torch.autograd.grad(y.sum(), [v for v in theta.values() if v.requires_grad])
    assert [g.shape for g in grads] == [(8, 8)]
    own = {id(t) for t in [*model.parameters(), *model.buffers()]} | {t.data_ptr() for t in model.buffers()}
    assert {tuple(t.shape) for t in seen if id(t) not in own and t.data_ptr() not in own} <= {(10, 8), (8, 8)}


def test_switching_and_disabling_do_not_thaw(llama):
    """PEFT turns gradients back on whenever adapters are switched or enabled."""
    model = adapt(llama)
    model.add_adapter("other", InlayConfig(method="bone", target_modules=LINEARS))
    optimizer = adamw(model)
    one_step(model, optimizer)
    step(model, 0.25, optimizer)
    kept = {k: blocks(model)[k].clone() for k in frozen_names(model)}
    assert len(kept) == len(blocks(model)) // 2
    with model.disable_adapter():
        model(TOKENS)
    model.set_adapter("other")
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    assert frozen_names(model) == kept.keys()
    for _ in range(2):
        one_step(model, optimizer)
    assert all(torch.equal(blocks(model)[k], v) for k, v in kept.items())


def test_only_active_adapters_follow(llama):
    model = adapt(llama)
    model.add_adapter("reference", InlayConfig(method=LAMDA, target_modules=LINEARS))
    step(model, 1.0)
    model.set_adapter("reference")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum("B_" in n for n in trained) == len(blocks(model, "reference"))


def test_a_checkpoint_in_mid_schedule_reloads_bit_equal(llama_original, tmp_path):
    model = adapt(copy.deepcopy(llama_original))
    optimizer = adamw(model)
    one_step(model, optimizer)
    step(model, 0.25, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path, is_trainable=True)
    assert all(torch.equal(v, blocks(loaded)[k]) for k, v in blocks(model).items())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)
    assert step(loaded, 0.25) == step(model, 0.25)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_in_mid_schedule(checkpointing, llama_original):
    results = []
    for on in (False, checkpointing):
        torch.manual_seed(0)
        model = adapt(copy.deepcopy(llama_original)).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = adamw(model)
        for i in range(1, 5):
            one_step(model, optimizer)
            step(model, i / 8, optimizer)
            optimizer.zero_grad()
        results.append({k: v for k, v in model.state_dict().items() if PREFIX in k})
    assert all(torch.allclose(results[0][k], results[1][k], rtol=1e-5, atol=1e-6) for k in results[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it to itself
def test_a_compiled_model_follows_its_schedule():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 24))
    x, results = torch.randn(5, 40), []
    for compiled in (False, True):
        model = get_peft_model(copy.deepcopy(net), InlayConfig(method=LAMDA, target_modules=["0"]))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = adamw(model)
        for i in range(1, 5):
            run(x).square().mean().backward()
            optimizer.step()
            step(run, i / 8, optimizer)
            optimizer.zero_grad()
        results.append([v.clone() for k, v in model.state_dict().items() if PREFIX in k])
    torch._dynamo.reset()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# transformers' Trainer


def train_arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.5, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=1, logging_steps=1, **more,
    )  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_resumes_in_mid_schedule(accumulation, llama_original, tmp_path):
    data = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(32)]
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = adapt(copy.deepcopy(llama_original))
        arguments = train_arguments(tmp_path, gradient_accumulation_steps=accumulation)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Schedule()])
        trainer.train(resume_from_checkpoint=resume)
        results.append({k: v.clone() for k, v in model.state_dict().items() if PREFIX in k})
        assert frozen_names(model) == blocks(model).keys()
        assert not any(p.grad is not None for n, p in model.named_parameters() if "B_" in n)
        assert len(trainer.optimizer.state) == 14  # S of every layer, no block of B
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    early = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / "checkpoint-2").state_dict()
    late = {k: v for k, v in results[0].items() if f"{PREFIX}B_1." in k or f"{PREFIX}B_2." in k}
    assert all(torch.equal(early[k], v) for k, v in late.items())  # half of B was frozen at step 2 of 8, eta .5
    assert any(not torch.equal(early[k], v) for k, v in results[0].items() if f"{PREFIX}B_4." in k)


def test_inlay_train_shows_the_numbers_falling(tiny, tmp_path, capsys):
    from inlay.cli import main

    rows = [{"prompt": f"Say {i}.", "completion": f"{i}!"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["train", "--model", tiny, "--data", str(tmp_path / "data.jsonl"), "--method", "lamda", "--r", "4",
          "--steps", "6", "--batch-size", "2", "--eval-size", "4", "--samples", "0", "--eta", "0.5",
          "--output", str(tmp_path / "run")])  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row["trained"] for row in metrics if "trained" in row]
    assert trained[0] > trained[-1] == 14 * 16
    assert f"{14 * 16:,} trained" in capsys.readouterr().out


# Two processes


def one_process(rank: int, folder: str, unused: bool) -> None:
    """Four steps of DDP on half of the batch each; B is frozen on the way."""
    faulthandler.dump_traceback_later(60, exit=True)  # rather than hang
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, x = small()
    model = DistributedDataParallel(model, find_unused_parameters=unused)
    optimizer = adamw(model)
    for i in range(1, 9):
        model(x[rank::2]).square().mean().backward()
        optimizer.step()
        step(model, i / 8, optimizer)
        optimizer.zero_grad()
    torch.save({k: v for k, v in model.module.state_dict().items() if PREFIX in k}, f"{folder}/{rank}.pt")
    # torch's reducer, if it outlives the group, ends gloo's threads while it holds the GIL that they may still need.
    del model
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 40)), torch.randn(8, 40)
    return get_peft_model(net, InlayConfig(method=LAMDA, target_modules=["0", "2"])), x


@pytest.mark.slow  # make test has them in tests/training/test_distributed.py
def test_two_processes_freeze_in_step(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path), True), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    model, x = small()
    optimizer = adamw(model)
    for i in range(1, 9):
        model(x).square().mean().backward()
        optimizer.step()
        step(model, i / 8, optimizer)
        optimizer.zero_grad()
    alone = {k: v for k, v in model.state_dict().items() if PREFIX in k}
    assert all(torch.allclose(one[k], v, rtol=1e-4, atol=1e-5) for k, v in alone.items())


def test_a_reference_copy_has_what_was_frozen(llama_original):
    """trl's DPO copies an adapter by its parameters; frozen blocks are buffers."""
    model = get_peft_model(copy.deepcopy(llama_original), InlayConfig(method="lamda", args={"r": 4}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    step(model, 1.0)
    ids = torch.arange(8)[None]
    logits = model.eval()(ids).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    model.set_adapter("ref")
    assert torch.equal(model(ids).logits, logits)
