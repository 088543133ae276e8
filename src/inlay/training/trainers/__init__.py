"""The trainers that tasks use, between trl's and transformers' and a run: faults, stops, losses, several processes."""
