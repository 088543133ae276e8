"""PEFT's own tests on our configs: `make peft-suite`. None of its code is here; what runs is fetched."""
