"""Training with the Trainer of transformers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradpress
from gradpress.integrations.transformers import report_callback, trainer_optimizer


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Text(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = torch.arange(16).add(i).remainder(64)
        return {"input_ids": tokens, "labels": tokens}


def arguments(folder, **options):
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7,
        "logging_steps": 2, "save_steps": 3, "report_to": [], "use_cpu": True, "seed": 1,
        "disable_tqdm": True, "warmup_steps": 2, "lr_scheduler_type": "cosine", **options,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **options)


def trained(folder, model=None, resume=None, options=None, **changes):
    model = tiny() if model is None else model
    args = arguments(folder, **changes)
    pair = trainer_optimizer(model, args, **(options or {"rank": 4, "update_proj_gap": 2}))
    trainer = Trainer(
        model, args, train_dataset=Text(), optimizer_cls_and_kwargs=pair,
        callbacks=[report_callback()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@pytest.mark.filterwarnings("ignore")
def test_trains_with_everything_the_arguments_ask_for(tmp_path):
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    frozen = model.model.layers[0].mlp.up_proj.weight.clone()
    trainer = trained(tmp_path, model)
    optimizer = plain(trainer)
    assert type(optimizer) is gradpress.optim.QGaLoreAdamW
    names = {p: name for name, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.95)
        assert group["eps"] == 1e-7
        for p in group["params"]:
            name = names[p]
            seen.add(name)
            linear = name.endswith("proj.weight")
            assert group["rank"] == (4 if linear else None), name
            decays = not ("norm" in name or "bias" in name)
            assert group["weight_decay"] == (0.1 if decays else 0.0), name
    assert set(names.values()) - seen == {"model.layers.0.mlp.up_proj.weight"}
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, frozen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    last = [e for e in trainer.state.log_history if "gradpress/refreshes" in e][-1]
    report = optimizer.report().projected
    assert last["gradpress/refreshes"] == sum(row.refreshes for row in report)
    assert last["gradpress/rank_mean"] == 4
    assert 0 < last["gradpress/captured_energy"] <= 1
    counted = gradpress.memory.count(model, optimizer).by_category
    assert last["gradpress/state_bytes"] == counted["optimizer_states"] + counted["projectors"]


@pytest.mark.filterwarnings("ignore")
def test_resumes_from_a_checkpoint_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "part", max_steps=6)
    again = trained(tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights_and_other_optimizers(tmp_path):
    for name, options in [
        ("AdamW8bit", {"state_bits": 4}),
        ("QGaLoreAdamW", {"rank": 4}),
        ("ApolloMini", {}),
        ("AdamP", {"nesterov": True}),
    ]:
        model = gradpress.nn.quantize_(tiny(), bits=8, group_size=32)
        trainer = trained(
            tmp_path / name, model, options={"optimizer": name, **options}, save_strategy="no"
        )
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]


def chosen(model, args, **options):
    _, kwargs = trainer_optimizer(model, args, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g for g in kwargs["params"] if g.get("rank")]
    return {names[id(p)] for g in groups for _, p in g["params"]}, kwargs


def test_targets_mean_what_the_trainer_documents(tmp_path):
    model = tiny()
    attention = {n for n, _ in model.named_parameters() if "self_attn" in n and "weight" in n}
    mlp = {n for n, _ in model.named_parameters() if "mlp" in n}
    forms = [
        ("all-linear", attention | mlp),
        ("all_linear", attention | mlp),
        ([r".*.attn.*", r".*.mlp.*"], mlp | attention),
        (["mlp"], mlp),
        (r".*self_attn\.q_proj", {n for n in attention if "q_proj" in n}),
    ]
    for targets, expected in forms:
        args = arguments(tmp_path, optim_target_modules=targets, optim_args="rank=4,scale=0.1")
        got, kwargs = chosen(model, args)
        assert got == expected, targets
        assert kwargs["scale"] == 0.1
    got, _ = chosen(model, args, target_modules=["layers.1.mlp"])
    assert got == {n for n in mlp if "layers.1" in n}


def test_a_rank_by_default_is_for_projected_weights_only(tmp_path):
    model = tiny()
    got, kwargs = chosen(model, arguments(tmp_path), optimizer="ApolloMini")
    assert got == {n for n, _ in model.named_parameters() if n.endswith("proj.weight")}
    assert {group["rank"] for group in kwargs["params"]} == {1, None}
    _, kwargs = chosen(model, arguments(tmp_path), optimizer="AdamP")
    assert all("rank" not in group for group in kwargs["params"])


def test_options_are_read_and_checked(tmp_path):
    model = tiny()
    text = "rank=8, update_proj_gap=100, scale=0.10, proj_type=std, stagger=false"
    args = arguments(tmp_path, optim_args=text)
    _, kwargs = trainer_optimizer(model, args, scale=0.5)
    assert (kwargs["update_proj_gap"], kwargs["scale"], kwargs["proj_type"]) == (100, 0.5, "std")
    assert kwargs["stagger"] is False
    assert kwargs["lr"] == args.learning_rate
    with pytest.raises(ValueError, match=r"QGaLoreAdamW has no option rnk, it takes .*rank"):
        trainer_optimizer(model, arguments(tmp_path, optim_args="rnk=4"))
    with pytest.raises(ValueError, match="rank must be given"):
        trainer_optimizer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match=r'optim_args must be like "rank=64,scale=0\.1"'):
        trainer_optimizer(model, arguments(tmp_path, optim_args="rank:4"))
    with pytest.raises(ValueError, match=r"optimizer must be one of .*AdamW8bit.*, got Adamw"):
        trainer_optimizer(model, args, "Adamw")
    with pytest.raises(ValueError, match="target_modules matches no Linear module"):
        trainer_optimizer(model, args, target_modules=["nothing"])
