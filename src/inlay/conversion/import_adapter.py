"""From PEFT's own adapters to Inlay's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from inlay.conversion.peft_folder import PeftFolder, read_peft_folder
from inlay.conversion.peft_translation import translate, write_translation
from inlay.files.atomic import new_folder
from inlay.models.adapters import Adapter

IMPORTED = "imported.json"  # in the folder: where it came from, and what was noted


@dataclass(frozen=True)
class Imported:
    """Hold an adapter made from one of PEFT's: its folder, its method, how many weights it changes, and notes."""

    folder: Path
    method: str
    weights: int
    notes: tuple[str, ...]


def import_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    initial: str | Path | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write a LoRA, MiSS or Bone adapter of PEFT as an Inlay adapter with the same outputs.

    A LoRA becomes `lora`, MiSS and Bone become `bone` or, where the weight guides its update, `bat_col`. PEFT trains
    PiSSA, OLoRA, LoRA-GA and CorDA on W − s B₀ A₀ and stores neither that nor the start: B₀ A₀ is computed again where
    it is a function of W (PiSSA by full SVD, OLoRA), or read from `initial`. PiSSA becomes `pissa` with its start
    stored; the others, which are no method here, an exact `lora` of twice the rank. Where PEFT rounded W − s B₀ A₀ to
    half precision, outputs agree to that rounding, which is not repeated.

    Args:
        adapter: a PEFT adapter's folder, or a folder with one in `adapter/`; safetensors only.
        out: appears whole or not at all.
        model: the base, if not the one the adapter names. Its weights are read for starts alone, one at a time, and
            sampled for the seals where they are on this machine.
        initial: the same adapter as it was saved before training, for starts that are random or came from data (it is
            what PEFT calls `path_initial_model_for_weight_conversion`).
        overwrite: replace an earlier import at `out`.

    Raises:
        ValueError: no such adapter, a broken one, a kind or variant with no equal here, or a start that is lost.
    """
    source = read_peft_folder(Adapter.open(adapter, model))
    first = None if initial is None else read_peft_folder(Adapter.open(initial, source.base))
    return import_opened(source, Path(out), first, overwrite, str(adapter))


def import_opened(source: PeftFolder, out: Path, first: PeftFolder | None, overwrite: bool, name: str) -> Imported:
    """Write an opened PEFT adapter as an Inlay adapter (see `import_adapter`).

    Args:
        source: the adapter.
        out: the folder of the new one.
        first: the same adapter before training, if it was given.
        overwrite: replace an earlier import at `out`.
        name: what the user called the adapter.
    """
    with new_folder(out, overwrite, marker=IMPORTED) as part:
        translation = translate(source, first)
        write_translation(part, source, translation)
        about = {"adapter": name, "peft_type": source.kind, "notes": translation.notes}
        (part / IMPORTED).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    return Imported(out, translation.method, len(translation.settings), tuple(translation.notes))
