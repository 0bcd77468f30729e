"""Sentences about files that are not what their names say, and about JSON that is none."""

import re
from pathlib import Path

import pytest

from data_pipelines.files import absent, disguised, read_json, read_json_lines, unfetched
from tests.data_pipelines import disguises
from tests.data_pipelines.disguises import DISGUISES


@pytest.mark.parametrize("name", DISGUISES)
def test_disguises(tmp_path: Path, name: str) -> None:
    says = disguises.put(tmp_path / "file", name)
    assert re.match(says, disguised(tmp_path / "file"))


@pytest.mark.parametrize(
    ("content", "own"),
    [
        (b"PAR1" + bytes(9), b"PAR1"), (b"\0\0\0\x20ftypisom", b"ftyp"), (b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n"),
        (b"PK\x03\x04abc\xff", b"PK\x03\x04"), (b'\x10\0\0\0\0\0\0\0{"x": {}}', b"{"), (b"\x80\x02K\x01.", b""),
    ],
)  # fmt: skip
def test_a_damaged_file_of_the_right_kind_is_no_other(tmp_path: Path, content: bytes, own: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not disguised(tmp_path / "file", own)
    assert disguised(tmp_path / "file") or own == b""


def test_pointers_alone(tmp_path: Path) -> None:
    """Where anything may stand in a file, only what was never fetched is known to be wrong."""
    for name in DISGUISES:
        says = disguises.put(tmp_path / "file", name)
        assert bool(re.match(says, unfetched(tmp_path / "file"))) == (name in ("lfs", "annex", "annex link"))


def test_no_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert absent(path) == "does not exist" and absent(tmp_path) == "is a folder, expected a file"
    path.touch()
    assert re.fullmatch(disguises.dangle(path), absent(path))
    path.unlink()
    path.symlink_to("blobs/x")
    assert absent(path) == "is a link to blobs/x, which does not exist"
    with pytest.raises(ValueError, match="file is a link to blobs/x, which does not exist; copy it again."):
        read_json(path, ValueError, "copy it again")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2]}')  # as Windows' editors save it
    assert read_json(path, ValueError, "copy it again") == {"a": [1, 2]}
    for content, says in (
        (b'{"a": 1,\n "b', "is not valid JSON .*line 2 column 2.*; copy it again."),
        (b'{"a": \xff}', "is not valid JSON .*can't decode"),
        (b"[" * 10**5, "is not valid JSON .*recursion"),
        (b"[1]", r"holds '\[1\]', expected a JSON object; copy"),
        (b"this is no JSON", "is not valid JSON"),
        *((content, says) for name, (content, says) in DISGUISES.items() if name in ("lfs", "web page", "nothing")),
    ):
        path.write_bytes(content)
        with pytest.raises(KeyError, match=f"about.json {says}"):
            read_json(path, KeyError, "copy it again")


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_json_lines(path, ValueError, "copy") == [
        (f"{path}, line 1,", {"a": 1}), (f"{path}, line 3,", {"a": 2}),
    ]  # fmt: skip
    path.write_text('{"a": 1}\n\n{"a": 2, x}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3, is not valid JSON \(Expecting .* at column 10\)"):
        read_json_lines(path, ValueError, "copy")
    path.write_text('{"a": 1}\n7')
    with pytest.raises(ValueError, match="rows.jsonl, line 2, holds '7', expected a JSON object"):
        read_json_lines(path, ValueError, "copy")
    path.write_bytes(disguises.LFS)
    with pytest.raises(ValueError, match="rows.jsonl is a pointer of Git LFS"):
        read_json_lines(path, ValueError, "copy")
