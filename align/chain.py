"""Runs the stages of a recipe in order. Every wire is checked before anything starts; what is done is skipped."""

import errno
import operator
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from align import artifacts
from align.artifacts import Manifest
from align.config import command_line
from align.config.adapters import NOT_MERGED, VIRTUAL_TOKENS
from align.config.best import COMPARED, Needs, measured
from align.config.errors import Pruned, Stopped, UserError
from align.config.keys import slots_of
from align.config.rewards import RewardSetting, parse_rewards
from align.config.schema import (
    ClassifyStage,
    ConstitutionalStage,
    EvaluateStage,
    ExportStage,
    JudgeConfig,
    JudgeKind,
    ModelConfig,
    PPOStage,
    RunConfig,
    ScoreStage,
    SpeakerBackend,
    StageConfig,
    ZeroChoice,
)
from align.data.prepare import check_slot, slot_digests
from align.distributed import runtime
from align.distributed.runtime import Runtime
from align.models.load import check_model, context_length, is_adapter, load_config
from align.models.reward import has_score_head
from align.models.trained import trained_model
from align.stages.agreement import refuse_unequal_config
from align.stages.context import RunContext, flat, plain, saved_config, stage_record
from align.stages.export import EXPORTED
from align.stages.out_of_memory import memory_refusal
from align.stages.rows import maker_of, prepare_ahead, starting_model
from align.stages.saving import POLICY, REWARD_MODEL
from align.stages.session import forget_zero, input_digests
from align.stages.speakers import ROLES
from align.stages.table import RUN
from align.tracking.progress import say
from align.tracking.rank_logs import rank_log
from align.tracking.report_files import leave_report
from align.tracking.summary import summary
from align.tracking.wandb_run import check_wandb
from align.trainers.quiet import quiet_libraries
from align.trainers.reward_sources import FUNCTION_FAILED, FunctionReward, function_digest
from align.trainers.stopping import STOP

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors and torch report a full disk in their own words.
DISK_FULL_WORDS = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos", "iostream error")
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def run_chain(config: RunConfig) -> list[Manifest]:
    """Run, resume or skip every stage of `config.run`; returns their manifests and prints the summary.

    Raises: UserError for anything a person can mend; Stopped if SIGTERM or SIGUSR1 came.
    """
    with STOP.caught():
        return _run_chain(config)


def _run_chain(config: RunConfig) -> list[Manifest]:
    run_dir = Path(config.run_dir)
    quiet_libraries()
    with _disk_errors_named(run_dir):
        check_chain(config, run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        _check_writable(run_dir)
    timeout = config.deepspeed.timeout_seconds
    log = rank_log(run_dir, runtime.launched_rank(), runtime.launched_world_size())
    try:
        with log, runtime.watched(timeout), _disk_errors_named(run_dir):
            prepare_ahead(config, run_dir)
            this = runtime.start(
                deepspeed=config.deepspeed.mode is not ZeroChoice.none
                and (config.deepspeed.mode is ZeroChoice.zero or runtime.launched_world_size() > 1),
                timeout_seconds=timeout,
            )
            refuse_unequal_config(config)
            manifests = [_run_stage(config, name, run_dir, this) for name in config.run]
    except (Stopped, Pruned):
        runtime.stop()
        raise
    if this.is_main:
        leave_report(run_dir)
        print(summary(config, run_dir, manifests))
    runtime.stop()
    return manifests


def check_chain(config: RunConfig, run_dir: Path) -> None:
    """Prove that every stage will find its inputs: files that exist, hub ids, or the output of an earlier stage.

    Raises: UserError naming the key of the first wire that leads nowhere.
    """
    if not config.run:
        raise UserError("run is empty: name the stages to run, such as run=[sft,dpo]")
    for position, name in enumerate(config.run):
        if name not in RUN:
            raise UserError(f"run: no stage is called {name}; stages are {', '.join(RUN)}")
        if name in config.run[:position]:
            raise UserError(f"run: {name} is there twice; a chain runs a stage once")
        stage = getattr(config.stages, name)
        if stage is None:
            raise UserError(f"run has {name}, but stages.{name} is not set; add stage=[{','.join(config.run)}]")
        _check_wires(config, name, config.run[:position], run_dir)
        if isinstance(stage, StageConfig):
            _check_context_length(config, name, stage)
        for slot in slots_of(config, name):
            _check_slot(config, name, slot, config.run[:position], run_dir)
    if "reward" in config.run and config.peft.keep_adapter and config.peft.method not in NOT_MERGED:
        raise UserError(
            "peft.keep_adapter=true: a reward model is saved whole, with its centre; leave keep_adapter out: the "
            "adapter is kept beside it anyway"
        )
    check_wandb(config.log)


def _check_slot(config: RunConfig, name: str, slot: str, earlier: list[str], run_dir: Path) -> None:
    """Prove that a slot's rows are there, or will be made by an earlier stage."""
    maker = maker_of(config, slot)
    if maker is None or artifacts.read_manifest(run_dir / maker) is not None:
        check_slot(config.data, slot)
    elif maker == name:
        raise UserError(f"data.{slot} is what stage {name} writes, not what it reads; set data.{slot}=FILE")
    elif maker not in earlier:
        value = getattr(config.data, slot)
        raise UserError(f"data.{slot}={value}: stage {maker} has not run; run it first, or put it before in run=")


def _check_context_length(config: RunConfig, name: str, stage: StageConfig) -> None:
    """Refuse rows longer than the positions of the model that the chain starts from."""
    start = starting_model(config, name)
    longest = context_length(start)
    virtual = config.peft.virtual_tokens if config.peft.method in VIRTUAL_TOKENS else 0
    if longest is not None and stage.max_tokens > longest - virtual:
        if virtual:
            raise UserError(
                f"stages.{name}.max_tokens={stage.max_tokens} and {virtual} virtual tokens, but {start} has {longest} "
                f"positions; use stages.{name}.max_tokens={longest - virtual}"
            )
        raise UserError(
            f"stages.{name}.max_tokens={stage.max_tokens}, but {start} has {longest} positions; "
            f"use stages.{name}.max_tokens={longest}"
        )


def _wires(config: RunConfig, name: str) -> dict[str, str]:
    """Config key -> model for every model that a stage takes in."""
    stage = getattr(config.stages, name)
    if isinstance(stage, StageConfig):
        wires = {f"stages.{name}.policy": stage.policy}
        for key in ("reference", "value"):
            if plain(stage).get(key):
                wires[f"stages.{name}.{key}"] = getattr(stage, key)
        return wires | _best_wires(config, name) | _reward_wires(config, name)
    if isinstance(stage, ScoreStage):
        return {f"stages.{name}.reward_model": stage.reward_model}
    if isinstance(stage, ConstitutionalStage):
        speakers = {role: getattr(stage, role) for role in ROLES}
        local = {role: one for role, one in speakers.items() if one.model and one.backend is not SpeakerBackend.server}
        return {f"stages.{name}.{role}.model": one.model for role, one in local.items()}
    if isinstance(stage, ExportStage):
        return {f"stages.{name}.policy": stage.policy}
    wires = {f"stages.{name}.models.{key}": path for key, path in stage.models.items()}
    if isinstance(stage, ClassifyStage):
        return wires
    return wires | _speaker_wires(f"stages.{name}.judge", stage.judge) | _reward_wires(config, name)


def _best_wires(config: RunConfig, name: str) -> dict[str, str]:
    """The models that a stage takes in to measure its `best_by`, but for a reward model."""
    needs = measured(name, getattr(config.stages, name))
    wires = {"best.baseline": config.best.baseline} if needs in COMPARED else {}
    return wires | (_speaker_wires("best.judge", config.best.judge) if needs is Needs.verdicts else {})


def _speaker_wires(where: str, judge: JudgeConfig) -> dict[str, str]:
    local = judge.kind is JudgeKind.model and judge.speaker.backend is not SpeakerBackend.server
    return {f"{where}.speaker.model": judge.speaker.model} if local and judge.speaker.model else {}


def _reward_wires(config: RunConfig, name: str) -> dict[str, str]:
    """Config key -> reward model for those among the rewards of a stage, and the judge of an evaluation."""
    stage = getattr(config.stages, name)
    models = {f"stages.{name}.rewards.{setting.name}.model": setting.model for setting in _rewards(stage)}
    if isinstance(stage, EvaluateStage) and stage.judge.kind is JudgeKind.reward:
        models[f"stages.{name}.judge.reward_model"] = stage.judge.reward_model
    if measured(name, stage) is Needs.verdicts and config.best.judge.kind is JudgeKind.reward:
        models["best.judge.reward_model"] = config.best.judge.reward_model
    return {key: model for key, model in models.items() if model}


def _rewards(stage: Any) -> list[RewardSetting]:
    return parse_rewards(stage.rewards) if isinstance(stage, PPOStage) else []


def _check_wires(config: RunConfig, name: str, earlier: list[str], run_dir: Path) -> None:
    """Every model and function that a stage takes in: it is what it has to be, or an earlier stage will make it."""
    stage = getattr(config.stages, name)
    rewards = _reward_wires(config, name)
    for key, wire in _wires(config, name).items():
        try:
            there = _check_wire(key, wire, earlier, config, run_dir, adapters=takes_adapters(stage, key))
            if there and key in rewards:
                _check_score_head(key, wire, config.model)
        except UserError as error:
            if key not in rewards or config.peft.keep_adapter:
                raise
            raise UserError(f"{error}; make a reward model with +recipe=reward first") from error
    for setting in _rewards(stage):
        if setting.function:
            FunctionReward(setting)


def _check_score_head(key: str, wire: str, model: ModelConfig) -> None:
    """Raises: UserError unless a model's config, the only file that is read, is that of a reward model."""
    try:
        config = load_config(wire, model)
    except UserError as error:
        raise UserError(f"{key}={error}") from error
    if not has_score_head(config):
        raise UserError(f"{key}={wire}: not a reward model, it has no score head")


def takes_adapters(stage: Any, key: str) -> bool:
    """Whether a model of a stage may be a base with an adapter: where it is asked in this process, and not trained."""
    if isinstance(stage, StageConfig):
        return False
    speaker = re.fullmatch(r"stages\.\w+\.(.+)\.model", key)
    found = operator.attrgetter(speaker[1])(stage) if speaker else None
    return getattr(found, "backend", SpeakerBackend.hf) is SpeakerBackend.hf


def _check_wire(key: str, wire: str, earlier: list[str], config: RunConfig, run_dir: Path, *, adapters: bool) -> bool:
    """Whether the model is there; if not, an earlier stage of the run will make it. Raises: UserError.

    adapters: whether a base with an adapter will do.
    """
    path, method, exports = Path(wire), config.peft.method, key == "stages.export.policy"
    left = config.peft.keep_adapter or method in NOT_MERGED
    if path.parent.parent == run_dir and path.name in (POLICY, REWARD_MODEL, EXPORTED):
        producer = path.parent.name
        if producer in earlier and left and not adapters and not exports and path.name != EXPORTED:
            kept = "leave keep_adapter out: the adapter is kept beside the merged model anyway"
            other = "end the run there, or use peft=lora, qlora, dora, adalora or ia3, which are merged"
            raise UserError(
                f"{key}={wire}: with peft{f'={method.value}' if method in NOT_MERGED else '.keep_adapter=true'} stage "
                f"{producer} leaves an adapter there, and stages start from whole models; "
                f"{other if method in NOT_MERGED else kept}"
            )
        if producer in earlier:
            return False
        if artifacts.read_manifest(path.parent) is None:
            raise UserError(f"{key}={wire}: stage {producer} has not run; run it first, or put it before in run=")
    if exports and is_adapter(path):
        key, wire = f"{key}={wire}: the base of this adapter", str(trained_model(wire).base)
    check_model(wire, where=key, pickled=config.model.pickled_weights, adapters=adapters)
    return True


def _check_writable(run_dir: Path) -> None:
    # Ranks on several nodes may have the same process id.
    probe = run_dir / f".writable-{runtime.launched_rank()}-{os.getpid()}"
    probe.write_text("")
    probe.unlink(missing_ok=True)


@contextmanager
def _disk_errors_named(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (refusal := _disk_refusal(error, run_dir)) is None:
            raise
        raise refusal from error


def _disk_refusal(error: Exception, run_dir: Path) -> UserError | None:
    """The one line for a disk that is full, closed or has something else in the place; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in DISK_FULL or any(words in str(error) for words in DISK_FULL_WORDS):
        return UserError(f"{run_dir}: the disk is full; free some space and type the same command to go on")
    if not isinstance(error, OSError):
        return None
    place, reason = error.filename or run_dir, error.strerror
    if number in NOT_ALLOWED:
        return UserError(f"{place}: not writable ({reason}); use another run_dir or cache_dir")
    if number in IN_THE_WAY:
        return UserError(
            f"{place}: something else is in its place ({reason}); move it away, or use another run_dir or cache_dir"
        )
    return None


def _run_stage(config: RunConfig, name: str, run_dir: Path, this: Runtime) -> Manifest:
    context = RunContext(config, this, run_dir, name)
    done = _complete(context)
    runtime.barrier()
    if done is not None:
        say(f"{name}: complete, skipped ({context.stage_dir})", active=this.is_main)
        return done
    if this.is_main:
        _start_stage(context)
    runtime.barrier()
    started = time.monotonic()
    try:
        manifest = RUN[name](getattr(config.stages, name), context)
    except (RuntimeError, MemoryError) as error:
        if (refusal := memory_refusal(error, context)) is None:
            raise
        raise refusal from error
    finally:
        forget_zero()
    runtime.barrier()
    if this.is_main:
        manifest.seconds = round(time.monotonic() - started, 1)
        artifacts.write_manifest(context.stage_dir, manifest)
        _remove_checkpoints(context.stage_dir)
    runtime.barrier()
    return manifest


def _complete(context: RunContext) -> Manifest | None:
    """The stage's manifest if it stands and was made by this config from these inputs; None if there is none.

    Raises: UserError naming what differs.
    """
    manifest = artifacts.read_manifest(context.stage_dir)
    record = stage_record(context.config, context.stage_name, context.run_dir)
    if manifest is None:
        started = artifacts.read_json(context.stage_dir / artifacts.STARTED)
        # Without a checkpoint nothing is lost by starting again, such as after a refused row.
        if started is not None and any((context.stage_dir / "checkpoints").glob("checkpoint-*")):
            _refuse_other_config(context, started["config"], record)
            # One that failed was to be mended.
            if not (context.stage_dir / FUNCTION_FAILED).exists():
                _refuse_changed(context, started.get("functions", {}), _function_digests(context))
        return None
    _refuse_other_config(context, manifest.config, record)
    problems = artifacts.damaged_outputs(context.stage_dir, manifest)
    if problems:
        raise UserError(f"{context.stage_dir}: {problems[0]}; delete this folder to make it again")
    _refuse_other_inputs(context, manifest)
    return manifest


def _refuse_other_config(context: RunContext, then: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = flat(then), flat(now)
    changed = [
        f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"{context.stage_dir} was made by another config: {'; '.join(changed)}; use another run_dir, "
            "or delete that folder to make it again"
        )


def _refuse_other_inputs(context: RunContext, manifest: Manifest) -> None:
    models = _wires(context.config, context.stage_name).values()
    now = {d["path"]: d["digest"] for model in models for d in input_digests(model, "")}
    for slot in slots_of(context.config, context.stage_name):
        now |= {d["path"]: d["digest"] for d in slot_digests(context.config.data, slot)}
    now |= _function_digests(context)
    _refuse_changed(context, {i["path"]: i["digest"] for i in manifest.inputs}, now)


def _function_digests(context: RunContext) -> dict[str, str]:
    """`module:name` -> digest of the module, for each reward function of the stage."""
    rewards = _rewards(getattr(context.config.stages, context.stage_name))
    digests = [function_digest(setting) for setting in rewards if setting.function]
    return {digest["path"]: digest["digest"] for digest in digests}


def _refuse_changed(context: RunContext, then: dict[str, str], now: dict[str, str]) -> None:
    """Digests of inputs by path. Raises: UserError naming those that are others now."""
    changed = [path for path, digest in then.items() if now.get(path, digest) != digest]
    if changed:
        raise UserError(
            f"{context.stage_dir} was made from other inputs: {', '.join(changed)} changed since; use another "
            "run_dir, or delete that folder to make it again"
        )


def _start_stage(context: RunContext) -> None:
    context.stage_dir.mkdir(parents=True, exist_ok=True)
    record = stage_record(context.config, context.stage_name, context.run_dir)
    (context.stage_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(saved_config(context.config))))
    started = {"config": record, "functions": _function_digests(context), "command": command_line.typed()}
    artifacts.write_json(context.stage_dir / artifacts.STARTED, started)
    (context.stage_dir / FUNCTION_FAILED).unlink(missing_ok=True)


def _remove_checkpoints(stage_dir: Path) -> None:
    shutil.rmtree(stage_dir / "checkpoints", ignore_errors=True)
