"""Fetching weights from a server in this process: cut off, gone on with, checked, and nothing left behind."""

import argparse
import dataclasses
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from ldm_tools import fetch_weights

from ldm.checkpoint import CheckpointError

CONTENT = bytes(range(256)) * 40


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT. cut: bytes after which it hangs up, for each answer.  ranges: whether it knows of them."""

    cut: ClassVar[list[int]] = []
    ranges = True
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.ranges else 0
        type(self).asked.append(self.headers["Range"])
        if self.path != "/small" or start >= len(CONTENT):
            self.send_error(404 if self.path != "/small" else 416)
            return
        self.send_response(206 if start and self.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        limit = self.cut.pop(0) if self.cut else len(CONTENT)
        self.wfile.write(CONTENT[start : start + limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch_weights.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Server, "cut", [])
    monkeypatch.setattr(Server, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def known(monkeypatch, server):
    """A published file, served here."""
    entry = fetch_weights.Known(
        "small.safetensors",
        "a small file",
        "https://example.org/small",
        f"{server}/small",
        hashlib.sha256(CONTENT).hexdigest(),
        lambda: pytest.fail("no folder was asked for"),
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
    offline = dataclasses.replace(known, url="http://127.0.0.1:1/nobody")
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
    with pytest.raises(CheckpointError) as error:
        fetch_weights.fetch(dataclasses.replace(known, url="http://127.0.0.1:1/nobody"), tmp_path)
    message = str(error.value)
    assert message.startswith("small.safetensors cannot be fetched (URLError: ")
    assert message.endswith(
        f"): get it from https://example.org/small, put it at {tmp_path / known.file} and run "
        f"`ldm fetch-weights --check {tmp_path / known.file}`"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_gone_is_not_asked_again_and_again(known, server, tmp_path):
    with pytest.raises(CheckpointError, match="HTTP Error 404"):
        fetch_weights.fetch(dataclasses.replace(known, url=f"{server}/gone"), tmp_path)
    assert len(Server.asked) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(known, tmp_path):
    Server.cut[:] = [1000, 2000]
    assert "as published" in fetch_weights.fetch(known, tmp_path)
    assert Server.asked == ["bytes=0-", "bytes=1000-", "bytes=3000-"]
    assert [path.name for path in tmp_path.iterdir()] == [known.file]


def test_a_killed_download_is_gone_on_with_by_the_next_call(known, tmp_path):
    (tmp_path / "small.safetensors.partial").write_bytes(CONTENT[:5000])
    assert "as published" in fetch_weights.fetch(known, tmp_path)
    assert Server.asked == ["bytes=5000-"]
    assert [path.name for path in tmp_path.iterdir()] == [known.file]


def test_a_download_that_was_whole_when_it_was_killed_is_only_checked(known, tmp_path):
    (tmp_path / "small.safetensors.partial").write_bytes(CONTENT)
    assert "as published" in fetch_weights.fetch(known, tmp_path)
    assert (tmp_path / known.file).read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(known, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "ranges", False)
    (tmp_path / "small.safetensors.partial").write_bytes(CONTENT[:5000])
    assert "as published" in fetch_weights.fetch(known, tmp_path)


def test_what_was_fetched_of_another_file_is_thrown_away(known, tmp_path):
    (tmp_path / "small.safetensors.partial").write_bytes(b"another file's beginning")
    with pytest.raises(CheckpointError, match="cut short or another file; fetch it again"):
        fetch_weights.fetch(known, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_breaks_off_for_good_is_given_up_and_its_bytes_are_kept(known, tmp_path):
    Server.cut[:] = [1000] + [0] * 20
    with pytest.raises(CheckpointError, match=r"has 1,000 bytes, and a second call goes on behind them"):
        fetch_weights.fetch(known, tmp_path)
    assert len(Server.asked) == 1 + fetch_weights.TRIES
    Server.cut.clear()
    assert "as published" in fetch_weights.fetch(known, tmp_path)


def test_a_folder_that_an_older_version_left_is_removed(known, tmp_path):
    (tmp_path / "small.safetensors.partial" / ".cache").mkdir(parents=True)
    (tmp_path / "small.safetensors.partial" / ".cache" / "half").write_bytes(b"x")
    assert "as published" in fetch_weights.fetch(known, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [known.file]


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


@pytest.mark.parametrize("name", ["v1-5-pruned-emaonly", "v1-5-pruned"])
def test_the_hub_is_asked_for_the_published_repository(name):
    assert fetch_weights.KNOWN[name].url == (
        f"https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/{name}.safetensors"
    )


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
