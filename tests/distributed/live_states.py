"""What DeepSpeed keeps of a model, in bytes: `live_states.py FOLDER name:settings ...`."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.schema import Offload
from align.distributed.zero import zero_dict

ACCUMULATION = 2
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
# Small, so that what is counted are states: buffers have a size of their own.
SMALL_BUFFERS = {
    "reduce_bucket_size": 1000,
    "stage3_max_live_parameters": 1,
    "stage3_prefetch_bucket_size": 1,
    "stage3_param_persistence_threshold": 0,
}


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, tie_word_embeddings=False))


def storages() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor holds."""
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def live(stage: int, bf16: bool) -> dict[str, float]:
    """Bytes a parameter that a rank holds: the most after a backward pass, and after the step."""
    import deepspeed

    gc.collect()
    before = storages()
    built = model()
    parameters = sum(parameter.numel() for parameter in built.parameters())
    config = zero_dict(stage, Offload.none, bf16=bf16)
    config["zero_optimization"] |= SMALL_BUFFERS if stage == 3 else {"reduce_bucket_size": 1000}
    config |= {"train_batch_size": ACCUMULATION * dist.get_world_size(), "train_micro_batch_size_per_gpu": 1}
    config |= {"gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": 1.0}
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-5)
    engine, *_ = deepspeed.initialize(model=built, optimizer=optimizer, config=config)
    ids = torch.arange(16)[None]
    backward, step = [], 0.0
    for _ in range(2 * ACCUMULATION):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        backward.append(held(before) / parameters)
        engine.step()
        step = held(before) / parameters
    engine.destroy()
    return {"backward": max(backward), "step": step}


def held(before: dict[int, int]) -> int:
    gc.collect()
    return sum(size for address, size in storages().items() if address not in before)


def main(folder: Path, modes: list[str]) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for mode in modes:
        name, settings = mode.split(":")
        stage, precision = settings.split(",")
        found = live(int(stage), precision == "bf16")
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
