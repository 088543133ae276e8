"""What each task does with data, losses and answers: one file each. `kinds` says what models they train."""

from inlay.workbench.tasks.classification import Classification
from inlay.workbench.tasks.language_modelling import LanguageModelling
from inlay.workbench.tasks.preference import Preference
from inlay.workbench.tasks.seq2seq import Seq2Seq
from inlay.workbench.tasks.task import Task
from inlay.workbench.tasks.vision import Vision

TASKS: dict[str, Task] = {
    "instruction": Task(),
    "language_modelling": LanguageModelling(),
    "preference": Preference(),
    "classification": Classification(),
    "seq2seq": Seq2Seq(),
    "vision": Vision(),
}
