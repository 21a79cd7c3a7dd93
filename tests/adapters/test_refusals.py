"""What an adapter method does not read, or does not go with, is refused before anything is loaded."""

import pytest
import torch

from align.config.errors import UserError
from align.config.schema import ModelConfig, PeftConfig, PeftMethod
from align.config.store import compose_run
from align.models.load import load_model
from align.models.peft import add_adapter
from align.models.shape import shape_of

REFUSED = (
    ("peft=lora peft.virtual_tokens=4", "only peft=prefix, peft=prompt, peft=ptuning reads it"),
    ("peft=ia3 peft.r=4", "only peft=lora, peft=qlora, peft=dora, peft=adalora, peft=bottleneck reads it"),
    ("peft=prompt peft.target_modules=q_proj", "peft.target_modules would have no effect"),
    ("peft=bottleneck peft.keep_adapter=true", "this method cannot be merged, so policy/ is base + adapter anyway"),
    ("peft=qlora peft.keep_adapter=true", "fits a base in 4 bits"),
    ("peft=lora peft.init=loftq", "use peft=qlora"),
    ("peft=dora peft.init=pissa", "which peft=dora reads; use peft=lora"),
    ("peft=lora peft.init=pissa deepspeed=zero3", "peft.init=pissa reads whole weights"),
    ("peft=adalora peft.final_r=12", "set a smaller one"),
    ("peft=adalora peft.rank_warmup_fraction=0.5 peft.rank_settled_fraction=0.5", "leave no step to take ranks in"),
    ("peft=adalora deepspeed=zero2", "add deepspeed=none"),
    ("peft=lora peft.rank_pattern={q_proj:0.5}", "a rank is a whole number of 1 or more"),
    ("peft=lora peft.rank_pattern=[4]", "ranks by module were expected, such as {q_proj: 32}"),
    ("peft=prompt stages.dpo.layout=forest", "use stages.dpo.layout=padded or auto"),
    ("peft=prefix stages.dpo.activation_checkpointing=true", "which checkpointing drops"),
    (
        "peft=prompt stages.dpo.best_by=helpful stages.dpo.keep_best=true stages.dpo.eval_every=2",
        "is asked only when it is complete",
    ),
    ("peft=lora peft.virtual_tokens=0", "must be 1 or more"),
)


@pytest.mark.parametrize(("words", "reason"), REFUSED)
def test_it_is_refused_in_one_line(words, reason):
    with pytest.raises(UserError) as refusal:
        compose_run(["+recipe=dpo", *words.split()])
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_ppo_takes_what_can_be_on_one_base_twice():
    compose_run(["+recipe=ppo", "peft=bottleneck"])
    for words in ("peft=prefix", "peft=adalora", "peft=lora peft.init=pissa", "peft=dora stages.ppo.rollout=vllm"):
        with pytest.raises(UserError):
            compose_run(["+recipe=ppo", *words.split()])


@pytest.mark.parametrize("method", [m for m in PeftMethod if m not in (PeftMethod.none, PeftMethod.qlora)])
def test_do_plan_counts_what_is_trained(method):
    modules = None if method in (PeftMethod.ia3, PeftMethod.bottleneck) else "all-linear"
    peft = PeftConfig(method=method, r=12, target_modules=modules)
    adapted = add_adapter(load_model("tiny-base", ModelConfig(), torch.float32, seed=0), peft, seed=0, zero3=False)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape_of("tiny-base", ModelConfig(), peft).adapter == trained
