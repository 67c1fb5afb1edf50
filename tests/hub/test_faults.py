"""A Hub that refuses, is overloaded or hangs up; a disk that is full. The model stays, and the next push succeeds."""

import errno
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from ..loopback_hub import Hub
from ..models.builders import make_model
from .examples import logits

COMMIT = "/commit/main$"


def push(model, repo_id: str = "me/tiny"):
    return model.push_to_hub(repo_id, license="mit", max_shard_size="20KB")


def assert_recovers(model, hub: Hub, before: dict[str, torch.Tensor]) -> None:
    """After a failed push: the model is what it was, the repository holds nothing half done, the next push succeeds."""
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hub.repositories.get("me/tiny", {}) == {}
    hub.faults.clear()
    push(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(model))


@pytest.fixture
def model():
    return make_model("mamba2")


@pytest.fixture
def before(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


REFUSALS = {
    "401 create": ("POST", "/api/repos/create", 401),
    "403 create": ("POST", "/api/repos/create", 403),
    "403 commit": ("POST", COMMIT, 403),
    "404 commit": ("POST", COMMIT, 404),
    "409 commit": ("POST", COMMIT, 409),
    "403 weights": ("PUT", "/lfs/", 403),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refusal_is_not_repeated(fault: str, model, before, hub: Hub, no_waiting: list[float]) -> None:
    method, path, status = REFUSALS[fault]
    hub.fail(method, path, status, times=100)
    with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:
        push(model)
    cause = (
        caught.value.__cause__ if isinstance(caught.value, RuntimeError) and caught.value.__cause__ else caught.value
    )
    assert cause.response.status_code == status
    assert no_waiting == [] and "hf_test" not in str(caught.value)
    assert_recovers(model, hub, before)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["/api/repos/create", "/lfs/", COMMIT], ids=["create", "weights", "commit"])
def test_an_overloaded_hub_is_waited_for(path: str, status: int, model, hub: Hub, no_waiting: list[float]) -> None:
    hub.fail("PUT" if path == "/lfs/" else "POST", path, status, times=2, Retry_After="7")
    push(model)
    # huggingface_hub's own retries, of the weights, add a second for rounding
    assert len(no_waiting) == 2 and all(pause in (7, 8) for pause in no_waiting)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(model))


def test_a_long_pause_is_cut_short(model, hub: Hub, no_waiting: list[float]) -> None:
    hub.fail("POST", COMMIT, 429, times=1, Retry_After="86400")
    push(model)
    assert no_waiting == [60]


def test_a_hub_that_stays_out_of_order_is_given_up(model, before, hub: Hub, no_waiting: list[float]) -> None:
    hub.fail("POST", COMMIT, 502, times=100)
    with pytest.raises(HfHubHTTPError, match="502"):
        push(model)
    assert no_waiting == [1, 2, 4, 8]
    # each shard was sent once, and the next push sends none
    sent = hub.count("PUT", "/lfs/")
    assert sent == len(set(path for method, path in hub.requests if method == "PUT"))
    assert_recovers(model, hub, before)
    assert hub.count("PUT", "/lfs/") == sent


@pytest.mark.parametrize("path", ["/lfs/", COMMIT], ids=["weights", "commit"])
def test_a_connection_cut_while_sending(path: str, model, hub: Hub, no_waiting: list[float]) -> None:
    hub.cut("PUT" if path == "/lfs/" else "POST", path, after=1000)
    push(model)
    assert len(no_waiting) == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(model))


def test_an_interrupted_upload_goes_on_where_it_was(model, before, hub: Hub, no_waiting: list[float]) -> None:
    """Weights in several parts through LFS: the shards that arrived are not sent again."""
    hub.part_size = 4000
    model.push_to_hub("me/other", license="mit", max_shard_size="20KB")
    shards = sum(name.endswith(".safetensors") for name in hub.repositories["me/other"])
    assert shards > 2 and hub.count("POST", "^/lfs/") == shards
    hub.objects.clear()
    hub.requests.clear()
    hub.fail("POST", "^/lfs/", 403, times=1)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        push(model)
    arrived = hub.count("POST", "^/lfs/") - 1
    hub.requests.clear()
    assert_recovers(model, hub, before)
    assert hub.count("POST", "^/lfs/") == shards - arrived


def test_a_foreign_namespace_is_refused(model, before, hub: Hub) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        push(model, "you/tiny")
    assert caught.value.response.status_code == 403 and "you/tiny" not in hub.repositories
    assert_recovers(model, hub, before)


def test_a_missing_repository_is_named(hub: Hub) -> None:
    with pytest.raises(OSError, match="me/nothing") as caught:
        AutoModelForCausalLM.from_pretrained("me/nothing")
    assert isinstance(caught.value.__cause__, RepositoryNotFoundError)


def test_a_download_cut_in_the_middle_goes_on(model, hub: Hub, no_waiting: list[float]) -> None:
    model.push_to_hub("me/tiny", license="mit")
    hub.cut("GET", "model.safetensors$", after=5000)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(model))
    assert hub.count("GET", "model.safetensors$") == 2


def test_a_full_disk_leaves_nothing_that_loads(model, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model.push_to_hub("me/tiny", license="mit")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", fill_the_disk)
        with pytest.raises(OSError, match="No space left on device"):
            AutoModelForCausalLM.from_pretrained("me/tiny")
    weights = [
        file for file in Path(constants.HF_HUB_CACHE).rglob("*") if file.is_file() and file.stat().st_size > 4000
    ]
    assert weights == []
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(model))


def fill_the_disk(url: str, temp_file, **kwargs) -> None:
    temp_file.write(b"half of it")
    temp_file.flush()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
