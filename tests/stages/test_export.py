"""The exported folder is the trained model: merged, in its number format, with the template it was trained on."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from align import cli
from align.artifacts import read_json, read_manifest
from align.config.errors import UserError
from align.config.schema import GGUFType, ModelConfig
from align.data.template import Template
from align.generation.greedy import greedy_read
from align.generation.vllm_greedy import vllm_read, why_not_vllm
from align.losses.parity import parity
from align.models.load import load_model, load_tokenizer, resolve_model
from align.models.trained import trained_model
from align.stages import export_push
from align.stages.export_gguf import write_gguf
from tests.generation import stand_in_vllm
from tests.launching import slow
from tests.stages.runs import run

LORA = ("peft=lora", "peft.r=4", "stages.sft.learning_rate=1e-2")
QUICK = ("stages.export.max_prompts=3", "stages.export.max_new_tokens=12")
GENERATION = "stages.export.generation={temperature: 0.7, top_p: 0.9}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(folder, *LORA, "run=[sft]")
    return folder / "run/sft"


def export(folder: Path, policy: Path | str, *more: str) -> int:
    own = [f"model.path={policy}", f"run_dir={folder}/run", f"cache_dir={folder}/cache", "precision=fp32"]
    return cli.main(["+recipe=export", *own, *QUICK, *more])


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    settings = ["stages.export.dtype=bf16", "stages.export.max_shard_size=900KB", GENERATION]
    assert export(folder, trained / "policy", "stages.export.forms=[model,adapter]", *settings) == 0
    return folder / "run/export"


def load(folder: Path | str, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_the_weights_are_pefts_merge_in_the_number_format_that_was_asked_for(trained, exported):
    base = load(resolve_model("tiny-base"), torch.float32)
    merged = PeftModel.from_pretrained(base, str(trained / "adapter")).merge_and_unload().to(torch.bfloat16)
    found = load(exported / "model")
    assert found.dtype == torch.bfloat16
    weights = found.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in merged.state_dict().items())


def test_large_models_become_several_files_of_at_most_the_size(exported):
    shards = sorted((exported / "model").glob("model-*.safetensors"))
    index = json.loads((exported / "model/model.safetensors.index.json").read_text())
    assert len(shards) >= 2 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    # A tensor is not cut; the header of a file comes on top.
    assert all(shard.stat().st_size < 900_000 + 10_000 for shard in shards)


def test_tokenizer_template_and_stop_tokens_come_along(trained, exported):
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (exported / "model", trained / "policy"))
    chat = [{"role": "user", "content": "Where does Ada live?"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == theirs.apply_chat_template(
        chat, add_generation_prompt=True
    )
    digest = read_manifest(trained).template_digest
    assert Template(load_tokenizer(str(exported / "model"), ModelConfig(), None)).digest == digest
    config = GenerationConfig.from_pretrained(exported / "model")
    assert config.eos_token_id == ours.convert_tokens_to_ids("<|end|>")
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.7, 0.9)


def test_the_adapter_folder_names_its_base_and_answers_on_it(trained, exported):
    said = json.loads((exported / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(said).is_dir()
    ours = load_file(exported / "adapter/adapter_model.safetensors")
    theirs = load_file(trained / "adapter/adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(said, torch.float32), exported / "adapter")(input_ids=ids).logits
        merged = load(trained / "policy", torch.float32)(input_ids=ids).logits
    assert (adapted - merged).abs().max() < 1e-4
    assert (exported / "adapter/chat_template.jinja").read_bytes() == (
        trained / "policy/chat_template.jinja"
    ).read_bytes()


def test_an_exported_adapter_is_known_by_the_base_it_was_trained_on(trained, exported):
    """And not by the policy that was exported, into which it is merged already."""
    again = trained_model(str(exported / "adapter"))
    assert (again.base, again.whole) == (trained_model(str(trained / "policy")).base, False) == ("tiny-base", False)


def test_what_was_compared_is_written_down_and_on_the_card(exported):
    told = read_json(exported / "verification.json")
    assert list(told["compared"]) == ["merged in memory", "reloaded folder, bf16", "adapter on its base"]
    assert told["compared"]["merged in memory"]["largest"] < 1e-4
    assert 0 < told["compared"]["reloaded folder, bf16"]["largest"] < 0.5
    assert told["left_out"] == {"vLLM": "no GPU here for it"}
    assert len(told["replies"]) == len(told["prompts"]) == 3
    card = (exported / "model/README.md").read_text()
    assert "| reloaded folder, bf16 | " in card and "supervised fine-tuning" in card
    assert "sha256 of the chat template" in card
    signed = {output["path"] for output in read_manifest(exported).outputs}
    assert {"model/config.json", "adapter/adapter_model.safetensors", "verification.json"} <= signed


@slow
@pytest.mark.parametrize("method", ["ia3", "bottleneck"])
def test_an_adapter_that_no_weights_can_take_up_is_exported_alone(method, tmp_path, capsys):
    made = ["stages.sft.packing=false", "stages.sft.max_steps=3", "stages.sft.learning_rate=1e-2"]
    run(tmp_path, f"peft={method}", *made, "run=[sft]")
    policy = tmp_path / "run/sft/policy"
    code = export(tmp_path / "whole", policy)
    assert code == (0 if method == "ia3" else 2)
    if code:
        assert "write stages.export.forms=[adapter]" in capsys.readouterr().err
    assert export(tmp_path / "alone", policy, "stages.export.forms=[adapter]") == 0
    [compared] = read_json(tmp_path / "alone/run/export/verification.json")["compared"].values()
    assert compared["largest"] < 1e-4


def test_a_chain_may_end_in_an_export_that_merges_a_kept_adapter(tmp_path):
    wires = ("run=[sft,export]", "stage=[export]", f"stages.export.policy={tmp_path}/run/sft/policy")
    run(tmp_path, *LORA, "peft.keep_adapter=true", *wires, *QUICK, "stages.export.dtype=fp32")
    assert not (tmp_path / "run/sft/policy/model.safetensors").exists()
    base = load(resolve_model("tiny-base"), torch.float32)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "run/sft/adapter")).merge_and_unload().state_dict()
    found = load(tmp_path / "run/export/model", torch.float32).state_dict()
    assert all((found[name] - tensor).abs().max() < 1e-6 for name, tensor in merged.items())


def copy_of(trained: Path, folder: Path) -> Path:
    shutil.copytree(trained, folder / "run/sft")
    return folder / "run/sft"


def test_weights_that_are_not_the_trained_ones_fail_and_leave_nothing(trained, tmp_path, capsys):
    """The policy beside the adapter is another one: a merge that went wrong."""
    stage = copy_of(trained, tmp_path)
    weights = load_file(stage / "policy/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.02
    save_file(weights, stage / "policy/model.safetensors", metadata={"format": "pt"})
    assert export(tmp_path / "out", stage / "policy") == 2
    said = capsys.readouterr().err
    assert "align: export: merged in memory is not the trained model: reply " in said and "nothing was exported" in said
    assert not (tmp_path / "out/run/export/model").exists()


def test_another_chat_template_than_the_one_trained_on_is_refused(trained, tmp_path, capsys):
    stage = copy_of(trained, tmp_path)
    template = stage / "policy/chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>{%", "<|assistant|> {%"))
    assert export(tmp_path / "out", stage / "policy") == 2
    assert "not those it was trained on" in capsys.readouterr().err


def test_a_base_that_has_changed_since_is_refused(trained, tmp_path, capsys):
    stage = copy_of(trained, tmp_path)
    manifest = json.loads((stage / "manifest.json").read_text())
    manifest["inputs"][0]["digest"] = "0" * 64
    (stage / "manifest.json").write_text(json.dumps(manifest))
    assert export(tmp_path / "out", stage / "policy") == 2
    assert "its base tiny-base is not what it was trained on any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("stages.export.forms=[]", "stages.export.forms is empty; name what to write"),
        ("stages.export.forms=[gguf]", "write stages.export.forms=[model,gguf]"),
        ("stages.export.forms=[adapter]", "stages.export.forms has adapter, but tiny-sft was trained whole"),
        ("stages.export.forms=[model,gguf]", "llama.cpp's converter (convert_hf_to_gguf.py or llama-convert"),
        ("stages.export.generation={temprature: 1}", "generation.temprature is no setting of a generation config; did"),
        ("stages.export.generation={eos_token_id: 1}", "generation.eos_token_id is set by the chat template"),
        ("stages.export.max_shard_size=5", "stages.export.max_shard_size=5: must be a size such as 500MB or 5GB"),
        ("stages.export.push_to=name", "stages.export.push_to=name: a hub repository is organisation/name"),
        ("stages.export.gguf_type=q8_0", "gguf_type would have no effect: no GGUF file is made"),
        ("stages.export.private=false", "private would have no effect: nothing is uploaded"),
        ("stages.export.max_new_tokens=3000", "data.prompts: none leaves room for stages.export.max_new_tokens=3000"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, capsys, monkeypatch, settings, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    own = [f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    assert cli.main(["+recipe=export", "model=tiny_sft", *own, settings]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert said in line


@slow
def test_generation_settings_that_no_model_can_answer_by_are_refused(tmp_path, capsys):
    assert export(tmp_path, "tiny-sft", "stages.export.generation={temperature: -1}") == 2
    assert "align: stages.export.generation={'temperature': -1}: `temperature`" in capsys.readouterr().err
    assert not (tmp_path / "run/export/model").exists()


class Hub:
    """What the hub's client does, on this machine; it remembers what it was asked."""

    asked: list[tuple] = []
    refuses: Exception | None = None

    def whoami(self):
        if self.refuses:
            raise self.refuses
        return {"name": "me"}

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(export_push, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "refuses", None)
    return Hub


def test_the_folder_is_uploaded_to_the_repository_that_is_named(tmp_path, hub, capsys):
    assert export(tmp_path, "tiny-sft", "stages.export.push_to=me/village") == 0
    (create, upload) = hub.asked
    assert create == ("create", "me/village", True, True)
    files = sorted(path.name for path in (tmp_path / "run/export/model").iterdir())
    assert upload == ("upload", "me/village", files) and "README.md" in files
    assert "uploaded to https://hub/me/village/commit/1" in capsys.readouterr().err


def test_without_a_login_nothing_is_even_loaded(tmp_path, hub, capsys):
    hub.refuses = LocalTokenNotFoundError("Token is required")
    assert export(tmp_path, "tiny-sft", "stages.export.push_to=me/village") == 2
    assert "the hub does not let you in (Token is required); hf auth login" in capsys.readouterr().err
    assert hub.asked == []


def test_an_adapter_of_a_base_on_this_machine_is_not_uploaded(trained, tmp_path, hub, capsys):
    settings = ("stages.export.forms=[adapter]", "stages.export.push_to=me/village")
    assert export(tmp_path, trained / "policy", *settings) == 2
    assert "the base of this adapter is a folder of this machine" in capsys.readouterr().err


def converter_of(folder: Path, monkeypatch, script: str) -> None:
    """What stands on the PATH in place of llama.cpp's converter."""
    tool = folder / "bin/convert_hf_to_gguf.py"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")


def test_gguf_is_made_by_the_installed_converter_and_nothing_is_uploaded(tmp_path, monkeypatch, hub):
    converter_of(tmp_path, monkeypatch, 'printf "GGUF %s" "$*" > "$3"')
    settings = ("stages.export.forms=[model,gguf]", "stages.export.gguf_type=q8_0")
    assert export(tmp_path, "tiny-sft", *settings) == 0
    asked = (tmp_path / "run/export/model.gguf").read_text().split()
    assert asked[:2] == ["GGUF", str(tmp_path / "run/export/model")] and asked[-2:] == ["--outtype", "q8_0"]
    assert "model.gguf" in {output["path"] for output in read_manifest(tmp_path / "run/export").outputs}
    assert hub.asked == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "ERROR: unknown pre-tokenizer" >&2; exit 1', "does not convert .*: ERROR: unknown pre-tokenizer"),
        ("exit 3", "does not convert .*: exit code 3"),
        ('echo rubbish > "$3"', "has written no GGUF file"),
        ("exit 0", "has written no GGUF file"),
    ],
)
def test_a_converter_that_fails_is_told_in_one_line(tmp_path, monkeypatch, script, said):
    converter_of(tmp_path, monkeypatch, script)
    with pytest.raises(UserError, match=said):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", GGUFType.f16)
    assert not (tmp_path / "model.gguf").exists()


def sentencepiece_like(folder: Path, *, scores: bool) -> str:
    """tiny-sft with a tokenizer of SentencePiece's kind, with or without the file that it was made from."""
    shutil.copytree(resolve_model("tiny-sft"), folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))
    if scores:
        (folder / "tokenizer.model").write_bytes(b"scores")
    return str(folder)


def test_a_sentencepiece_file_goes_with_the_tokenizer_from_stage_to_export(tmp_path, monkeypatch):
    converter_of(tmp_path, monkeypatch, 'printf "GGUF %s" "$*" > "$3"')
    start = sentencepiece_like(tmp_path / "start", scores=True)
    run(tmp_path, f"model.path={start}", "run=[sft]", "stages.sft.max_steps=1")
    assert export(tmp_path / "out", tmp_path / "run/sft/policy", "stages.export.forms=[model,gguf]") == 0
    assert (tmp_path / "out/run/export/model/tokenizer.model").read_bytes() == b"scores"


def test_no_gguf_is_made_of_a_sentencepiece_tokenizer_without_its_scores(tmp_path, monkeypatch, capsys):
    converter_of(tmp_path, monkeypatch, 'printf "GGUF %s" "$*" > "$3"')
    start = sentencepiece_like(tmp_path / "start", scores=False)
    assert export(tmp_path / "out", start, "stages.export.forms=[model,gguf]") == 2
    assert f"{start} lacks tokenizer.model" in capsys.readouterr().err
    assert not (tmp_path / "out/run/export/model").exists()


def test_vllm_is_asked_the_same_and_reads_the_same(monkeypatch):
    llm = stand_in_vllm.install(monkeypatch)
    folder, settings = resolve_model("tiny-sft"), ModelConfig(path="tiny-sft")
    template = Template(load_tokenizer("tiny-sft", settings, None))
    chats = ["Where does Ada live?", "What does the owl eat?"]
    prompts = [
        template.tokenizer.apply_chat_template([{"role": "user", "content": chat}], add_generation_prompt=True)[
            "input_ids"
        ]
        for chat in chats
    ]
    stops, model = sorted(template.stop_token_ids), load_model("tiny-sft", settings, torch.float32, seed=0)
    ours = greedy_read(model, prompts, None, stop_token_ids=stops, pad_token_id=1, max_new_tokens=16)
    theirs = vllm_read(
        folder, prompts, ours.replies, stop_token_ids=stops, max_new_tokens=16, dtype=torch.float32,
        trust_remote_code=False,
    )  # fmt: skip
    found = parity(ours, theirs, 1e-4)
    assert found.fault == "" and found.same == 2 and found.tokens > 10
    assert not llm.started, "the engine is stopped"
    other = load_model("tiny-base", settings, torch.float32, seed=0)
    wrong = greedy_read(other, prompts, ours.replies, stop_token_ids=stops, pad_token_id=1, max_new_tokens=16)
    assert parity(ours, wrong, 0.5).fault


@pytest.mark.parametrize(("built_for_cpu", "why"), [(True, None), (False, "no GPU here for it")])
def test_vllm_is_asked_on_a_cpu_if_it_was_built_for_one(monkeypatch, built_for_cpu, why):
    assert why_not_vllm("cpu") == "no GPU here for it"
    stand_in_vllm.install(monkeypatch)
    platform = SimpleNamespace(is_cpu=lambda: built_for_cpu)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    assert why_not_vllm("cpu") == why
    assert why_not_vllm("cuda:0") is None


def test_an_adapter_can_be_exported_and_nothing_else_starts_from_one(trained, tmp_path):
    adapter = trained / "adapter"
    with pytest.raises(UserError, match=r"an adapter, not a whole model; merge it with \+recipe=export model.path="):
        run(tmp_path, "run=[dpo]", f"stages.dpo.policy={adapter}")


def test_an_adapter_of_virtual_tokens_that_peft_wrote_is_exported_alone(tmp_path, capsys):
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load(resolve_model("tiny-sft")), settings).save_pretrained(tmp_path / "adapter")
    assert export(tmp_path, tmp_path / "adapter") == 2
    assert "no weights can take this adapter up; write stages.export.forms=[adapter]" in capsys.readouterr().err
    assert export(tmp_path, tmp_path / "adapter", "stages.export.forms=[adapter]") == 0
    assert (tmp_path / "run/export/adapter/chat_template.jinja").is_file()
