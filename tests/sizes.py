"""Hyperparameters with which every method fits models as small as those of the tests."""

from inlay.methods import METHODS

SIZES = {
    **{method.name: {"r": 4} for method in METHODS},
    **{name: {"r": 16} for name in ("bat", "bat_col", "randlora")},
    "dota": {"bond": 4},
}
