"""The loss of a step and of an evaluation: of labelled tokens alone, as trl computes it, whatever the batch."""

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from inlay.host.config import InlayConfig
from inlay.models.scored_positions import logits_at
from inlay.training.trainers.labelled_head import PER_TOKEN, score_labelled_positions
from inlay.training.trainers.trainer import PlainTrainer, PreferenceTrainer, TargetTrainer, Trainer

LENGTHS = ((9, 1), (4, 12), (6, 3), (20, 2), (3, 5), (7, 30), (5, 2), (8, 8))  # of prompts and answers, in tokens


@pytest.fixture(scope="module")
def gemma_original():
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=128, max_position_embeddings=64, final_logit_softcapping=3.0, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture
def models(llama, gpt2, gemma_original):
    return {"llama": llama, "gpt2": gpt2, "gemma": copy.deepcopy(gemma_original)}


def rows() -> list[dict]:
    """Rows of the lengths above as token ids, the answers labelled."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (a + b,), generator=made).tolist() for a, b in LENGTHS]
    return [{"input_ids": row, "labels": [-100] * a + row[a:]} for row, (a, _) in zip(ids, LENGTHS, strict=True)]


def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in examples)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([r[k] + [f] * (longest - len(r[k])) for r in examples]) for k, f in fill.items()}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def scored(model, batch) -> tuple:
    """The outputs of trl's head, and the gradient of a loss that reads two of them."""
    output = model(**batch, fused_lm_head=True)
    (output.log_probs.sum() - 0.1 * output.entropy.sum()).backward()
    slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, slopes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "prompt"])
def test_the_head_at_labelled_positions_is_trls_at_all_of_them(kind, models):
    """With its gradients; tied to the embedding (GPT-2), soft-capped (Gemma), behind a prompt that is learned."""
    base = models["llama" if kind == "prompt" else kind]
    model = base
    if kind == "prompt":
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    add_fused_lm_head(base, outputs=PER_TOKEN)
    batch = padded(rows())
    whole, slopes = scored(model, batch)
    score_labelled_positions(base)
    output, found = scored(model, batch)
    for name in (*PER_TOKEN, "label_mask", "loss"):
        torch.testing.assert_close(getattr(output, name), getattr(whole, name), msg=name)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5, msg=name)


def operations(model, batch) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch, fused_lm_head=True)
    return counter.get_total_flops()


def test_the_head_sees_no_other_positions(llama):
    add_fused_lm_head(llama)
    batch, labelled = padded(rows()), sum(answer for _, answer in LENGTHS)
    before = operations(llama, batch)
    score_labelled_positions(llama)
    hidden, vocabulary, (count, length) = 64, 128, batch["labels"].shape
    spared = count * (length - 1) - labelled
    assert before - operations(llama, batch) == 2 * hidden * vocabulary * spared


def test_a_batch_without_a_label_has_a_loss_of_zero_and_gradients_of_zero(llama):
    add_fused_lm_head(llama)
    score_labelled_positions(llama)
    batch = padded(rows())
    batch["labels"].fill_(-100)
    output = llama(**batch, fused_lm_head=True)
    output.log_probs.sum().backward()
    assert output.loss.item() == 0.0
    assert not output.label_mask.any()
    assert not llama.lm_head.weight.grad.any()


def test_without_the_fused_head_a_model_is_as_before(llama):
    batch = padded(rows())
    expected = llama(**batch)
    add_fused_lm_head(llama)
    score_labelled_positions(llama)
    found = llama(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    shifted = llama(**{**batch, "labels": None}, shift_labels=batch["labels"], fused_lm_head=True)  # as trl takes it
    assert shifted.log_probs.shape == batch["labels"].shape
    prompt = {"input_ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 4, "do_sample": False}
    assert llama.generate(**prompt).shape == (1, 7)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "prompt", "other"])
@torch.no_grad()
def test_logits_at_positions_are_those_of_all(kind, models):
    """Also of a model whose backbone does not give what the hook looks for."""
    model = models.get(kind, models["llama"])
    if kind == "prompt":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = padded(rows())
    chosen = batch.pop("labels") != -100
    expected = model(**batch).logits[:, -chosen.shape[1] :][chosen]
    if kind == "other":
        model.base_model_prefix = "none"
    torch.testing.assert_close(logits_at(model, chosen, **batch), expected)
    assert model(**batch).logits.dim() == 3
    assert model(**batch).logits.shape[0] == len(LENGTHS)


ADAPTER = InlayConfig(method="bone", args={"r": 4}, target_modules="all-linear", task_type="CAUSAL_LM")
ARGUMENTS = {
    "per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_length": 64, "gradient_checkpointing": False,
    "dataloader_pin_memory": False, "seed": 1, "bf16": False,
}  # fmt: skip


def curve(kind, config, model, tokenizer, examples, folder, **more) -> tuple[list[dict], dict]:
    """The logged rows of three steps, and what they trained."""
    arguments = config(output_dir=str(folder), **{**ARGUMENTS, **more})
    data = Dataset.from_list(examples)
    options = {"args": arguments, "train_dataset": data, "processing_class": tokenizer, "peft_config": ADAPTER}
    trainer = kind(copy.deepcopy(model), **options)
    trainer.train()
    kept = [row for row in trainer.state.log_history if "loss" in row]
    return kept, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_alike(ours, theirs) -> None:
    for row, other in zip(ours[0], theirs[0], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    for name, weight in ours[1].items():
        torch.testing.assert_close(weight, theirs[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 2},
        {"packing": True, "max_length": 48, "per_device_train_batch_size": 1},
        {"label_smoothing_factor": 0.1},
        pytest.param({"loss_type": "dft"}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt2", "gemma"))])
@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
def test_steps_are_those_of_trl(kind, more, models, small_tokenizer, tmp_path):
    """Losses, accuracies, entropies and what is trained, with losses over all micro-batches of a step."""
    run = partial(
        curve, config=SFTConfig, model=models[kind], tokenizer=small_tokenizer, examples=rows(), folder=tmp_path
    )
    ours, theirs = run(Trainer, **more), run(SFTTrainer, **more)
    assert {"loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens"} <= ours[0][0].keys()
    assert_alike(ours, theirs)


class TokenDPOTrainer(DPOTrainer):
    """trl's, for rows of tokens."""

    _prepare_dataset = PreferenceTrainer._prepare_dataset


def test_steps_of_preferences_are_those_of_trl(llama, small_tokenizer, tmp_path):
    answers = [row["input_ids"][-answer:] for row, (_, answer) in zip(rows(), LENGTHS, strict=True)]
    examples = [
        {"prompt_ids": row["input_ids"][:prompt], "chosen_ids": answers[i], "rejected_ids": answers[i - 1]}
        for i, (row, (prompt, _)) in enumerate(zip(rows(), LENGTHS, strict=True))
    ]
    run = partial(curve, config=DPOConfig, model=llama, tokenizer=small_tokenizer, examples=examples, folder=tmp_path)
    ours, theirs = run(PreferenceTrainer), run(TokenDPOTrainer)
    assert {"rewards/margins", "logits/chosen", "mean_token_accuracy"} <= ours[0][0].keys()
    assert_alike(ours, theirs)


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
@torch.no_grad()
def test_held_out_loss_is_the_mean_over_answer_tokens(llama, small_tokenizer, tmp_path):
    """Whatever the batch, and without the label smoothing of training; so is the accuracy."""
    arguments = partial(SFTConfig, str(tmp_path), **ARGUMENTS, label_smoothing_factor=0.1)
    data = Dataset.from_list(rows())
    found = [
        Trainer(
            llama,
            args=arguments(per_device_eval_batch_size=n),
            train_dataset=data,
            eval_dataset=data,
            processing_class=small_tokenizer,
        ).evaluate()
        for n in (1, 3, 12)
    ]
    batch = padded(rows())
    chosen = batch["labels"][:, 1:] != -100
    logits, labels = llama(**batch).logits[:, :-1][chosen].double(), batch["labels"][:, 1:][chosen]
    spread = torch.softmax(logits, -1)
    expected = {
        "eval_loss": -spread.log().gather(1, labels[:, None]).mean().item(),
        "eval_mean_token_accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "eval_entropy": -(spread * spread.log()).sum(-1).mean().item(),
    }
    for one in found:
        assert {name: one[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert one["eval_loss"] == pytest.approx(found[0]["eval_loss"], abs=1e-6)


T5_SIZES = {"vocab_size": 128, "decoder_start_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1,
            "num_heads": 2, "dropout_rate": 0.0}  # fmt: skip
SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def one_step(kind: str, batch: int, parts: int, tokenizer, folder) -> tuple[dict, dict]:
    """What a step over eight examples logs, and what it trained, by plain gradient descent."""
    torch.manual_seed(0)
    examples = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(rows())]
    trainer, collate, pad = PlainTrainer, DataCollatorWithPadding(tokenizer), tokenizer.pad_token_id
    if kind in ("t5", "smoothed"):
        model = T5ForConditionalGeneration(T5Config(**T5_SIZES))
        examples = [{**row, "labels": [t for t in row["labels"] if t != -100]} for row in rows()]
        trainer, collate = TargetTrainer, DataCollatorForSeq2Seq(tokenizer)
    elif kind == "regression":
        model = LlamaForSequenceClassification(
            LlamaConfig(num_labels=1, problem_type="regression", pad_token_id=pad, **SIZES)
        )
        examples = [{**row, "labels": float(row["labels"])} for row in examples]
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(num_labels=3, pad_token_id=pad, **SIZES, **STILL))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(num_labels=3, pad_token_id=pad, **SIZES))
    plain = {key: value for key, value in ARGUMENTS.items() if key not in ("max_length", "max_steps")}
    more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "optim": "sgd", "max_steps": 1}
    more |= {"label_smoothing_factor": 0.1} if kind == "smoothed" else {}
    arguments = TrainingArguments(str(folder), **{**plain, **more}, train_sampling_strategy="sequential")
    data = Dataset.from_list(examples)
    run = trainer(model, args=arguments, train_dataset=data, data_collator=collate)
    run.train()
    return run.state.log_history[0], {n: p.detach() for n, p in run.model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["t5", "smoothed", "bert", "llama", "regression"])
def test_a_step_of_micro_batches_is_that_of_one_batch(kind, small_tokenizer, tmp_path):
    """Also where a model's loss is the mean of a batch although it takes the count of a whole step."""
    row, expected = one_step(kind, 8, 1, small_tokenizer, tmp_path)
    for batch, parts in ((4, 2), (2, 4)):
        again, found = one_step(kind, batch, parts, small_tokenizer, tmp_path)
        assert [again[k] for k in ("loss", "grad_norm")] == pytest.approx([row[k] for k in ("loss", "grad_norm")], 1e-4)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_held_out_loss_of_summaries_is_the_mean_over_target_tokens(small_tokenizer, tmp_path):
    model = T5ForConditionalGeneration(T5Config(**T5_SIZES)).eval()
    plain = {key: value for key, value in ARGUMENTS.items() if key != "max_length"}
    arguments = partial(TrainingArguments, str(tmp_path), **plain, label_smoothing_factor=0.1)
    targets = [[token for token in row["labels"] if token != -100] for row in rows()]
    examples = [{**row, "labels": target} for row, target in zip(rows(), targets, strict=True)]
    found = [
        TargetTrainer(
            model,
            args=arguments(per_device_eval_batch_size=n),
            eval_dataset=Dataset.from_list(examples),
            data_collator=DataCollatorForSeq2Seq(small_tokenizer),
        ).evaluate()["eval_loss"]
        for n in (1, 3, 12)
    ]
    losses = [
        (model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item(), target)
        for row, target in zip(examples, targets, strict=True)
    ]
    total = sum(loss * len(target) for loss, target in losses) / sum(map(len, targets))
    assert found == [pytest.approx(total, abs=1e-6)] * 3
