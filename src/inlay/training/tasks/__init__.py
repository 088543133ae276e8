"""What each task does with data, losses and answers: one file each. `kinds` says what models they train."""

from inlay.training.tasks.classification import Classification
from inlay.training.tasks.grpo import GRPO
from inlay.training.tasks.instruction import Task
from inlay.training.tasks.kto import KTO
from inlay.training.tasks.language_modelling import LanguageModelling
from inlay.training.tasks.preference import Preference
from inlay.training.tasks.reference_free import ORPO, SimPO
from inlay.training.tasks.reward import Reward
from inlay.training.tasks.seq2seq import Seq2Seq
from inlay.training.tasks.vision import Vision

TASKS: dict[str, Task] = {
    "instruction": Task(),
    "language_modelling": LanguageModelling(),
    "preference": Preference(),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "kto": KTO(),
    "reward": Reward(),
    "grpo": GRPO(),
    "classification": Classification(),
    "seq2seq": Seq2Seq(),
    "vision": Vision(),
}
