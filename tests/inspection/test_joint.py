"""One right factor for layers that read the same input: how much it carries."""

import json

import pytest
import torch
from helpers import fails
from transformers import AutoModelForCausalLM

from inlay.cli import main
from inlay.inspection.joint_factors import joint_groups
from inlay.models.base import BaseModel


def test_the_shares_are_those_of_a_dense_svd(tiny):
    found = joint_groups(BaseModel(tiny))
    names = [tuple(name.removeprefix("model.layers.") for name in group.modules) for group in found]
    assert names == [
        group
        for i in (0, 1)
        for group in (
            tuple(f"{i}.self_attn.{k}_proj" for k in "qkv"),
            (f"{i}.mlp.gate_proj", f"{i}.mlp.up_proj"),
        )
    ]
    weights = dict(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).named_parameters())
    for group in found:
        Ws = [weights[f"{name}.weight"].detach() for name in group.modules]
        stack = torch.cat(Ws)
        for r in (1, 5, 40):
            C = torch.linalg.svd(stack, full_matrices=False).Vh[:r]
            kept = 1 - ((stack - stack @ C.T @ C).norm() / stack.norm()).item() ** 2
            own = sum(torch.linalg.svdvals(W)[:r].square().sum() for W in Ws) / stack.square().sum()
            assert group.shared(r) == pytest.approx(kept, abs=1e-6)
            assert group.separate(r) == pytest.approx(own.item(), abs=1e-6)
            assert group.shared(r) <= group.separate(r) + 1e-9
            outs, less = [len(W) for W in Ws], group.as_many(r)
            numbers = [sum(less_or_more * (64 + out) for out in outs) for less_or_more in (less, less + 1)]
            assert numbers[0] <= r * (64 + sum(outs)) < numbers[1]


def test_the_table(tiny, capsys):
    main(["inspect", tiny, "--joint", "--r", "8"])
    said = capsys.readouterr().out
    assert "q_proj, k_proj, v_proj (2)" in said
    assert "gate_proj, up_proj (2)" in said


def test_the_file_holds_the_table_and_more(tiny, tmp_path, capsys):
    arguments = ["inspect", tiny, "--joint", "--r", "8", "--output", str(tmp_path / "j")]
    main(arguments)
    assert f"written to {tmp_path / 'j'}" in capsys.readouterr().out
    (file,) = (tmp_path / "j").iterdir()
    about = json.loads(file.read_text())
    assert (about["model"], about["r"], len(about["groups"])) == (tiny, 8, 4)
    first, stacked = about["groups"][0], torch.tensor(about["groups"][0]["singular_values"]).square()
    assert first["modules"][0] == "model.layers.0.self_attn.q_proj"
    assert first["shared"] == pytest.approx((stacked[:8].sum() / stacked.sum()).item(), abs=1e-5)
    assert first["shared"] < first["separate"]
    assert "exists" in fails(capsys, *arguments)
    main([*arguments, "--overwrite", "--layers", "0", "--target-modules", "q_proj,k_proj"])
    assert len(json.loads(file.read_text())["groups"]) == 1


@pytest.mark.parametrize("more", [("--method", "lora"), ("--direction", "peaked")])
def test_what_allocates_ranks_is_refused(more, tiny, capsys):
    assert f"which {more[0]} is for; leave out one" in fails(capsys, "inspect", tiny, "--joint", *more)


def test_layers_of_which_no_two_read_one_input(gpt2_original, tmp_path, capsys, small_tokenizer):
    gpt2_original.save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path), "--joint"])
    assert stop.value.code == 2
    assert "no two of the modules" in capsys.readouterr().err
