"""A hub out of reach is one line, in seconds."""

import socket

import datasets
import pytest
from helpers import fails
from huggingface_hub import constants

from inlay.data.readers import read_records
from inlay.models import hub


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A machine without network, where no library was told so."""

    def nothing(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", nothing)
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


def test_a_hub_out_of_reach_is_one_line(unreachable, capsys):
    said = fails(capsys, "methods", "--model", "no-such/model")
    assert (
        "model 'no-such/model' is no folder here and is not in the cache, and huggingface.co cannot be reached; "
        "give a local folder" in said
    )
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match=r"no-such/data: no local file, .* huggingface.co cannot be reached"):
        read_records("no-such/data")
    assert datasets.config.HF_HUB_OFFLINE
    said = fails(capsys, "train", "--push-to-hub", "me/adapter")
    assert "push_to_hub: me/adapter cannot be written: huggingface.co cannot be reached" in said


def test_what_the_cache_holds_is_used(unreachable, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: f"/cache/{name}/{file}")
    hub.check_hub_model("owner/name", None)
    assert constants.HF_HUB_OFFLINE


def test_a_variable_that_says_offline_is_named(unreachable, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; give a local folder" in fails(capsys, "methods", "--model", "no-such/model")


def test_a_hub_behind_a_proxy_is_asked(unreachable, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.reachable("https://huggingface.co")
