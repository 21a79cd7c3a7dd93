"""The models of the constitutional stage, by its config: in this process (Hugging Face, vLLM), or behind a server."""

from collections.abc import Mapping

import torch

from align.artifacts import digest_value
from align.config.errors import UserError
from align.config.schema import ConstitutionalStage, SpeakerBackend, SpeakerConfig
from align.generation.local_speaker import LocalSpeaker
from align.generation.server_speaker import ServerSpeaker
from align.generation.speakers import Speaker
from align.generation.vllm_engine import Setting
from align.generation.vllm_speaker import VllmSpeaker
from align.models import load
from align.models.adapters import saved
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
        check_speaker(getattr(stage, role), f"stages.constitutional.{role}", needed=role == "generator")
    engines = _engines(stage)
    if len(engines) > 1:
        first, second, *_ = engines
        raise UserError(
            f"stages.constitutional.{second}.backend=vllm: {first} has an engine of vLLM already, with other settings, "
            f"and a process holds one; set {second}.backend=hf, or serve that model with vllm serve and backend=server"
        )


def check_speaker(config: SpeakerConfig, key: str, *, needed: bool = True) -> None:
    """Raises: UserError for a model that cannot be asked. needed: whether there has to be one (a server's always)."""
    server = config.backend is SpeakerBackend.server
    if not config.model and (server or needed):
        raise UserError(f"{key}.model is not set; name the model" + (" as the server does" if server else ""))
    if server and not config.url:
        raise UserError(f"{key}.backend=server needs {key}.url, such as http://localhost:8000/v1")
    if config.backend is SpeakerBackend.vllm and config.model == "tiny-untrained":
        raise UserError(f"{key}.model=tiny-untrained has no weights for vLLM to read; use {key}.backend=hf")


def check_device(config: SpeakerConfig, key: str, device: str, temperatures: Mapping[str, float] | None = None) -> None:
    """Raises: UserError for a model of vLLM where vLLM or its GPU is missing. Loads nothing."""
    if config.backend is SpeakerBackend.vllm:
        _setting(key).check(device=device, temperatures=temperatures or {})


def load_speakers(stage: ConstitutionalStage, context: RunContext) -> dict[str, Speaker]:
    """Role -> its model; roles with equal settings share one. On every rank: each has a copy of local models."""
    for role, config in _engines(stage).items():
        check_device(config, f"stages.constitutional.{role}", context.runtime.device, _temperatures(stage))
    made: list[tuple[SpeakerConfig, Speaker]] = []
    speakers = {}
    for role, config in speaker_configs(stage).items():
        known = next((speaker for other, speaker in made if other == config), None)
        if known is None:
            where = f"stages.constitutional.{role}"
            known = load_speaker(config, where, context, stage.seed, stage.batch_size)
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


def _setting(where: str) -> Setting:
    return Setting(f"{where}.backend=vllm", f"{where}.backend=hf")


def _temperatures(stage: ConstitutionalStage) -> dict[str, float]:
    found = {name: getattr(stage, name) for name in ("temperature", "revision_temperature")}
    found |= {f"temperatures[{i}]": value for i, value in enumerate(stage.temperatures)}
    return {f"stages.constitutional.{name}": value for name, value in found.items()}


def load_speaker(config: SpeakerConfig, where: str, context: RunContext, seed: int, batch_size: int) -> Speaker:
    """One model by its settings, which are those of the key `where`."""
    if config.backend is SpeakerBackend.server:
        return _server(config)
    model = str(config.model)
    if config.backend is SpeakerBackend.hf:
        return load_local(model, context, seed=seed, batch_size=batch_size)
    settings = context.config
    return VllmSpeaker(
        load.resolve_model(model),
        load_template(settings, model),
        _setting(where),
        name=local_name(model),
        dtype=_dtype(context),
        seed=seed,
        batch_size=batch_size,
        memory_share=config.memory_share,
        max_tokens=config.max_tokens,
        revision=settings.model.revision,
        trust_remote_code=settings.model.trust_remote_code,
        pickled_weights=settings.model.pickled_weights,
    )


def load_local(model: str, context: RunContext, *, seed: int, batch_size: int) -> LocalSpeaker:
    """A Hugging Face model in this process. seed: of the weights of `tiny-untrained`."""
    settings = context.config
    loaded = saved.load_speaker(model, settings.model, _dtype(context), seed=seed).to(context.runtime.device)
    return LocalSpeaker(loaded, load_template(settings, model), name=local_name(model), batch_size=batch_size)


def _dtype(context: RunContext) -> torch.dtype:
    return torch.bfloat16 if load.use_bf16(context.config.precision, context.runtime.device) else torch.float32


def local_name(model: str) -> str:
    """A model with a digest of its weights: part of every journal key, for other weights give other answers."""
    own, *base = (entry["digest"] for entry in input_digests(model, "model"))
    return f"{model}@{digest_value([own, *base])[:12] if base else own[:12]}"


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
