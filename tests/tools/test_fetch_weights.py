"""Fetching weights, with the network's place taken by a function."""

import argparse
import dataclasses
import hashlib
from pathlib import Path

import pytest
from ldm_tools import fetch_weights

from ldm.checkpoint import CheckpointError

CONTENT = b"weights, as published"


@pytest.fixture
def known(monkeypatch):
    """A published file that is fetched without a network."""

    def download(known, folder):
        (folder / known.file).write_bytes(CONTENT)
        return folder / known.file

    entry = fetch_weights.Known(
        "small.safetensors",
        "a small file",
        "https://example.org/small",
        hashlib.sha256(CONTENT).hexdigest(),
        lambda: pytest.fail("no folder was asked for"),
        download,
    )
    monkeypatch.setattr(fetch_weights, "KNOWN", {"small": entry})
    return entry


def call(*arguments):
    parser = argparse.ArgumentParser()
    fetch_weights.add_arguments(parser)
    fetch_weights.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_file_is_fetched_checked_and_put_in_its_place(known, tmp_path, capsys):
    call("small", "--to", tmp_path / "weights")
    assert (tmp_path / "weights" / known.file).read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [known.file]
    assert f"{tmp_path / 'weights' / known.file}: as published, SHA-256 {known.sha256}" in capsys.readouterr().out


def test_a_file_that_is_here_is_checked_and_not_fetched_again(known, tmp_path, capsys):
    offline = dataclasses.replace(known, download=lambda known, folder: pytest.fail("fetched again"))
    (tmp_path / known.file).write_bytes(CONTENT)
    assert "as published" in fetch_weights.fetch(offline, tmp_path)
    (tmp_path / known.file).write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match="cut short or another file"):
        fetch_weights.fetch(offline, tmp_path)


def test_another_file_than_the_published_one_is_thrown_away(known, tmp_path):
    other = dataclasses.replace(known, sha256="0" * 64)
    fetch_weights.KNOWN["small"] = other
    with pytest.raises(CheckpointError, match=f"expected {'0' * 64}: it is cut short or another file"):
        fetch_weights.fetch(other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_one_line_says_which_file_to_put_where(known, tmp_path):
    def fail(known, folder):
        raise ConnectionError("Name or service\nnot known")

    with pytest.raises(CheckpointError) as error:
        fetch_weights.fetch(dataclasses.replace(known, download=fail), tmp_path)
    message = str(error.value)
    assert message == (
        "small.safetensors cannot be fetched (ConnectionError: Name or service not known): get it from "
        f"https://example.org/small, put it at {tmp_path / known.file} and run "
        f"`ldm fetch-weights --check {tmp_path / known.file}`"
    )


def test_a_file_without_a_published_hash_is_called_that(known, tmp_path, capsys):
    fetch_weights.KNOWN["small"] = dataclasses.replace(known, sha256=None)
    (tmp_path / known.file).write_bytes(CONTENT)
    call("--check", tmp_path / known.file)
    assert f"SHA-256 {hashlib.sha256(CONTENT).hexdigest()}; no published one is known here" in capsys.readouterr().out


def test_names_that_are_not_known(known, tmp_path):
    with pytest.raises(CheckpointError, match="'large', expected one of small"):
        call("large")
    with pytest.raises(CheckpointError, match="no hash is known for a file of this name"):
        call("--check", tmp_path / "other.safetensors")


def test_the_list_says_what_is_here(known, tmp_path, capsys):
    call("--list", "--to", tmp_path)
    assert f"{tmp_path / known.file}: not here" in capsys.readouterr().out
    call("small", "--to", tmp_path)
    call("--list", "--to", tmp_path)
    assert f"{tmp_path / known.file}: here" in capsys.readouterr().out


def test_the_hub_is_asked_for_the_published_repository(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = {}

    def hf_hub_download(repository, file, local_dir):
        asked.update(repository=repository, file=file)
        (local_dir / file).write_bytes(CONTENT)
        return str(local_dir / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    known = fetch_weights.KNOWN["v1-5-pruned-emaonly"]
    with pytest.raises(CheckpointError, match=f"expected {known.sha256}"):
        fetch_weights.fetch(known, tmp_path)
    assert asked == {
        "repository": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "file": "v1-5-pruned-emaonly.safetensors",
    }


def test_alexnet_goes_where_torchvision_looks_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    known = fetch_weights.KNOWN["lpips-alexnet"]
    assert known.folder() == tmp_path / "checkpoints"
    assert known.file.split("-")[-1] == f"{known.sha256}.pth"  # torch hub's own rule for names


def test_gigabytes_go_into_the_checkout_or_the_current_folder_but_never_into_site_packages(monkeypatch, tmp_path):
    folder = fetch_weights.KNOWN["v1-5-pruned-emaonly"].folder
    assert folder() == fetch_weights.PACKAGE.parent / "weights"
    monkeypatch.setattr(fetch_weights, "PACKAGE", tmp_path / "site-packages" / "ldm")
    monkeypatch.setattr(fetch_weights, "WEIGHTS", tmp_path / "site-packages" / "ldm" / "weights")
    assert folder() == Path("weights")
