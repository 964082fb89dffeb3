import os
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dar.protocol.worker import EventRow, Row
from worker.spool import SpoolDamagedError, SpoolReader, SpoolWriter, frame, unframe

payloads = st.binary(max_size=200).map(lambda data: data.replace(b"\n", b""))


def say(writer: SpoolWriter, message: str) -> int:
    def make(seq: int, at: float) -> Row:
        return EventRow(type="event", seq=seq, at=at, level="info", message=message)

    return writer.append(make)


def written(folder: Path, count: int, **options: int) -> SpoolWriter:
    writer = SpoolWriter(folder, **options)
    for number in range(1, count + 1):
        assert say(writer, f"message {number}") == number
    return writer


def seqs(reader: SpoolReader, **limits: int) -> list[int]:
    return [row.seq for row in reader.read(**limits)]


@given(payloads)
def test_a_frame_gives_back_its_payload(payload: bytes) -> None:
    assert frame(payload).endswith(b"\n")
    assert unframe(frame(payload)[:-1]) == payload


@given(payloads.filter(bool), st.data())
def test_a_changed_byte_is_noticed(payload: bytes, data: st.DataObject) -> None:
    line = bytearray(frame(payload)[:-1])
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SpoolDamagedError):
        unframe(bytes(line))


@given(cut=st.integers(0, 400), lines=st.lists(st.text(max_size=20), max_size=8))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_spool_cut_anywhere_goes_on_without_a_gap(
    tmp_path_factory: pytest.TempPathFactory, cut: int, lines: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    writer = SpoolWriter(folder)
    for line in lines:
        say(writer, line)
    writer.close()
    (segment,) = folder.glob("*.jsonl")
    os.truncate(segment, min(cut, segment.stat().st_size))
    whole = len(SpoolReader(folder).read())
    successor = SpoolWriter(folder)
    assert say(successor, "after the cut") == whole + 1
    successor.close()
    assert seqs(SpoolReader(folder)) == list(range(1, whole + 2))


def test_rows_come_back_in_order_and_within_the_limits(tmp_path: Path) -> None:
    writer = written(tmp_path, 30)
    reader = SpoolReader(tmp_path)
    assert seqs(reader, max_rows=7) == [1, 2, 3, 4, 5, 6, 7]
    three = sum(len(row.payload) for row in reader.read()[:3])  # instants are not equally long
    assert seqs(reader, max_bytes=three) == [1, 2, 3]
    assert seqs(reader, max_bytes=1) == [1], "a row over the limit is sent alone"
    writer.close()


def test_a_new_reader_goes_on_behind_the_acknowledged_rows(tmp_path: Path) -> None:
    writer = written(tmp_path, 10)
    reader = SpoolReader(tmp_path)
    reader.read(max_rows=6)
    reader.ack(4)
    assert seqs(reader)[0] == 5
    successor = SpoolReader(tmp_path)
    assert successor.acked == 4
    assert seqs(successor) == [5, 6, 7, 8, 9, 10]
    successor.ack(10)
    assert seqs(successor) == []
    say(writer, "one more")
    assert seqs(successor) == [11]
    writer.close()


def test_acknowledged_segments_are_deleted(tmp_path: Path) -> None:
    writer = written(tmp_path, 50, segment_bytes=1000)
    segments = sorted(tmp_path.glob("*.jsonl"))
    assert len(segments) > 4
    reader = SpoolReader(tmp_path)
    assert seqs(reader) == list(range(1, 51))
    reader.ack(int(segments[2].stem))
    assert sorted(tmp_path.glob("*.jsonl")) == segments[2:]
    assert seqs(SpoolReader(tmp_path))[0] == int(segments[2].stem) + 1
    writer.close()


def test_what_was_acknowledged_is_on_the_disk_before_segments_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = written(tmp_path, 50, segment_bytes=1000)
    reader = SpoolReader(tmp_path)
    reader.read()
    synced: list[tuple[str, bool]] = []
    first, fsync = tmp_path / "000000000001.jsonl", os.fsync

    def watch(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, first.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    reader.ack(50)
    monkeypatch.undo()
    assert synced == [(f".tmp-acked-{os.getpid()}", True), (tmp_path.name, True)]
    assert not first.exists()
    writer.close()


def test_a_row_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    written(tmp_path, 2).close()
    (segment,) = tmp_path.glob("*.jsonl")
    line = frame(b'{"type":"event","seq":3}')
    reader = SpoolReader(tmp_path)
    with segment.open("ab") as file:
        file.write(line[:15])
        file.flush()
        assert seqs(reader) == [1, 2]
        file.write(line[15:])
    assert seqs(reader) == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        b'deadbeef {"type":"event","seq":3}\n',
        frame(b'{"type":"event","seq":4}'),
        b"\x00" * 64 + b"\n",
    ],
    ids=["wrong checksum", "missing number", "zeros after a power loss"],
)
def test_a_spool_is_read_up_to_a_damage(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, 2).close()
    (segment,) = tmp_path.glob("*.jsonl")
    with segment.open("ab") as file:
        file.write(line)
    reader = SpoolReader(tmp_path)
    assert seqs(reader) == [1, 2]
    reader.ack(2)
    with pytest.raises(SpoolDamagedError):
        reader.read()


def test_a_reader_keeps_up_with_several_writing_threads(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, segment_bytes=2000)
    threads = [
        threading.Thread(target=lambda: [say(writer, "x" * 40) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    reader, received = SpoolReader(tmp_path), []
    while len(received) < 400:
        rows = reader.read(max_rows=17)
        received += [row.seq for row in rows]
        if rows:
            reader.ack(rows[-1].seq)
    for thread in threads:
        thread.join()
    assert received == list(range(1, 401))
    assert writer.flush() == 400
    writer.close()


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = written(tmp_path, 1)
    real = writer._file

    class Full:
        def __init__(self) -> None:
            self.has_written = False

        def write(self, data: memoryview) -> int:
            if self.has_written:
                raise OSError(28, "No space left on device")
            self.has_written = True
            return int(real.write(data[:10]) or 0)

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        say(writer, "lost")
    monkeypatch.setattr(writer, "_file", real)
    assert say(writer, "after room was made") == 2
    assert seqs(SpoolReader(tmp_path)) == [1, 2]
    writer.close()


def test_a_line_is_what_the_format_says(tmp_path: Path) -> None:
    written(tmp_path, 1).close()
    (segment,) = tmp_path.glob("*.jsonl")
    assert segment.name == "000000000001.jsonl"
    checksum, _, payload = segment.read_bytes().rstrip(b"\n").partition(b" ")
    assert int(checksum, 16) == zlib.crc32(payload)
