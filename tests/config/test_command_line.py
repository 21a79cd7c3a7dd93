"""What a person at a terminal sees: exit codes, one line, no traceback, no waiting."""

import gc
import os
import resource
import subprocess
import sys
from types import ModuleType

import pytest

from align import __main__ as door
from align import cli
from align.config.errors import UserError
from align.config.listing import GROUPS, VERBS, options
from align.config.schema import Verb
from tests.conftest import REPO


def align(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m align ...` in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run([sys.executable, "-m", "align", *arguments], capture_output=True, text=True, env=variables)


def test_no_arguments_list_the_recipes_and_exit_2(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    for recipe, note in options("recipe").items():
        assert f"{recipe} " in printed and note in printed


def test_help_lists_recipes_verbs_and_every_groups_options_with_their_comment(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for group in ("recipe", *GROUPS):
        for option, note in options(group).items():
            assert any(line.split(None, 1) == [option, note] for line in printed.splitlines()), option
    for verb in Verb:
        assert VERBS[verb] in printed


def test_help_explains_a_key_and_a_section(capsys):
    assert cli.main(["--help", "stages.dpo.learning_rate"]) == 0
    assert "Peak learning rate" in capsys.readouterr().out
    assert cli.main(["--help", "peft"]) == 0
    assert "peft.alpha" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["+recipe=sft_dpo", "--cfg", "job"], ["+recipe=dpo", "betta=1"]])
def test_an_answer_about_the_configuration_takes_under_a_second_and_no_torch(arguments):
    code = (
        "import sys\nfrom align import cli\n"
        f"cli.main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    times = []
    for _ in range(3):
        # Of the processor, not the clock: other work on the machine is not ours.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1.0


def test_cfg_job_prints_the_wires_and_resolve_follows_them(capsys):
    assert cli.main(["+recipe=sft_dpo", "--cfg", "job", "-p", "stages.dpo"]) == 0
    assert "policy: ${run_dir}/sft/policy" in capsys.readouterr().out
    assert cli.main(["+recipe=sft_dpo", "--cfg", "job", "-p", "stages.dpo", "--resolve"]) == 0
    assert "policy: runs/sft_dpo/sft/policy" in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_exit_2():
    done = align("+recipe=dpo", "betta=0.2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "align: betta is not a key; did you mean stages.dpo.beta=0.2?\n"


def test_align_debug_shows_the_traceback():
    done = align("+recipe=dpo", "betta=0.2", ALIGN_DEBUG="1")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_only_the_first_rank_of_a_launch_speaks():
    assert align("+recipe=dpo", "betta=0.2", RANK="1").stderr == ""


@pytest.mark.parametrize("argument", ["--local_rank=1", "--local-rank=0"])
def test_the_launchers_local_rank_is_dropped(monkeypatch, capsys, argument):
    monkeypatch.setattr(sys, "argv", ["align", argument, "+recipe=dpo", "--cfg", "job", "-p", "name"])
    assert door.main() == 0
    assert capsys.readouterr().out.endswith("dpo\n")


def test_a_user_error_within_a_run_exits_2(monkeypatch, capsys):
    def fail(_):
        raise UserError("pairs.jsonl:3: 'rejected' is empty")

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["+recipe=dpo"]) == 2
    assert capsys.readouterr().err == "align: pairs.jsonl:3: 'rejected' is empty\n"


def test_an_interrupted_run_says_how_to_resume(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    assert cli.main(["+recipe=dpo", "data=tiny"]) == 130
    assert "python -m align +recipe=dpo data=tiny" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--config-name", "x"], ["--config-path", "x"], ["--resolve"], ["--nope"]])
def test_a_flag_without_use_is_refused(flags, capsys):
    assert cli.main(["+recipe=dpo", *flags]) == 2
    assert capsys.readouterr().err.startswith("align: ")


def test_flags_may_stand_between_settings(capsys):
    assert cli.main(["+recipe=dpo", "--cfg", "job", "stages.dpo.beta=0.7", "-p", "stages.dpo.beta"]) == 0
    assert capsys.readouterr().out.endswith("0.7\n")


def test_do_recipes_lists_or_shows(capsys):
    assert cli.main(["do=recipes"]) == 0
    assert "sft_dpo" in capsys.readouterr().out
    assert cli.main(["do=recipes", "+recipe=sft_dpo"]) == 0
    assert "policy: runs/sft_dpo/sft/policy" in capsys.readouterr().out


def test_the_garbage_collector_is_off_for_imports_alone_and_passes_over_what_they_made():
    code = (
        "import gc, sys\nfrom align import cli\n"
        "def verb(do):\n"
        "    print(gc.isenabled())\n    sys.modules['torch'] = gc\n"
        "    return lambda config: print(gc.isenabled(), gc.get_freeze_count() > 1000)\n"
        "cli._verb = verb\ncli.main(['+recipe=sft'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


def test_what_is_alive_in_a_process_that_has_torch_may_still_be_collected(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch", ModuleType("torch")))
    before = gc.get_freeze_count()
    assert cli.main(["+recipe=sft", "do=recipes"]) == 0
    # Fewer, if some that were frozen earlier are gone.
    assert gc.get_freeze_count() <= before and gc.isenabled()


def test_a_users_recipe_is_found_and_listed(tmp_path, capsys):
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\n# All mine.\ndefaults: [dpo, _self_]\nstages: {dpo: {beta: 0.7}}\n")
    flags = ["--config-dir", str(tmp_path)]
    assert cli.main(["+recipe=mine", *flags, "--cfg", "job", "-p", "stages.dpo.beta"]) == 0
    assert capsys.readouterr().out.endswith("0.7\n")
    assert cli.main([*flags, "--help"]) == 0
    assert "All mine." in capsys.readouterr().out


def test_hydras_own_questions_are_answered():
    done = align("+recipe=dpo", "--info", "defaults")
    assert done.returncode == 0 and "recipe/dpo" in done.stdout
