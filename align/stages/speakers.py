"""The models of the constitutional stage, by its config: in this process, or behind a server."""

import torch

from align.config.errors import UserError
from align.config.schema import ConstitutionalStage, SpeakerBackend, SpeakerConfig
from align.generation.local_speaker import LocalSpeaker
from align.generation.server_speaker import ServerSpeaker
from align.generation.speakers import Speaker
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
    """Raises: UserError for a server without its address or model, and for a generator without a model."""
    for role in ROLES:
        config, key = getattr(stage, role), f"stages.constitutional.{role}"
        server = config.backend is SpeakerBackend.server
        if not config.model and (server or role == "generator"):
            raise UserError(f"{key}.model is not set; name the model" + (" as the server does" if server else ""))
        if server and not config.url:
            raise UserError(f"{key}.backend=server needs {key}.url, such as http://localhost:8000/v1")


def load_speakers(stage: ConstitutionalStage, context: RunContext) -> dict[str, Speaker]:
    """Role -> its model; roles with equal settings share one. On every rank: each has a copy of local models."""
    made: list[tuple[SpeakerConfig, Speaker]] = []
    speakers = {}
    for role, config in speaker_configs(stage).items():
        known = next((speaker for other, speaker in made if other == config), None)
        if known is None:
            known = _server(config) if config.backend is SpeakerBackend.server else _local(config, stage, context)
            made.append((config, known))
        speakers[role] = known
    return speakers


def _local(config: SpeakerConfig, stage: ConstitutionalStage, context: RunContext) -> LocalSpeaker:
    settings, device = context.config, context.runtime.device
    dtype = torch.bfloat16 if load.use_bf16(settings.precision, device) else torch.float32
    model = load.load_model(config.model, settings.model, dtype, seed=stage.seed)
    # The name is part of every journal key: other weights give other answers.
    weights = "".join(entry["digest"] for entry in input_digests(config.model, "model"))[:12]
    return LocalSpeaker(
        model.to(device),
        load_template(settings, config.model),
        name=f"{config.model}@{weights}" if weights else config.model,
        batch_size=stage.batch_size,
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
