"""A Python function as a source of reward: what it is given, what it may return, and what is said when it fails."""

import sys

import numpy as np
import pytest

from align.config.errors import UserError
from align.config.rewards import RewardSetting
from align.data.records import Message
from align.trainers.reward_sources import Answered, FunctionReward


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Writes a module into the working directory, which is on no path that Python searches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)

    def write(text: str, name: str = "own_rewards") -> None:
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_rewards"):
            del sys.modules[name]


def function(name: str) -> FunctionReward:
    return FunctionReward(RewardSetting("mine", None, name))


def answered(n: int) -> list[Answered]:
    prompts = [(Message("system", "Be kind."), Message("user", f"Question {i}?")) for i in range(n)]
    return [
        Answered(prompt, (), [5, 6], [7], f"Answer {i}.", True, {"truth": i, "list": [i]})
        for i, prompt in enumerate(prompts)
    ]


def test_a_function_of_the_working_directory_gets_prompts_texts_and_rows_in_order(here):
    keep = "seen.append((prompts, completions, rows))"
    here(f"seen = []\ndef f(prompts, completions, rows):\n  {keep}\n  return [1, None, 2.5]")
    reward = function("own_rewards:f")
    scores = reward.scores(answered(3))
    assert scores.dtype == np.float64
    assert scores.tolist()[::2] == [1.0, 2.5] and np.isnan(scores[1])
    [(prompts, completions, rows)] = sys.modules["own_rewards"].seen
    assert prompts[2] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Question 2?"}]
    assert completions == ["Answer 0.", "Answer 1.", "Answer 2."]
    assert [row["truth"] for row in rows] == [0, 1, 2]


def test_what_a_function_does_to_its_rows_is_not_seen_by_the_next(here):
    here(
        "def f(prompts, completions, rows):\n  was = [len(r) for r in rows]\n  [r.clear() for r in rows]\n  return was"
    )
    batch = answered(2)
    assert function("own_rewards:f").scores(batch).tolist() == [2.0, 2.0]
    assert function("own_rewards:f").scores(batch).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "result",
    ["[1, 2]", "(1.0, 2.0)", "np.array([1, 2], dtype=np.float32)", "torch.tensor([1.0, 2.0])",
     "[np.float64(1), torch.tensor(2)]", "[True, np.int64(2)]"],
)  # fmt: skip
def test_numbers_may_be_those_of_any_library(here, result):
    here(f"import numpy as np, torch\ndef f(prompts, completions, rows):\n  return {result}")
    assert function("own_rewards:f").scores(answered(2)).tolist() == [1.0, 2.0]


def test_without_completions_a_function_is_not_called(here):
    here("def f(prompts, completions, rows):\n  1 / 0")
    scores = function("own_rewards:f").scores([])
    assert scores.shape == (0,) and scores.dtype == np.float64


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("[1]", "own_rewards:f returned 1 scores for 2 completions; return one for each"),
        ("[1, 2, 3]", "own_rewards:f returned 3 scores for 2 completions"),
        ("3.0", "own_rewards:f returned float; return a list"),
        ("None", "own_rewards:f returned NoneType; return a list"),
        ("'12'", "own_rewards:f returned str; return a list"),
        ("{0: 1, 1: 2}", "own_rewards:f returned dict; return a list"),
        ("[1, '2']", "own_rewards:f returned '2' for completion 1; return a number, or None"),
        ("[[1], [2]]", "own_rewards:f returned [1] for completion 0; return a number, or None"),
        ("[1, 1j]", "own_rewards:f returned 1j for completion 1; return a number, or None"),
        ("[1, float('-inf')]", "own_rewards:f returned -inf for completion 1; bound it"),
        ("[1, 10**400]", "for completion 1; bound it"),
        ("1 / 0", "own_rewards:f: ZeroDivisionError: division by zero; mend the function"),
        ("exec('raise KeyError')", "own_rewards:f: KeyError; mend the function"),
        ("exec('raise OSError(\"no judge\\\\nat all\")')", "own_rewards:f: OSError: no judge; mend the function"),
    ],
)
def test_a_function_that_fails_or_returns_something_else_is_refused_in_one_line(here, result, said):
    here(f"def f(prompts, completions, rows):\n  return {result}")
    with pytest.raises(UserError) as refusal:
        function("own_rewards:f").scores(answered(2))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_score_that_is_not_a_number_counts_as_none(here):
    here("def f(prompts, completions, rows):\n  return [float('nan'), 1]")
    scores = function("own_rewards:f").scores(answered(2))
    assert np.isnan(scores[0]) and scores[1] == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_rewards_absent:f", "no module own_rewards_absent is installed or in "),
        ("own_rewards.sub:f", "no module own_rewards.sub is installed or in "),
        ("own_rewards:lenght", "own_rewards has no lenght; did you mean length? (length)"),
        ("own_rewards:constant", "constant is no function, it is of type int"),
        ("own_rewards_typo:f", "the module cannot be imported: SyntaxError: "),
        ("own_rewards_needs:f", "the module cannot be imported: ModuleNotFoundError: No module named 'own_rewards_n"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_anything_runs(here, name, said):
    here("constant = 3\ndef length(prompts, completions, rows):\n  return [0] * len(rows)\ndef _hidden(): pass")
    here("def f(:", "own_rewards_typo")
    here("import own_rewards_not_there", "own_rewards_needs")
    with pytest.raises(UserError) as refusal:
        function(name)
    assert f"stages.ppo.rewards.mine.function={name}: " in str(refusal.value)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
