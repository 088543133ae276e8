"""How a method lives in a model. The only rooms of the library that import PEFT, beside the workbench.

Importing any file of it registers the adapter type with PEFT.
"""

from inlay.host.tuner import register

register()
