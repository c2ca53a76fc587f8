"""Manifests of folders and of single files."""

import os

import pytest

from lcx.core import manifest
from lcx.core.manifest import DamagedError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.bin", "in/b.bin", "c.bin"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    manifest.write(tmp_path, most=400)
    return tmp_path


def test_every_damage_has_its_sentence(folder):
    found = manifest.read(folder / manifest.NAME)
    assert found.files["a.bin"][1] is None and list(found.files) == ["a.bin", "c.bin", "in/b.bin"] and found.bytes == 1800
    manifest.write(folder)
    found = manifest.read(folder / manifest.NAME)
    assert [found.fault(name) for name in found.files] == [None] * 3
    (folder / "a.bin").write_bytes(b"x" * 500)
    (folder / "c.bin").write_bytes(b"x")
    (folder / "in/b.bin").unlink()
    assert [found.fault(name) for name in found.files] == [
        "has other contents than were written",
        "has 1 bytes instead of 500",
        "is missing",
    ]
    assert found.fault("a.bin", least=True) is None
    with pytest.raises(DamagedError, match=r"a.bin has other contents than were written; .* lcx verify \S+ --update"):
        manifest.check_file(folder / "a.bin")
    with pytest.raises(DamagedError, match="b.bin is missing"):
        manifest.check_file(folder / "in/b.bin")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", None])
def test_a_damaged_manifest_is_one(folder, content):
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b"500", b"501") if content is None else content)
    with pytest.raises(DamagedError, match="checksums.json is damaged"):
        manifest.read(path)
    path.unlink()
    with pytest.raises(DamagedError, match="checksums.json is missing"):
        manifest.read(path)
    manifest.check_file(folder / "c.bin")  # of which nothing says anything


def test_a_single_file_has_a_manifest_beside_it(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    manifest.write(tmp_path, [file.name], manifest.next_to(file).name)
    manifest.check_file(file)
    file.write_bytes(b"GGUf")
    with pytest.raises(DamagedError, match="m.gguf has other contents"):
        manifest.check_file(file)


def test_a_large_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "LARGE", 10)
    file = tmp_path / "a"
    file.write_bytes(b"0" * 20)
    before = manifest.file_hash(file)
    hits = manifest._hash_once.cache_info().hits
    os.replace(file, tmp_path / "b")
    assert manifest.file_hash(tmp_path / "b") == before and manifest._hash_once.cache_info().hits == hits + 1
    (tmp_path / "b").write_bytes(b"1" * 20)
    os.utime(tmp_path / "b", ns=(1, 1))
    assert manifest.file_hash(tmp_path / "b") != before
