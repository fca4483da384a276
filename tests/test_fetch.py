"""Fetching: resumed, checked, and whole or not there at all. Addresses here are files."""

import hashlib
import io
import tarfile
from http.client import HTTPException
from pathlib import Path

import pytest

from cmbook.data import fetch
from cmbook.data.fetch import DATASETS, Remote

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def remote(source: Path, **knobs: object) -> Remote:
    facts = {"size": len(CONTENT), "sha256": SHA256} | knobs
    return Remote("set.bin", (source.as_uri(),), **facts)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "elsewhere" / "set.bin"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def test_a_file_is_fetched_once_and_checked_again(tmp_path, source):
    place = fetch.fetch(remote(source), tmp_path / "data", progress=False)
    assert place.read_bytes() == CONTENT
    source.unlink()
    assert fetch.fetch(remote(source), tmp_path / "data", progress=False) == place


@pytest.mark.parametrize("have", [1, 5000, len(CONTENT)])
def test_an_interrupted_fetch_is_gone_on_with(tmp_path, source, have):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set.bin.partial").write_bytes(CONTENT[:have])
    source.write_bytes(bytes(have) + CONTENT[have:])  # what is there already is not asked for again
    fetch.fetch(remote(source), tmp_path / "data", progress=False)
    assert (tmp_path / "data" / "set.bin").read_bytes() == CONTENT


def test_what_has_the_wrong_checksum_is_not_kept(tmp_path, source):
    source.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ValueError, match=r"its sha256 is .*, expected"):
        fetch.fetch(remote(source), tmp_path / "data", progress=False)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("content", [CONTENT[:-3], CONTENT + b"more"])
def test_what_has_the_wrong_size_is_not_kept(tmp_path, source, content):
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"instead of 10,240"):
        fetch.fetch(remote(source), tmp_path / "data", progress=False)
    assert not (tmp_path / "data" / "set.bin").exists()


def test_the_second_address_helps_where_the_first_fails(tmp_path, source):
    both = Remote("set.bin", ((tmp_path / "gone").as_uri(), source.as_uri()), len(CONTENT), SHA256)
    assert fetch.fetch(both, tmp_path / "data", progress=False).is_file()


def test_without_a_network_one_is_told_which_file_to_put_where(tmp_path):
    gone = (tmp_path / "gone").as_uri()
    says = rf"set.bin could not be fetched .*{gone}.* put it into {tmp_path}/data"
    with pytest.raises(ValueError, match=says):
        fetch.fetch(Remote("set.bin", (gone,), 3), tmp_path / "data", progress=False)


def test_a_foreign_file_of_the_same_name_is_never_overwritten(tmp_path, source):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not the official file: it has 4 bytes"):
        fetch.fetch(remote(source), tmp_path / "data", progress=False)
    assert (tmp_path / "data" / "set.bin").read_bytes() == b"mine"


def test_an_archive_is_unpacked_into_the_folder_and_nowhere_else(tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("cifar-10-batches-py/data_batch_1", "../../outside"):
            entry = tarfile.TarInfo(name)
            entry.size = len(CONTENT)
            archive.addfile(entry, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("cifar-10-batches-py/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = tmp_path / "set.tar.gz"
    source.write_bytes(packed.getvalue())
    one = Remote(source.name, (source.as_uri(),), len(packed.getvalue()))
    monkeypatch.setitem(DATASETS, "tiny", (one,))
    place = fetch.get("tiny", tmp_path / "data" / "below", progress=False)
    assert sorted(p.name for p in place.iterdir()) == ["data_batch_1", "outside", "set.tar.gz"]
    assert (place / "data_batch_1").read_bytes() == CONTENT
    assert not (tmp_path / "outside").exists()


def test_an_unknown_name_is_answered_with_those_known(tmp_path):
    with pytest.raises(ValueError, match=r"no data set 'mnst' .* fashion-mnist, mnist, cifar10"):
        fetch.get("mnst", tmp_path)


def test_every_known_file_has_an_address_a_size_and_a_checksum():
    for files in DATASETS.values():
        for file in files:
            assert file.urls
            assert file.size > 0
            assert len(file.sha256 or "") == 64 or len(file.md5 or "") == 32


def test_a_file_that_was_cut_on_the_way_is_gone_on_with(tmp_path, source):
    whole = source.read_bytes()
    source.write_bytes(whole[:4000])  # the server hangs up, and says nothing
    with pytest.raises(ValueError, match=r"it has 4,000 bytes instead of 10,240"):
        fetch.fetch(remote(source), tmp_path / "data", progress=False)
    source.write_bytes(bytes(4000) + whole[4000:])
    place = fetch.fetch(remote(source), tmp_path / "data", progress=False)
    assert place.read_bytes() == CONTENT


def test_an_answer_that_is_none_leads_to_the_next_address(tmp_path, source, monkeypatch):
    opened = fetch.urllib.request.urlopen

    def odd(request, **knobs):
        if "odd" in request.full_url:
            raise HTTPException("garbage")
        return opened(request, **knobs)

    monkeypatch.setattr(fetch.urllib.request, "urlopen", odd)
    both = Remote("set.bin", ("http://odd/", source.as_uri()), len(CONTENT), SHA256)
    assert fetch.fetch(both, tmp_path / "data", progress=False).is_file()


def test_a_wrong_md5_is_noticed_where_no_other_checksum_is_known(tmp_path, source):
    with pytest.raises(ValueError, match="its md5 is"):
        fetch.fetch(remote(source, sha256=None, md5=32 * "0"), tmp_path / "data", progress=False)
