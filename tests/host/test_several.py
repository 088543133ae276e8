"""Several adapters: each request of a batch with its own, and weighted sums as one LoRA."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_export import ARGS, IDS, adapter, base, dense, product
from transformers import AutoModelForSeq2SeqLM, T5Config

import inlay
from inlay.cli import main
from inlay.host.config import InlayConfig
from inlay.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
NAMES = [m.name for m in METHODS if not m.needs]


def crowd(model, methods=NAMES, **more) -> PeftModel:
    """A model with an adapter of each method, away from its start, named after it."""
    for i, name in enumerate(methods):
        config = InlayConfig(method=name, args=ARGS[name], **{"target_modules": "all-linear", **more})
        model = get_peft_model(model, config, name) if i == 0 else model
        model.add_adapter(name, config) if i else None
        model.set_adapter(name)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def alone(model: PeftModel, name: str, **inputs) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


def test_every_request_of_a_batch_gets_its_adapter(tiny):
    model = crowd(base(tiny))
    names = [*NAMES, "__base__", NAMES[0], "__base__"]
    ids = torch.randint(3, 400, (len(names), 12))
    model.set_adapter("bone")
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        active = model(input_ids=ids).logits
        assert torch.equal(active, alone(model, "bone", input_ids=ids))  # what was active is so again
        for i, name in enumerate(names):
            wanted = alone(model, name, input_ids=ids[i : i + 1])[0]
            torch.testing.assert_close(mixed[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_generation_with_beams_and_modules_that_were_trained_whole(tiny):
    model = crowd(base(tiny), ["bone", "pissa"], modules_to_save=["lm_head"])
    ids = torch.randint(3, 400, (3, 6))
    names = ["pissa", "__base__", "bone"]
    for beams in (1, 3):
        more = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        mixed = model.generate(input_ids=ids, adapter_names=names, **more)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    wanted = model.generate(input_ids=ids[i : i + 1], **more)
            else:
                model.set_adapter(name)
                wanted = model.generate(input_ids=ids[i : i + 1], **more)
            assert torch.equal(mixed[i], wanted[0])


def test_several_answers_to_a_request(tiny):
    model = crowd(base(tiny), ["bone", "pissa"])
    ids = torch.randint(3, 400, (2, 6))
    more = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None, "top_k": 1}
    mixed = model.generate(input_ids=ids, adapter_names=["pissa", "bone"], **more)
    for i, name in enumerate(("pissa", "bone")):
        model.set_adapter(name)
        assert torch.equal(mixed[3 * i : 3 * i + 3], model.generate(input_ids=ids[i : i + 1], **more))


def test_an_adapter_that_is_named_twice_counts_twice(tiny, tmp_path, capsys):
    D = dense(adapter(tiny, tmp_path / "a", "pissa"))
    main(["export", str(tmp_path / "a"), str(tmp_path / "l"), "--weight", "0.5", "--add", f"{tmp_path / 'a'}=0.25"])
    for name, found in product(tmp_path / "l").items():
        torch.testing.assert_close(found, 0.75 * D[name], rtol=1e-4, atol=1e-6)


def test_an_encoder_and_its_decoder(tmp_path):
    """With beams the decoder has more rows than the encoder."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = crowd(AutoModelForSeq2SeqLM.from_config(config), ["bone", "lamda"], target_modules=["q", "v", "wo"])
    ids = torch.randint(3, 60, (2, 6))
    more = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    mixed = model.generate(input_ids=ids, adapter_names=["lamda", "bone"], **more)
    for i, name in enumerate(("lamda", "bone")):
        model.set_adapter(name)
        assert torch.equal(mixed[i], model.generate(input_ids=ids[i : i + 1], **more)[0])


def test_what_a_batch_of_several_cannot_be(tiny):
    model = crowd(base(tiny), ["bone", "pissa"])
    ids = torch.randint(3, 400, (2, 6))
    for names, says in (
        (["bone", "none"], "adapter.*: none; there are"),
        (["bone"] * 3, "got 3 and 2"),
        ([], "no list"),
    ):
        with pytest.raises(ValueError, match=says):
            model(input_ids=ids, adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=ids, adapter_names=["bone", "pissa"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=ids, adapter_names=["bone", "pissa"])
    model.unmerge_adapter()
    model(input_ids=ids, adapter_names=["bone", "pissa"])


@pytest.mark.parametrize("one", ["lora", "pissa", "milora", "lamda", "bone"])
@pytest.mark.parametrize("two", ["bone", "lamda"])
def test_a_weighted_sum_is_exact(one, two, tiny, tmp_path, capsys):
    first = adapter(tiny, tmp_path / "a", one)
    torch.manual_seed(1)
    second = adapter(tiny, tmp_path / "b", two, target_modules=["q_proj", "down_proj"])
    main(["export", str(tmp_path / "a"), str(tmp_path / "l"), "--weight", "0.7", "--add", f"{tmp_path / 'b'}=-0.5"])
    assert "exact" in capsys.readouterr().out
    D, E, found = dense(first), dense(second), product(tmp_path / "l")
    assert set(found) == set(D)
    for name, change in D.items():
        wanted = 0.7 * change - (0.5 * E[name] if name in E else 0)
        assert (found[name] - wanted).norm() < 1e-5 * wanted.norm()
    loaded = PeftModel.from_pretrained(base(tiny), str(tmp_path / "l"))
    assert not torch.equal(loaded(IDS).logits, base(tiny)(IDS).logits)


def test_a_weighted_sum_with_a_full_rank_change_says_its_error(tiny, tmp_path):
    first, second = adapter(tiny, tmp_path / "a", "bat"), adapter(tiny, tmp_path / "b", "pissa")
    weights = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    with pytest.raises(ValueError, match="bat adapter has full rank"):
        inlay.export_lora(weights, tmp_path / "l")
    made = inlay.export_lora(weights, tmp_path / "l", rank=20)
    found, D, E = product(tmp_path / "l"), dense(first), dense(second)
    for name in D:
        wanted = 0.5 * D[name] + 0.5 * E[name]
        assert ((found[name] - wanted).norm() / wanted.norm()).item() == pytest.approx(made.errors[name], abs=1e-4)


def test_an_adapter_under_two_paths_counts_twice(tiny, tmp_path, monkeypatch):
    D = dense(adapter(tiny, tmp_path / "a", "pissa"))
    monkeypatch.chdir(tmp_path)
    inlay.export_lora({"a": 1.0, str(tmp_path / "a"): 1.0}, "l")
    for name, found in product(tmp_path / "l").items():
        torch.testing.assert_close(found, 2 * D[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no adapter was named"):
        inlay.export_lora({}, "m")


def test_a_weight_does_not_reach_what_was_trained_whole(tiny, tmp_path):
    adapter(tiny, tmp_path / "a", "bone", modules_to_save=["model.norm"])
    with pytest.raises(ValueError, match="a weighted LoRA has no place for"):
        inlay.export_lora({str(tmp_path / "a"): 0.5}, tmp_path / "l")


def test_a_row_of_an_adapter_that_trains_no_head_has_the_bases(tiny):
    """Only one of two adapters trains tokens."""
    model = crowd(base(tiny), ["bone", "pissa"])
    config = InlayConfig(method="lora", args={"r": 2}, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    model.add_adapter("tokens", config)
    ids = torch.randint(3, 9, (3, 6))
    with torch.no_grad():
        model(input_ids=ids, adapter_names=["tokens", "bone", "__base__"])
    biased = crowd(base(tiny), ["bone"], bias="all")
    with pytest.raises(ValueError, match="bias='none'"):
        biased(input_ids=ids, adapter_names=["bone"] * 3)
    with pytest.raises(ValueError, match="no list"):
        model(input_ids=ids, adapter_names=[["bone"], ["bone"], ["bone"]])


def test_sums_that_make_no_sense(tiny, tmp_path, capsys):
    adapter(tiny, tmp_path / "a", "bone")
    adapter(tiny, tmp_path / "whole", "bone", modules_to_save=["model.norm"])
    other = base(tiny)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    adapter(str(tmp_path / "other"), tmp_path / "b", "bone")
    capsys.readouterr()
    cases = {
        (f"{tmp_path / 'b'}=1",): "name 2 bases",
        (f"{tmp_path / 'b'}=1", "--model", tiny): "was cut from another base",
        (f"{tmp_path / 'whole'}=1",): "also trained base_model.model.model.norm.weight whole",
        (f"{tmp_path / 'a'}=nan",): "is not a finite number",
        (f"{tmp_path / 'b'}",): "write it as ADAPTER=WEIGHT",
        (f"{tmp_path / 'b'}=much",): "write it as ADAPTER=WEIGHT",
    }
    for (add, *more), says in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(["export", str(tmp_path / "a"), str(tmp_path / "l"), "--add", add, *more])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert says in said, said
        assert len(said.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "whole"), str(tmp_path / "l"), "--to", "gguf"])
    assert "which a GGUF file has no place for" in capsys.readouterr().err
    assert not (tmp_path / "l").exists()
