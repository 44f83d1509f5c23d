"""Random models of many architectures, with batches and losses that fit them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tests.engine.models import (
    VOCABULARY,
    Residual,
    Stack,
    llama,
    square_loss,
    stack,
    token_batches,
    vector_batches,
)
from torch import nn


@dataclass
class Case:
    """A model, how it is called, and what the engine is to find in it.

    `chained` says of each list of blocks whether they follow each other; `layers` counts what is
    compressed.
    """

    model: nn.Module
    batches: list[Any]
    layers: int
    chained: list[bool]
    loss: Any = None
    modules: Any = "all-linear"
    unreached: set[str] = field(default_factory=set)


def small(kind, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config(**{**sizes, **options})


def padded(labels=False, tokens=10, **more):
    """Batches whose sequences are padded on the right, to different lengths."""
    batches = []
    for ids in token_batches(count=2, samples=3, tokens=tokens):
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        mask[2, 4:] = 0
        batch = {"input_ids": ids * mask, "attention_mask": mask, **more}
        if labels:
            batch["labels"] = torch.where(mask == 0, -100, ids)
        batches.append(batch)
    return batches


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=3, n_head=4
    )
    return Case(transformers.GPT2LMHeadModel(config), token_batches(), 12, [True])


def bert():
    model = transformers.BertForMaskedLM(small("Bert", max_position_embeddings=16))
    # Its head has a Linear outside of the blocks, and one that is the embedding's weight.
    return Case(model, padded(labels=True), 19, [True])


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    batches = padded(tokens=9)
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, :5].clone()
    # Every block passes on the position bias of the first one.
    return Case(model, batches, 2 * 6 + 2 * 10, [False, False])


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=16,
    )
    model = transformers.BartForConditionalGeneration(config)
    batches = padded(tokens=9)
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, :5].clone()
    return Case(model, batches, 2 * 6 + 3 * 10, [True, True])


def albert():
    config = small("Albert", embedding_size=16, max_position_embeddings=16)
    model = transformers.AlbertForMaskedLM(config)
    return Case(model, padded(labels=True), 8, [])


def mixtral():
    config = small("Mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return Case(transformers.MixtralForCausalLM(config), token_batches(), 12, [True])


def gemma3():
    config = small(
        "Gemma3Text",
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Case(transformers.Gemma3ForCausalLM(config), token_batches(), 21, [True])


def qwen3():
    config = small("Qwen3", num_key_value_heads=2, head_dim=8)
    return Case(transformers.Qwen3ForCausalLM(config), padded(), 21, [True])


def phi():
    config = small("Phi", num_key_value_heads=2)
    return Case(transformers.PhiForCausalLM(config), token_batches(), 18, [True])


def vit():
    config = small("ViT", image_size=16, patch_size=8, num_labels=5)
    model = transformers.ViTForImageClassification(config)
    g = torch.Generator().manual_seed(0)
    batches = [
        {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=g),
            "labels": torch.randint(0, 5, (2,), generator=g),
        }
        for _ in range(2)
    ]
    return Case(model, batches, 19, [True])


def bfloat16():
    return Case(llama().bfloat16(), token_batches(), 14, [True])


class Encoder(nn.Module):
    """PyTorch's own layers, one of whose Linear modules is never called as a module."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def torch_encoder():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    batches = [(torch.randn(2, 6, 16, generator=g), padding) for _ in range(2)]
    unreached = {f"encoder.layers.{i}.self_attn.out_proj" for i in range(3)}
    return Case(Encoder(), batches, 9, [True], square_loss, unreached=unreached)


def perceptron():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    return Case(model, vector_batches(), 3, [True], square_loss)


class Image(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=groups),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def convolutions():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 4, 9, 9, generator=g) for _ in range(2)]
    return Case(Image(), batches, 3, [True], square_loss, ["features", "head"])


class Single(nn.Module):
    """Without blocks, called by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, *, x):
        return self.second(torch.tanh(self.first(input=x)))


def without_blocks():
    torch.manual_seed(0)
    return Case(Single(), [{"x": x} for x in vector_batches()], 2, [], square_loss)


class InPlace(Residual):
    """Writes into its input, which its first layer was given."""

    def __init__(self, width=16):
        super().__init__(width)
        self.norm = nn.Identity()

    def forward(self, x):
        return x.add_(self.change(x))


def in_place():
    return Case(stack(InPlace), vector_batches(), 6, [True], square_loss)


class Scaled(Stack):
    """Something happens between the blocks."""

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x * (1 + i) / 2)
        return x


class ScaledInPlace(Stack):
    """The same in the memory of what the block has returned."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x).mul_(0.5)
        return x


class Skip(Stack):
    """Another path from an early block to a late one."""

    def forward(self, x):
        results = []
        for i, block in enumerate(self.blocks):
            x = block(x) if i < 2 else block(x, results[0].tanh())
            results.append(x)
        return x


class Skipped(Residual):
    def forward(self, x, skip=None):
        return super().forward(x if skip is None else x + skip)


def between():
    return Case(stack(model=Scaled), vector_batches(), 6, [False], square_loss)


def between_in_place():
    return Case(stack(model=ScaledInPlace), vector_batches(), 6, [False], square_loss)


def skip():
    return Case(stack(Skipped, model=Skip), vector_batches(), 6, [False], square_loss)


class Pair(Residual):
    def forward(self, *, hidden, scale):
        return super().forward(hidden) * scale, scale.abs().mean(), None


class Pairs(Stack):
    """Blocks return tuples, and the model uses more of them than the first part."""

    def forward(self, x, scale):
        penalty = 0
        for block in self.blocks:
            x, more, _ = block(hidden=x, scale=scale)
            penalty = penalty + more * 2
        return x + 0 * penalty


def tuples():
    batches = [(x, torch.tensor(0.9)) for x in vector_batches()]
    return Case(stack(Pair, model=Pairs), batches, 6, [True], square_loss)


class Experts(nn.Module):
    """Tokens go to the experts that a fixed rule says; none ever goes to the last one."""

    def __init__(self, width=16):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, -2)
        result = torch.zeros_like(flat)
        to = (flat[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            chosen = (to == i).nonzero()[:, 0]
            if len(chosen):
                result.index_add_(0, chosen, expert(flat[chosen]))
        return x + result.view_as(x)


def experts():
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 5, 16, generator=g) for _ in range(3)]
    unreached = {f"blocks.{i}.experts.2" for i in range(3)}
    return Case(stack(Experts), batches, 9, [True], square_loss, unreached=unreached)


CASES = [
    albert,
    bart,
    bert,
    between,
    between_in_place,
    bfloat16,
    convolutions,
    experts,
    gemma3,
    gpt2,
    in_place,
    mixtral,
    perceptron,
    phi,
    qwen3,
    skip,
    t5,
    torch_encoder,
    tuples,
    vit,
    without_blocks,
]
