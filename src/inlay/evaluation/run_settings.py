"""What a run said of its conversations, for asking its model as it was trained: its system message, its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from inlay.data.chats import Example, Message, template_arguments
from inlay.files.untrusted import DamagedFileError
from inlay.messages import short
from inlay.recipe.reading import read_yaml

RECIPE = "recipe.yaml"
KEPT = ("adapter", "model")  # the folders in a run's that hold what was trained


@dataclass(frozen=True)
class ChatSettings:
    """Hold the system message and the arguments of the chat template that conversations get unless they have own ones.

    Attributes:
        system: the system message; None where there is none, or each source of the data had another.
        arguments: of the chat template.
    """

    system: str | None = None
    arguments: dict[str, object] = field(default_factory=dict)

    def chat(self, chat: list[Message]) -> list[Message]:
        """Return a conversation with the system message in front, if it has none."""
        if self.system is None or (chat and chat[0]["role"] in ("system", "developer")):
            return chat
        return [{"role": "system", "content": self.system}, *chat]

    def example(self, example: Example) -> Example:
        """Return an example whose prompt is a conversation with both; any other as it is."""
        if not isinstance(example.get("prompt"), list):
            return example
        arguments = {**self.arguments, **(example.get("chat_template_kwargs") or {})}
        about = {"chat_template_kwargs": arguments} if arguments else {}
        return {**example, "prompt": self.chat(example["prompt"]), **about}


def chat_settings(path: str | Path) -> ChatSettings:
    """Return what the run in a folder, or whose adapter or model a folder is, said of its conversations.

    Args:
        path: the folder; of another kind, or a hub's name, it says nothing.

    Raises:
        ValueError: the run's recipe is damaged.
    """
    folder = Path(path)
    inner = folder.resolve().parent if folder.name in KEPT else folder
    recipe = next((file for file in (folder / RECIPE, inner / RECIPE) if file.is_file()), None)
    if recipe is None:
        return ChatSettings()
    return settings_of(read_yaml(str(recipe)), f"{recipe}: ")


def settings_of(said: dict[str, object], where: str = "") -> ChatSettings:
    """Return what the fields of a recipe say of conversations; `where` they stand is for messages.

    Raises:
        ValueError: a field has a value of another type.
    """
    if said.get("task") in ("classification", "language_modelling"):
        return ChatSettings()
    data = said.get("data")
    systems = [one.get("system") for one in data if isinstance(one, dict)] if isinstance(data, list) else []
    systems = [said.get("system") if one is None else one for one in systems or [None]]
    texts = [one for one in systems if one is None or isinstance(one, str)]
    if len(texts) < len(systems):
        raise DamagedFileError(f"{where}system is {short(systems)}; accepted: text")
    same = all(one == texts[0] for one in texts)
    arguments = template_arguments(said.get("chat_template_kwargs"), f"{where}chat_template_kwargs")
    return ChatSettings(texts[0] if same else None, arguments)
