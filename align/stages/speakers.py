"""The models of the constitutional stage, by its config: in this process (Hugging Face, vLLM), or behind a server."""

import torch

from align.config.errors import UserError
from align.config.schema import ConstitutionalStage, SpeakerBackend, SpeakerConfig
from align.generation.local_speaker import LocalSpeaker
from align.generation.server_speaker import ServerSpeaker
from align.generation.speakers import Speaker
from align.generation.vllm_engine import Setting
from align.generation.vllm_speaker import VllmSpeaker
from align.models import load
from align.stages.context import RunContext
from align.stages.rows import load_template
from align.stages.session import input_digests

ROLES = ("generator", "critic", "judge")


def speaker_configs(stage: ConstitutionalStage) -> dict[str, SpeakerConfig]:
    """Role -> its settings: the critic is the generator unless one is given, the judge is the critic."""
    critic = stage.critic if stage.critic.model else stage.generator
    return {"generator": stage.generator, "critic": critic, "judge": stage.judge if stage.judge.model else critic}


def check_speakers(stage: ConstitutionalStage) -> None:
    """Raises: UserError for a server without its address or model, a generator without a model, two engines of vLLM."""
    for role in ROLES:
        config, key = getattr(stage, role), f"stages.constitutional.{role}"
        server = config.backend is SpeakerBackend.server
        if not config.model and (server or role == "generator"):
            raise UserError(f"{key}.model is not set; name the model" + (" as the server does" if server else ""))
        if server and not config.url:
            raise UserError(f"{key}.backend=server needs {key}.url, such as http://localhost:8000/v1")
        if config.backend is SpeakerBackend.vllm and config.model == "tiny-untrained":
            raise UserError(f"{key}.model=tiny-untrained has no weights for vLLM to read; use {key}.backend=hf")
    engines = _engines(stage)
    if len(engines) > 1:
        first, second, *_ = engines
        raise UserError(
            f"stages.constitutional.{second}.backend=vllm: {first} has an engine of vLLM already, with other settings, "
            f"and a process holds one; set {second}.backend=hf, or serve that model with vllm serve and backend=server"
        )


def load_speakers(stage: ConstitutionalStage, context: RunContext) -> dict[str, Speaker]:
    """Role -> its model; roles with equal settings share one. On every rank: each has a copy of local models."""
    for role in _engines(stage):
        _setting(role).check(device=context.runtime.device, temperatures=_temperatures(stage))
    made: list[tuple[SpeakerConfig, Speaker]] = []
    speakers = {}
    for role, config in speaker_configs(stage).items():
        known = next((speaker for other, speaker in made if other == config), None)
        if known is None:
            known = _load(role, config, stage, context)
            made.append((config, known))
        speakers[role] = known
    return speakers


def _engines(stage: ConstitutionalStage) -> dict[str, SpeakerConfig]:
    """What vLLM computes, each different model once, by the first role that has it."""
    found: dict[str, SpeakerConfig] = {}
    for role, config in speaker_configs(stage).items():
        if config.backend is SpeakerBackend.vllm and config not in found.values():
            found[role] = config
    return found


def _setting(role: str) -> Setting:
    key = f"stages.constitutional.{role}.backend"
    return Setting(f"{key}=vllm", f"{key}=hf")


def _temperatures(stage: ConstitutionalStage) -> dict[str, float]:
    found = {name: getattr(stage, name) for name in ("temperature", "revision_temperature")}
    found |= {f"temperatures[{i}]": value for i, value in enumerate(stage.temperatures)}
    return {f"stages.constitutional.{name}": value for name, value in found.items()}


def _load(role: str, config: SpeakerConfig, stage: ConstitutionalStage, context: RunContext) -> Speaker:
    if config.backend is SpeakerBackend.server:
        return _server(config)
    settings, device = context.config, context.runtime.device
    dtype = torch.bfloat16 if load.use_bf16(settings.precision, device) else torch.float32
    template = load_template(settings, config.model)
    # The name is part of every journal key: other weights give other answers.
    weights = "".join(entry["digest"] for entry in input_digests(config.model, "model"))[:12]
    name = f"{config.model}@{weights}" if weights else str(config.model)
    if config.backend is SpeakerBackend.hf:
        model = load.load_model(config.model, settings.model, dtype, seed=stage.seed)
        return LocalSpeaker(model.to(device), template, name=name, batch_size=stage.batch_size)
    return VllmSpeaker(
        load.resolve_model(str(config.model)),
        template,
        _setting(role),
        name=name,
        dtype=dtype,
        seed=stage.seed,
        batch_size=stage.batch_size,
        memory_share=config.memory_share,
        max_tokens=config.max_tokens,
        revision=settings.model.revision,
        trust_remote_code=settings.model.trust_remote_code,
    )


def _server(config: SpeakerConfig) -> ServerSpeaker:
    return ServerSpeaker(
        str(config.url),
        config.model,
        key_env=config.key_env,
        concurrency=config.concurrency,
        timeout_seconds=config.timeout_seconds,
        retries=config.retries,
        votes=config.votes,
        prompt_price=config.prompt_price,
        completion_price=config.completion_price,
    )
