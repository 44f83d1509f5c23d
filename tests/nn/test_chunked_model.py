"""Models of transformers compute the same loss and gradients without all the logits at once."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tests.nn.live import LiveBytes
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import gradpress
from gradpress.nn import chunk_loss_

SIZES = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def gemma():
    """Soft-capped logits and a shared weight."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0))


def cohere():
    """Scaled logits."""
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5))


def mixtral():
    """A second loss, of the routers."""
    own = {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **own))


def gpt2():
    own = {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**own, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


MODELS = [
    llama,
    functools.partial(llama, tie_word_embeddings=True),
    functools.partial(llama, attention_bias=True),
    gemma,
    cohere,
    mixtral,
    gpt2,
]


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(97, (3, 11), generator=g)
    labels = tokens.clone()
    labels[0, 5:] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def outcome(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}, {"shift": True}],
)
def test_same_loss_and_gradients(make, options):
    torch.manual_seed(0)
    model = make()
    inputs = {**batch(), **options}
    if inputs.pop("shift", False):
        inputs["shift_labels"] = inputs["labels"].roll(-2, 1)
    want, gradients = outcome(model, **inputs)
    gradients = {name: grad.clone() for name, grad in gradients.items()}
    handle = chunk_loss_(model, chunk_tokens=7)
    got, ours = outcome(model, **inputs)
    assert got.logits is None
    assert type(got) is type(want)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    assert ours.keys() == gradients.keys()
    for name, grad in gradients.items():
        # Sums of float32 in another order.
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.shape == (3, 11, 97)
    handle.remove()
    again, _ = outcome(model, **inputs)
    torch.testing.assert_close(again.logits, want.logits, rtol=0, atol=0)


def test_other_outputs_tuples_and_generation():
    torch.manual_seed(0)
    model = llama().eval()
    inputs = batch()
    want = model(**inputs, output_hidden_states=True)
    prompt = inputs["input_ids"][:, :4]
    text = model.generate(prompt, max_new_tokens=3, do_sample=False)
    with chunk_loss_(model):
        got = model(**inputs, output_hidden_states=True)
        assert len(got.hidden_states) == 3
        torch.testing.assert_close(got.loss, want.loss)
        loss, *others = model(**inputs, return_dict=False)
        torch.testing.assert_close(loss, want.loss)
        assert not any(type(value).__name__ == "DeferredLogits" for value in others)
        assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), text)
        position = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
        torch.testing.assert_close(position.loss, want.loss)
    assert model(**inputs).logits is not None


def test_after_an_error_the_head_is_a_head_again():
    model = llama()
    chunk_loss_(model)
    wrong = {**batch(), "labels": torch.full((3, 11), 97)}
    with pytest.raises(IndexError, match="labels must be at least 0 and below 97"):
        model(**wrong)
    assert model(batch()["input_ids"]).logits.shape == (3, 11, 97)
    assert "forward" not in model.lm_head.__dict__


def test_copies_have_a_loss_of_their_own():
    torch.manual_seed(0)
    model = llama()
    chunk_loss_(model, chunk_tokens=5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(**batch()).loss.detach()) == pytest.approx(torch.tensor(97.0).log().item())
    assert model(**batch()).loss != twin(**batch()).loss
    assert twin(**batch()).logits is None


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_heads(bits):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(llama(), bits, 32, target_modules=["proj", "lm_head"])
    want, gradients = outcome(copy.deepcopy(model), **batch())
    with chunk_loss_(model, chunk_tokens=5):
        got, ours = outcome(model, **batch())
    torch.testing.assert_close(got.loss, want.loss)
    assert "lm_head.weight" in gradients
    for name, grad in gradients.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_logits_do_not_decide_the_peak():
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).train()
    words, tokens = 8000, torch.randint(97, (4, 50))
    model.resize_token_embeddings(words)
    peaks = []
    for chunked in (False, True):
        handle = chunk_loss_(model, chunk_tokens=20) if chunked else None
        with LiveBytes() as live:
            model(input_ids=tokens, labels=tokens).loss.backward()
        peaks.append(live.peak)
        model.zero_grad()
        if handle is not None:
            handle.remove()
    assert peaks[0] > 4 * tokens.numel() * words
    assert peaks[1] < peaks[0] / 4


class Text(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        tokens = torch.arange(12).mul(i + 1).remainder(97)
        labels = tokens.clone()
        labels[: i % 7] = -100
        return {"input_ids": tokens, "labels": labels}


@pytest.mark.filterwarnings("ignore")
def test_trainer_with_accumulation_and_autocast(tmp_path):
    """Labels of batches that are accumulated are counted together, by `num_items_in_batch`."""
    losses = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = llama()
        if chunked:
            chunk_loss_(model, chunk_tokens=9)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, seed=1,
            gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, learning_rate=1e-2, disable_tqdm=True, bf16=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Text(), eval_dataset=Text())
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append([*history, trainer.evaluate()["eval_loss"]])
    # Products in bfloat16 throughout.
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1][-1] < losses[1][0]


class OwnLoss(nn.Module):
    """A model that shifts and flattens its logits itself."""

    def __init__(self, spoil=None):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30)
        self.spoil = spoil

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens, labels=None):
        logits = self.head(self.embedding(tokens))
        if self.spoil is not None:
            logits = self.spoil(logits)
        loss = None
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous().to(torch.float32)
            flat = shifted.reshape(-1, shifted.size(-1))
            assert flat.shape == (flat.size(0), 30)
            assert shifted.dim() == 3
            smooth = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
            loss = smooth(flat, labels[:, 1:].reshape(-1)).mean()
        return {"loss": loss, "logits": logits}


def test_other_models_with_a_loss_of_their_own():
    torch.manual_seed(0)
    model = OwnLoss(lambda logits: 3 * torch.tanh(logits * torch.tensor(0.5)) / 2)
    tokens = torch.randint(30, (2, 9))
    model(tokens, tokens)["loss"].backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with chunk_loss_(model, chunk_tokens=3):
        output = model(tokens, tokens)
    assert output.keys() == {"loss"}
    output["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda logits: torch.softmax(logits, -1), "softmax"),
        (lambda logits: logits[..., 3:], "an index into the vocabulary"),
        (lambda logits: logits[..., 0], "an index into the vocabulary"),
        (lambda logits: logits[:, :, torch.arange(3)], "an index into the vocabulary"),
        (lambda logits: logits.view(-1), "view"),
        (lambda logits: logits.reshape(2, 3, 90), "view"),
        (lambda logits: logits * torch.ones(30), "a factor that is not a number"),
        (lambda logits: torch.tanh(torch.tanh(logits)), "a second tanh"),
        (lambda logits: -2 * torch.tanh(logits), "a negative factor"),
        (lambda logits: F.cross_entropy(torch.ones(2, 30), logits), "cross_entropy"),
    ],
)
def test_what_needs_whole_logits_is_refused(spoil, what):
    tokens = torch.zeros(2, 9, dtype=torch.long)
    model = OwnLoss(spoil)
    with (
        chunk_loss_(model),
        pytest.raises(NotImplementedError, match=f"only whole logits can do: {what}"),
    ):
        model(tokens, tokens)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must have get_output_embeddings\(\).* got Linear"):
        chunk_loss_(nn.Linear(2, 2))
    model = OwnLoss()
    model.head = nn.Sequential(nn.Linear(8, 30))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, got Sequential"):
        chunk_loss_(model)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        chunk_loss_(OwnLoss(), chunk_tokens=0)
    base = llama().model
    base.get_output_embeddings = lambda: nn.Linear(8, 30)
    with pytest.raises(TypeError, match=r"LlamaModel\.forward does not"):
        chunk_loss_(base)
