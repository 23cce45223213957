"""What is sent for a PEFT folder, what is refused before anything is, and when to try again."""

import hashlib
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from loraplex_client.errors import (
    Aborted,
    AdapterFolderError,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    LoraplexError,
    OutOfRange,
    ServerUnreachable,
    Unavailable,
)
from loraplex_client.upload import Deadline, RetryPolicy, Tries, prepare, sent_bytes
from loraplex_client.weights import CHUNK_BYTES

MakeAdapter = Callable[..., Path]


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (0, []),
        (1, [1]),
        (CHUNK_BYTES, [CHUNK_BYTES]),
        (CHUNK_BYTES + 1, [CHUNK_BYTES, 1]),
        (3 * CHUNK_BYTES, [CHUNK_BYTES] * 3),
    ],
)
def test_messages(size: int, sizes: list[int], make_adapter: MakeAdapter) -> None:
    folder = make_adapter(size)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    header, *chunks, finish = prepare("pirate", folder, False).requests()
    assert header.header.adapter_id == "pirate"
    assert header.header.total_size == size
    assert header.header.sha256 == hashlib.sha256(weights).hexdigest()
    assert header.header.adapter_config_json == (folder / "adapter_config.json").read_text()
    assert [len(message.chunk.data) for message in chunks] == sizes
    assert b"".join(message.chunk.data for message in chunks) == weights
    for message in chunks:
        assert message.chunk.crc32 == zlib.crc32(message.chunk.data)
    assert finish.HasField("finish")
    sent = [sent_bytes(message) for message in (header, *chunks, finish)]
    assert sent == [0, *(sum(sizes[: n + 1]) for n in range(len(sizes))), None]

    resumed = list(prepare("pirate", folder, False).resumed(size // 2).requests())
    assert resumed[0].header.resume_offset == sent_bytes(resumed[0]) == size // 2
    assert b"".join(m.chunk.data for m in resumed[1:-1]) == weights[size // 2 :]


def test_the_upload_id_follows_from_name_and_content(make_adapter: MakeAdapter) -> None:
    folder, other = make_adapter(100), make_adapter(101)

    def upload_id(name: str, path: Path) -> str:
        return prepare(name, path, False).header.upload_id

    first = upload_id("a", folder)
    assert uuid.UUID(first).version == 5
    assert upload_id("a", folder) == first
    (other / "adapter_config.json").write_text("{}")
    assert len({first, upload_id("b", folder), upload_id("a", other)}) == 3
    (folder / "adapter_config.json").write_text("{}")
    assert upload_id("a", folder) != first


def test_replace_and_etag_travel(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(10)
    assert prepare("a", folder, True).header.replace
    assert not prepare("a", folder, False).header.replace
    assert prepare("a", folder, False, "e1").header.if_match_etag == "e1"
    ids = {prepare("a", folder, *how).header.upload_id for how in ((True,), (False, "e1"))}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no adapter_model.safetensors"),
        ({"adapter_model.safetensors": b"x"}, "holds no adapter_config.json"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "a pickle"),
        (
            {"adapter_config.json": b"\xff\xfe", "adapter_model.safetensors": b"x"},
            "is not UTF-8 text",
        ),
        (
            {"adapter_config.json": b" " * 65_537, "adapter_model.safetensors": b"x"},
            "larger than 64 KiB",
        ),
        (
            {
                "adapter_config.json": b"{}",
                "adapter_model.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
            },
            "git lfs pull",
        ),
    ],
)
def test_what_is_no_adapter(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterFolderError, match=message) as caught:
        prepare("a", tmp_path, False)
    assert isinstance(caught.value, InvalidArgument)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterFolderError, match="does not exist"):
        prepare("a", tmp_path / "nothing", False)
    with pytest.raises(AdapterFolderError, match="is not a folder"):
        prepare("a", str(tmp_path / "file"), False)


def test_a_file_that_shrinks_is_noticed(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(100)
    upload = prepare("a", folder, False)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFolderError, match="shrank"):
        list(upload.requests())


_BROKEN = Unavailable("broke")


@pytest.mark.parametrize(
    ("failures", "error", "remaining", "expected"),
    [
        (1, _BROKEN, None, 1.0),
        (2, _BROKEN, None, 2.0),
        (3, _BROKEN, None, None),
        (1, _BROKEN, 1.5, 1.0),
        (1, _BROKEN, 0.5, None),
        (1, Unavailable("later", retry_after=3.0), None, 3.0),
        (1, Unavailable("much later", retry_after=31.0), None, None),
    ],
)
def test_how_long_to_wait(
    failures: int, error: LoraplexError, remaining: float | None, expected: float | None
) -> None:
    assert RetryPolicy(delays=(1.0, 2.0)).delay(failures, error, remaining) == expected


def mismatch(committed: str) -> LoraplexError:
    return OutOfRange("no", reason="OFFSET_MISMATCH", metadata={"committed_size": committed})


_NOBODY = ServerUnreachable("nobody")


@pytest.mark.parametrize(
    ("errors", "delays"),
    [
        ([_BROKEN] * 3, [1.0, 2.0, None]),
        ([_NOBODY], [None]),
        ([_BROKEN, _NOBODY], [1.0, 2.0]),  # it restarts
        ([_BROKEN, mismatch("5"), _BROKEN, _BROKEN, _BROKEN], [1.0, 0.0, 1.0, 2.0, None]),
        ([_BROKEN, mismatch("5"), _NOBODY], [1.0, 0.0, 1.0]),
        ([mismatch("5"), mismatch("3"), mismatch("5"), mismatch("3")], [0.0] * 4),
        ([mismatch("5"), *[mismatch("3")] * 4], [0.0] * 4 + [None]),
        ([mismatch("11")], [None]),  # more than there is
        ([mismatch("")], [None]),
        ([DeadlineExceeded("slept", reason="UPLOAD_STALLED")], [1.0]),
        ([DataLoss("crc32", reason="CRC32_MISMATCH")], [1.0]),
        ([DataLoss("sha256", reason="SHA256_MISMATCH")], [None]),
        ([DeadlineExceeded("over")], [None]),
        ([Unavailable("disk", reason="STORE_UNAVAILABLE")], [None]),
        ([Aborted("another's", reason="UPLOAD_IN_PROGRESS")], [None]),
        ([Aborted("another command's", reason="UPLOAD_TAKEN_OVER")], [None]),
        ([InvalidArgument("no")], [None]),
    ],
)
def test_when_to_try_again(
    errors: list[LoraplexError], delays: list[float | None], make_adapter: MakeAdapter
) -> None:
    upload = prepare("a", make_adapter(10), False)
    tries = Tries(upload, RetryPolicy(delays=(1.0, 2.0)), Deadline.after(None))
    assert [tries.failed(error) for error in errors] == delays
    corrected = [e for e, delay in zip(errors, delays, strict=True) if delay == 0.0]
    wanted = int(corrected[-1].metadata["committed_size"]) if corrected else 0
    assert tries.upload.header.resume_offset == wanted


def test_deadlines() -> None:
    assert Deadline.after(None).remaining() is None
    assert Deadline.after(0).remaining() == 0
    assert 0 < (Deadline.after(100).remaining() or 0) <= 100
