"""How a method lives in a model. The only rooms of the library that import PEFT, beside the workbench."""
