"""Hyperparameters that are wrong, or do not fit a weight, are refused by name."""

import re

import pytest
from contract import Net, adapt
from torch import nn

from inlay import methods
from inlay.host.config import InlayConfig
from inlay.method import Method
from inlay.methods.bat import Bat
from inlay.methods.bat_col import BatCol
from inlay.methods.bone import Bone
from inlay.methods.dota import DoTA
from inlay.methods.lamda import LaMDA
from inlay.methods.lora import LoRA
from inlay.methods.milora import MiLoRA
from inlay.methods.pissa import PiSSA

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


WRONG = [
    ("unknown", {}, ["unknown", *(m.name for m in methods.METHODS)]),
    ("lora", {"rank": 4}, ["rank", "r", "alpha", "scale", "dropout"]),
    ("lora", {"r": 0}, ["r=0", "1"]),
    ("lora", {"r": -3}, ["r=-3"]),
    ("lora", {"r": 4.0}, ["r=4.0", "whole number"]),
    ("lora", {"r": "4"}, ["r='4'", "whole number"]),
    ("lora", {"r": True}, ["r=True", "whole number"]),
    ("lora", {"r": None}, ["r=None"]),
    ("lora", {"alpha": 16, "scale": 2.0}, ["alpha=16", "scale=2.0"]),
    ("lora", {"alpha": -1}, ["above 0"]),
    ("pissa", {"scale": -1.0}, ["-1.0", "above 0"]),
    ("pissa", {"scale": 0.0}, ["above 0"]),
    ("bone", {"scale": True}, ["scale=True", "number"]),
    ("bone", {"scale": "1"}, ["scale='1'", "number"]),
    ("bone", {"scale": float("nan")}, ["scale=nan"]),
    ("bone", {"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
    ("bone", {"dropout": -0.1}, ["dropout=-0.1"]),
    ("bone", {"dropout": None}, ["dropout=None"]),
    ("milora", {"side": "major"}, ["side='major'", "minor", "middle", "random"]),
    ("lamda", {"init": "zero"}, ["init='zero'", "svd", "svd_zero", "kaiming"]),
    ("lamda", {"eta": 0.0}, ["eta=0.0", "above 0"]),
    ("lamda", {"eta": 1.5}, ["eta=1.5", "above 1"]),
    ("lamda", {"stages": 0}, ["stages=0", "below 1"]),
    ("lamda", {"freeze_order": "first"}, ["freeze_order='first'", "largest", "smallest"]),
    ("milora", {"side": ["minor"]}, ["side=['minor']"]),
    ("dota", {"r": 8}, ["'r'", "bond", "cores", "shapes", "init"]),
    ("dota", {"bond": 0}, ["bond=0", "1"]),
    ("dota", {"bond": 4.0}, ["bond=4.0", "whole number"]),
    ("dota", {"cores": 0}, ["cores=0", "1"]),
    ("dota", {"init": "svd"}, ["init='svd'", "mpo", "random"]),
    ("dota", {"shapes": 4}, ["shapes=4", "[[o_1..o_N], [i_1..i_N]]", "{dimension: factors}"]),
    ("dota", {"shapes": [[4, 6]], "cores": 2}, ["shapes=[[4, 6]]", "pair"]),
    ("dota", {"shapes": [[4, 6], [5, 8]]}, ["[4, 6]", "2 factors", "cores=5", "set cores=2"]),
    ("dota", {"shapes": [[4, 6], [5, 8.0]], "cores": 2}, ["[5, 8.0]", "whole numbers"]),
    ("dota", {"shapes": [[4, 0], [5, 8]], "cores": 2}, ["[4, 0]", "from 1 on"]),
    ("dota", {"shapes": {"40": [5, 9]}, "cores": 2}, ["[5, 9]", "45", "40", "[5, 8]"]),
    ("dota", {"shapes": {"wide": [5, 8]}, "cores": 2}, ["'wide'", "whole numbers as keys"]),
]


@pytest.mark.parametrize(("name", "args", "words"), WRONG, ids=lambda v: str(v) if not isinstance(v, list) else "")
def test_a_wrong_hyperparameter_is_refused_with_its_value_and_the_choices(name, args, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        InlayConfig(method=name, args=args, target_modules=["layer"])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LoRA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (PiSSA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (MiLoRA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (LaMDA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (Bone(r=41), ["layer", "r=41", "40"]),
        (Bat(r=5), ["layer", "r=5", "24 × 40", "[1, 2, 4, 8]"]),
        (BatCol(r=3), ["layer", "r=3", "24 × 40", "[1, 2, 4, 8]"]),
        (
            DoTA(cores=2, shapes=[[4, 6], [5, 9]]),
            ["layer", "[5, 9]", "45", "40", "[5, 8]", "{dimension: factors}"],
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, Method) else "",
)
def test_a_hyperparameter_that_does_not_fit_the_weight_is_refused_by_name(method, words):
    net = Net((24, 40))
    with pytest.raises(ValueError, match=words[0]) as error:
        adapt(net, method)
    assert all(word in str(error.value) for word in words)
    assert type(net.layer) is nn.Linear


def test_whole_numbers_are_welcome_where_a_float_is_asked_for():
    assert LoRA(r=8, alpha=16).s == 2.0
    assert Bone(scale=2).s == 2.0
