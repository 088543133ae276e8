"""Models and data that several test files share. Model fixtures give a fresh copy to every test."""

import contextlib
import copy
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from inlay.models import builtin

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores
if device := os.environ.get(
    "INLAY_TEST_DEVICE"
):  # the tests of the mathematics run there as they are: see `make test-gpu`
    torch.set_default_device(device)

FOREIGN = (  # warnings that are errors in this project but come from a dependency's own use of another
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # peft and trl call transformers by old names
    "ignore:Attempting to run cuBLAS:UserWarning",  # torch, in the first backward pass of a process
)


def pytest_configure(config):
    for line in FOREIGN:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What tests keep is gone after them; of the user's own cache they only read the built-in model."""
    folder = tmp_path_factory.mktemp("cache")
    with contextlib.suppress(ValueError):  # it is not installed: the tests that need it will say so
        model = builtin.model_dir()
        (folder / model.name).symlink_to(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INLAY_CACHE", str(folder))
        patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it, and what is printed goes by it
        yield folder


@pytest.fixture(scope="session", autouse=True)
def painted():
    """Figures are composed but not painted, a third of a short run; `with painted():` a test may look."""
    paint = Figure.savefig

    def savefig(self, file, **_):
        if isinstance(file, io.TextIOBase):
            file.write("<svg></svg>")
        else:
            Path(file).write_bytes(b"")

    @contextlib.contextmanager
    def painted():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", paint)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield painted


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_original():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(llama_original):
    """A random Llama whose linear layers are 64, 96 or 32 wide."""
    return copy.deepcopy(llama_original)


@pytest.fixture(scope="session")
def gpt2_original():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2(gpt2_original):
    """A random GPT-2: its linear layers are transformers' Conv1D, with the weight as (in × out)."""
    return copy.deepcopy(gpt2_original)


@pytest.fixture(scope="session")
def real_model():
    """The model that comes with the library, fp32. Shared by all tests: copy it before changing anything."""
    from inlay.models.builtin import load_builtin_model

    return load_builtin_model(dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real_tokenizer():
    from inlay.models.builtin import load_builtin_tokenizer

    return load_builtin_tokenizer()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real datasets, named by the environment variable INLAY_DATA."""
    folder = os.environ.get("INLAY_DATA")
    if not folder:
        pytest.skip("INLAY_DATA is not set: no folder with real data")
    if not Path(folder).is_dir():
        pytest.skip(f"INLAY_DATA={folder} is not a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    """The built-in tokenizer with the first 1,024 of its words: the head of a model is then no larger than its body."""
    folder = tmp_path_factory.mktemp("tokenizer")
    builtin.load_builtin_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    vocab = about["model"]["vocab"] = {word: i for word, i in about["model"]["vocab"].items() if i < 1024}
    merges = about["model"]["merges"]
    about["model"]["merges"] = [pair for pair in merges if all(word in vocab for word in (*pair, "".join(pair)))]
    file.write_text(json.dumps(about))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(small_tokenizer, tmp_path_factory) -> str:
    """A random two-layer Llama with the small tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(small_tokenizer), max_position_embeddings=256, pad_token_id=small_tokenizer.pad_token_id,
        bos_token_id=small_tokenizer.bos_token_id, eos_token_id=small_tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    rows = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def phone():
    """Opens files in Chromium, in the dark and as wide as a phone. They ask for nothing and log nothing, are no wider
    than the screen, and all that their plots say is large enough and inside of them."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 375, "height": 800}, color_scheme="dark")
        heard = []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda asked: heard.append(asked.url) if asked.url.startswith("http") else None)

        def open_file(path):
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            for ink in ("(document.body).color", "(document.querySelector('svg text')).fill"):
                assert int(page.evaluate(f"getComputedStyle{ink}").split("(")[1].split(",")[0]) > 200
            heights = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
            assert min(page.evaluate(heights)) >= 8
            inside = """[...document.querySelectorAll('svg text')].every(text => {
                const out = text.closest('svg').getBoundingClientRect(), own = text.getBoundingClientRect();
                const x = Math.min(own.left - out.left, out.right - own.right);
                return Math.min(x, own.top - out.top, out.bottom - own.bottom) > -2; })"""
            assert page.evaluate(inside)
            return page

        yield open_file
        assert heard == []
        chromium.close()
