"""The safetensors container: against the library, both ways, and at the size of the published file."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny_checkpoints import FORMAT, manifest

from ldm.checkpoint.container import DTYPES, CheckpointError, Header, LazyTensor, TensorFile, sha256, write_tensors

TENSORS = {
    "b": torch.randn(3, 2),
    "a": torch.randn(5).half(),
    "é.scalar": torch.tensor(3, dtype=torch.int32),
    "ids": torch.arange(4),
    "c": torch.randn(1, 2, 3).bfloat16(),
    "d": torch.randn(2, dtype=torch.float64),
    "none": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "e4m3": torch.randn(4).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(4).to(torch.float8_e5m2),
    "u16": torch.arange(2, dtype=torch.int32).to(torch.uint16),
    "u32": torch.arange(2).to(torch.uint32),
    "u64": torch.arange(2).to(torch.uint64),
    "i16": torch.arange(2, dtype=torch.int16),
}


def lazy(tensors):
    return {name: LazyTensor.of(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [FORMAT, {}, {"format": 'quoted "pt"\n'}])
def test_we_write_the_librarys_bytes(tmp_path, metadata):
    write_tensors(tmp_path / "ours.safetensors", lazy(TENSORS), metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == save(TENSORS, metadata=metadata or None)


@pytest.mark.parametrize("copy", [False, True])
def test_we_read_what_the_library_writes(tmp_path, copy):
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    tensors = TensorFile(tmp_path / "theirs.safetensors").tensors()
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = tensors[name].fetch(copy)
        assert read.dtype == tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(read, tensor)


def test_the_library_reads_what_we_write(tmp_path):
    write_tensors(tmp_path / "ours.safetensors", lazy(TENSORS), {"z": "1", "a": "2"})
    read = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_headers_are_as_large_as_the_published_files():
    # The published file has its tensors in the order of their names, and no padding after the header.
    rows = manifest("single_file_v1-5-pruned-emaonly")
    fields, position = {"__metadata__": FORMAT}, 0
    for name in sorted(rows):
        dtype = getattr(torch, rows[name]["dtype"])
        start, position = position, position + torch.Size(rows[name]["shape"]).numel() * dtype.itemsize
        code = next(code for code, known in DTYPES.items() if known == dtype)
        fields[name] = {"dtype": code, "shape": rows[name]["shape"], "data_offsets": [start, position]}
    published = Header.parse(json.dumps(fields, separators=(",", ":")).encode())
    assert len(published.text) == 156444
    assert published.file_bytes == 4265146304

    tensors = {
        name: LazyTensor(name, tuple(row["shape"]), getattr(torch, row["dtype"]), lambda copy: torch.empty(0))
        for name, row in rows.items()
    }
    assert published.describes(tensors)
    ours = Header.build(tensors, FORMAT)
    assert ours.data_bytes == published.data_bytes
    assert abs(len(ours.text) - len(published.text)) < 16  # other offsets have other numbers of digits
    assert Header.parse(ours.text).entries == ours.entries


def test_a_header_is_reused_only_when_it_describes_the_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, lazy({"b": torch.ones(2), "a": torch.zeros(2)}), FORMAT)
    header = TensorFile(path).header
    assert header.describes(lazy({"a": torch.ones(2), "b": torch.zeros(2)}))
    for other in (
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(3)},
        {"a": torch.ones(2), "b": torch.ones(2).half()},
    ):
        assert not header.describes(lazy(other))
        write_tensors(path, lazy(other), {"new": "yes"}, header)
        assert TensorFile(path).header.metadata == {"new": "yes"}


def test_misaligned_data_is_read_all_the_same(tmp_path):
    path = tmp_path / "a.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    text += b" " * (3 - len(text) % 4)  # 8 + 3 mod 4: no float32 begins at a multiple of its size
    path.write_bytes(len(text).to_bytes(8, "little") + text + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert TensorFile(path).tensors()["a"].fetch(False).tolist() == [1.5, -2.0]


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    before = path.read_bytes()
    file = TensorFile(path)
    mapped = file.tensors()["a"].fetch(False)
    mapped.zero_()
    assert path.read_bytes() == before
    assert file.tensors()["a"].fetch(True).eq(1).all()


def test_a_file_may_be_replaced_while_it_is_mapped(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    mapped = TensorFile(path).tensors()["a"].fetch(False)
    write_tensors(path, lazy({"a": torch.zeros(3)}), FORMAT)
    assert mapped.eq(1).all()


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def fail(copy: bool) -> torch.Tensor:
        raise RuntimeError("no such tensor after all")

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError):
        write_tensors(path, {"a": LazyTensor("a", (2,), torch.float32, fail)}, FORMAT)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_casting_changes_floating_point_tensors_only():
    assert LazyTensor.of("a", torch.ones(2)).cast(torch.float16).fetch(False).dtype == torch.float16
    ids = LazyTensor.of("ids", torch.arange(3))
    assert ids.cast(torch.float16) is ids
    weight = LazyTensor.of("a", torch.ones(2))
    assert weight.cast(None) is weight


def test_sha256_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.checkpoint.container.CHUNK_BYTES", 7)
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    seen: list[int] = []
    assert sha256(path, seen.append) == hashlib.sha256(bytes(range(100))).hexdigest()
    assert sum(seen) == 100
    assert max(seen) == 7


def damaged(path: Path, change) -> Path:
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    path.write_bytes(change(path.read_bytes()))
    return path


ENDLESS = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], r"cut short, \d+ of \d+ bytes: fetch it again"),
        (lambda raw: raw[:40], "cut short within its header"),
        (lambda raw: raw[:5], "not a safetensors file"),
        (lambda raw: raw + b"\0", "1 bytes more than its header tells"),
        (lambda raw: b"\xff" * 8 + raw[8:], "not a safetensors file"),
        (lambda raw: raw.replace(b'"F32"', b'"F8X"', 1), "F8X, which is not read here"),
        (lambda raw: raw.replace(b'{"a"', b'["a"', 1), "its header is not one of safetensors"),
        (lambda raw: raw.replace(b"[0,16]", b"[0,12]", 1), "corrupt"),
        (lambda raw: raw.replace(b"[16,32]", b"[ 8,24]", 1), "corrupt: b begins at byte 8, expected 16"),
        (lambda raw: len(ENDLESS).to_bytes(8, "little") + ENDLESS, "its header is not one of safetensors"),
        (lambda raw: raw.replace(b'"shape"', b'"shope"', 1), "its header is not one of safetensors"),
        (lambda raw: (10**6).to_bytes(8, "little") + b"[" * 10**6, "its header is not one of safetensors"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, change, message):
    path = damaged(tmp_path / "a.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        TensorFile(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
