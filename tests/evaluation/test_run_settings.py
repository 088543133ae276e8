"""What is asked of a run's model has the run's system message and arguments of the chat template."""

import pytest
import yaml

from inlay.evaluation.eval_tasks import Question
from inlay.evaluation.evaluate import asked_as_trained
from inlay.evaluation.run_settings import ChatSettings, chat_settings

ASK = {"role": "user", "content": "2 + 2?"}
RULE = {"role": "system", "content": "Be brief."}
OTHER = {"role": "system", "content": "Be long."}


@pytest.fixture
def run(tmp_path):
    def run(**recipe):
        (tmp_path / "run" / "adapter").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "run"

    return run


def test_a_run_and_its_adapter_say_the_same(run):
    folder = run(system="Be brief.", chat_template_kwargs={"enable_thinking": False})
    wanted = ChatSettings("Be brief.", {"enable_thinking": False})
    assert chat_settings(folder) == chat_settings(folder / "adapter") == wanted
    assert chat_settings("owner/name") == chat_settings(folder / "none") == ChatSettings()


@pytest.mark.parametrize(
    ("recipe", "system"),
    [
        ({"data": ["a", "b"], "system": "S"}, "S"),
        ({"data": [{"path": "a", "system": "A"}, {"path": "b", "system": "B"}], "system": "S"}, None),
        ({"data": [{"path": "a", "system": "A"}]}, "A"),
        ({"data": [{"path": "a", "system": "S"}, {"path": "b"}], "system": "S"}, "S"),
        ({"data": [{"path": "a", "system": "S"}, {"path": "b"}]}, None),
        ({"data": "a", "task": "classification"}, None),
    ],
)
def test_the_system_message_of_a_mixture_is_that_of_all_its_sources(recipe, system, run):
    assert chat_settings(run(**recipe)).system == system


def test_a_damaged_recipe_is_named(run):
    for recipe in ({"system": 4}, {"chat_template_kwargs": "no"}, {"chat_template_kwargs": {"tools": 1}}):
        with pytest.raises(ValueError, match=r"recipe\.yaml: (system|chat_template_kwargs)"):
            chat_settings(run(**recipe))


def test_questions_get_both_unless_they_have_their_own():
    settings = ChatSettings("Be brief.", {"a": 1, "b": 1})
    own = Question([OTHER, ASK], ["4"], about={"chat_template_kwargs": {"b": 2}})
    first, second, text = asked_as_trained([Question([ASK], ["4"]), own, {"text": "once"}], settings)
    assert first.prompt == {"prompt": [RULE, ASK], "chat_template_kwargs": {"a": 1, "b": 1}}
    assert second.prompt == {"prompt": [OTHER, ASK], "chat_template_kwargs": {"a": 1, "b": 2}}
    assert text == {"text": "once"}
    assert asked_as_trained([own], ChatSettings()) == [own]
