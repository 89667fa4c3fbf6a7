"""Files as documents, read in pieces, so that neither a corpus nor a document is ever in memory as a whole.

A file is text, one document or several with a separator between them; JSON lines, a document a line; or a Parquet
table, a document a row. gzip and zstd are undone on the way. What a file is shows in its first bytes, but for JSON
lines, which their name tells.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from minigpt2.command_line import optional
from minigpt2.extras import import_extra
from minigpt2.files import errors_name

__all__ = ["DataError", "NotText", "TextOptions", "check_options", "encodings", "pieces_of", "read_documents"]

PIECE = 1 << 20
"""Characters in a piece, at most."""

HEAD = 1 << 13
"""Bytes, or characters, that tell what a file is. Text has no NUL among them."""

# Before one space or newline between two characters that are neither, GPT-2's pattern for pre-tokens always starts a
# new one, so a text cut there has the tokens of its two parts.
_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")

_BYTE_ORDER_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_ARCHIVES = (
    b"PK\x03\x04",
    b"BZh",
    b"\xfd7zXZ\0",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\x07",
    b"\x04\x22\x4d\x18",
    b"\x1f\x9d",
)
_LOOKS_LIKE_ASCII = re.compile("iso.?2022|hz|utf.?7", re.IGNORECASE)


class DataError(ValueError):
    """Data that is absent, cannot be read as text, or is too short for what was asked."""


class NotText(DataError):
    """A file that cannot be read as text."""

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.reason = reason
        """In a few words that many files share."""


@dataclass(frozen=True)
class TextOptions:
    """How files are read as documents."""

    separator: Annotated[str | None, optional("TEXT")] = None
    """Text between the documents of one file, such as '<|endoftext|>'. Default: a file is one document."""
    encoding: Annotated[str | None, optional("NAME")] = None
    """Encoding of the files that are not UTF-8, such as cp1252. A file with a byte-order mark needs none."""
    field: Annotated[str | None, optional("NAME")] = None
    """Field of JSON lines, or column of Parquet files, that holds the text. Default: text. A pipe is read as JSON lines
    where this is given."""
    allow_left_out: bool = False
    """Go on even if more than a tenth of a folder's files cannot be read as text."""


def check_options(text: TextOptions) -> None:
    """Raise DataError for a separator that is empty and an encoding that Python does not know."""
    if text.separator == "":
        raise DataError("the separator of documents must not be empty")
    if text.encoding is not None:
        try:
            codecs.getincrementaldecoder(text.encoding)
            with suppress(UnicodeError):
                b" ".decode(text.encoding)  # refuses those that are not of text, such as hex
        except (LookupError, ValueError):
            raise DataError(f"unknown encoding {text.encoding!r}; known are utf-16, cp1252, latin-1, ...") from None


def encodings(path: Path, text: TextOptions) -> list[str]:
    """The encodings that the file may have, the likeliest first."""
    with _opened(path) as (file, head):
        start = next(_decompressed(path, file, head), b"")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return [encoding]
    if text.encoding is None:
        return ["utf-8"]
    if _LOOKS_LIKE_ASCII.match(text.encoding):
        return [text.encoding]
    return ["utf-8", text.encoding]


def read_documents(path: Path, encoding: str | None, text: TextOptions, skip: int = 0) -> Iterator[Iterator[str]]:
    """The documents of a file before any is cut at a separator, each in blocks of text of any size; one that is text is
    read from byte `skip` on. The encoding None is told by the byte-order mark, or is the one of the options, or UTF-8.

    Raises NotText, MissingExtra if the package to read it is not installed, and OSError.
    """
    field = text.field or "text"
    with _opened(path) as (file, head):
        if head.startswith(_PARQUET) and b"\0" in head:
            yield from (iter([value]) for value in _parquet(path, field))
            return
        if skip:
            file.seek(skip)
        blocks = _decompressed(path, file, head)
        if encoding is None:
            first = next(blocks, b"")
            marked = (name for mark, name in _BYTE_ORDER_MARKS if first.startswith(mark))
            encoding = next(marked, text.encoding or "utf-8")
            blocks = _chain(first, blocks)
        characters = _decoded(path, blocks, encoding, begins=not skip)
        if _is_json_lines(path, text):
            yield from (iter([value]) for value in _json_lines(path, characters, field))
        else:
            yield characters


def pieces_of(path: Path, encoding: str | None, text: TextOptions, offset: int = 0) -> Iterator[tuple[str, bool, int]]:
    """The documents of a file from `offset` on, in pieces of at most PIECE characters: (text, whether it ends its
    document, offset of what follows). Offsets count the bytes of the file's text in UTF-8.

    The tokens of a document are those of its pieces, unless a million characters go by without a word's end. Where
    reading starts does not change the pieces that follow.
    """
    skip = _place_of(path, encoding, text, offset)
    at = offset if skip else 0  # what cannot be sought in is read again
    for blocks in read_documents(path, encoding, text, skip):
        for piece, ends, length in _cut(blocks, text.separator):
            at += length
            if at > offset:
                yield piece, ends, at


def _place_of(path: Path, encoding: str | None, text: TextOptions, offset: int) -> int:
    """The byte at which an offset lies in a file that holds its text as it is; 0 in any other."""
    if not offset or encoding != "utf-8" or _is_json_lines(path, text):
        return 0
    with _opened(path) as (_, head):
        if head.startswith(_GZIP) or _is_zstd(head) or head.startswith(_PARQUET):
            return 0
        return offset + (len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)


def _cut(blocks: Iterator[str], separator: str | None) -> Iterator[tuple[str, bool, int]]:
    """(piece, whether it ends a document, bytes of it and of a separator after it)."""
    buffer, begin, at_end = "", 0, False
    margin = len(separator) if separator else 1  # enough to see what follows a piece of full length
    while True:
        while not at_end and len(buffer) - begin < PIECE + margin:
            block = next(blocks, None)
            at_end = block is None
            buffer, begin = buffer[begin:] + (block or ""), 0
        if begin == len(buffer):
            return
        limit, after, ends = begin + PIECE, "", True
        found = buffer.find(separator, begin, limit + margin) if separator else -1
        if found >= 0:
            stop, after = found, separator or ""
        elif len(buffer) <= limit:
            stop = len(buffer)
        else:
            stop, ends = _last_cut(buffer, begin, limit), False
        piece = buffer[begin:stop]
        begin = stop + len(after)
        yield piece, ends, len(piece.encode()) + len(after.encode())


def _last_cut(buffer: str, begin: int, end: int) -> int:
    for near in (end - 4096, begin + 1):
        cuts = [match.start() for match in _CUT.finditer(buffer, max(near, begin + 1), end)]
        if cuts:
            return cuts[-1]
    return end


class _Again(io.RawIOBase):
    """A pipe from its beginning, of which `head` was read."""

    def __init__(self, head: bytes, pipe: BinaryIO) -> None:
        self.head, self.pipe = head, pipe

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as view:
            data = self.head[: len(view)] or self.pipe.read(len(view))
            self.head = self.head[len(data) :]
            view[: len(data)] = data
        return len(data)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bytes]]:
    """The file, and its first bytes."""
    with errors_name(path), path.open("rb") as file:
        head = file.read(HEAD)
        if file.seekable():
            file.seek(0)
            yield file, head
        else:
            yield io.BufferedReader(_Again(head, file)), head  # type: ignore[misc]


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _is_zstd(head: bytes) -> bool:
    skippable = head[1:4] == b"\x2a\x4d\x18" and head[:1] >= b"\x50" and head[:1] < b"\x60"
    return skippable or head.startswith(b"\x28\xb5\x2f\xfd")


def _decompressed(path: Path, file: BinaryIO, head: bytes) -> Iterator[bytes]:
    """The contents in blocks, whose size does not depend on that of the file."""
    if head.startswith(_ARCHIVES):
        raise NotText(path, "compressed", "compressed in a way that is not read here (gzip and zstd are); unpack it")
    stream: Iterator[bytes]
    failures: tuple[type[Exception], ...] = ()
    if head.startswith(_GZIP):
        unpacked, failures = gzip.GzipFile(fileobj=file), (EOFError, zlib.error, gzip.BadGzipFile)
        stream = iter(lambda: unpacked.read(PIECE), b"")
    elif _is_zstd(head):
        stream, failures = _zstd(path, file)
    else:
        stream = iter(lambda: file.read(PIECE), b"")
    try:
        yield from stream
    except failures as error:
        raise NotText(path, "damaged", f"damaged: {error}") from None


def _zstd(path: Path, file: BinaryIO) -> tuple[Iterator[bytes], tuple[type[Exception], ...]]:
    """The contents in blocks, and the errors that they may raise. Python has zstd from 3.14 on."""
    try:
        own = importlib.import_module("compression.zstd")
    except ImportError:
        package = import_extra("zstd", "zstandard", str(path))
        return _zstd_frames(package, file), (EOFError, package.ZstdError)
    unpacked = own.open(file, options={own.DecompressionParameter.window_log_max: 31})
    return iter(lambda: unpacked.read(PIECE), b""), (EOFError, own.ZstdError)


def _zstd_frames(package: Any, file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, since the package's own reader takes a file that ends in the middle of one for a whole one."""
    decompressor, frame = package.ZstdDecompressor(max_window_size=1 << 31), None
    while data := file.read(1 << 14):
        while data:
            frame = frame or decompressor.decompressobj()
            block = frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
            if block:
                yield block
    if frame:
        raise EOFError("the file ends in the middle of a frame")


def _decoded(path: Path, blocks: Iterator[bytes], encoding: str, begins: bool) -> Iterator[str]:
    """The text of the blocks, without a byte-order mark. `begins`: whether they are the file's first."""
    decoder, read = codecs.getincrementaldecoder(encoding)(), 0
    name = "UTF-8" if encoding == "utf-8" else encoding
    while True:
        block = next(blocks, None)
        try:
            characters = decoder.decode(block or b"", final=block is None)
        except UnicodeError as error:
            where = ""
            if isinstance(error, UnicodeDecodeError):  # which counts from the bytes that it had kept
                place = read + len(block or b"") - len(error.object) + error.start
                where = f": byte 0x{error.object[error.start]:02x} at position {place}"
            raise NotText(path, "not UTF-8", f"not {name} text{where}; --encoding names another, as cp1252") from None
        read += len(block or b"")
        if begins and characters:
            begins, characters = False, characters.removeprefix("\ufeff")
            if (nul := characters.find("\0", 0, HEAD)) >= 0:
                detail = f"not {name} text: a NUL at position {nul}, as in programs, pictures and UTF-16"
                raise NotText(path, "not UTF-8", f"{detail}; --encoding utf-16-le reads the last")
        if characters:
            yield characters
        if block is None:
            return


def _is_json_lines(path: Path, text: TextOptions) -> bool:
    stem = re.sub(r"\.(gz|zst|zstd)$", "", path.name.lower())
    return stem.endswith((".jsonl", ".ndjson")) or (text.field is not None and not path.is_file())


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    """The text between newlines; JSON may hold the other characters at which str.splitlines cuts."""
    parts: list[str] = []
    for block in blocks:
        first, *others = block.split("\n")
        parts.append(first)
        for other in others:
            yield "".join(parts)
            parts = [other]
    yield "".join(parts)


def _json_lines(path: Path, characters: Iterator[str], field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(characters), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NotText(path, "not JSON", f"line {number} is not JSON: {error}") from None
        fields = record if isinstance(record, dict) else {}
        if field not in fields:
            known = ", ".join(map(repr, fields)) or "none"
            raise NotText(path, f"no field {field!r}", f"line {number} has no field {field!r}; it has {known}: --field")
        value = fields[field]
        if value is None:
            continue
        if not isinstance(value, str):
            raise NotText(path, f"no text in {field!r}", f"line {number}: field {field!r} is no text: {value!r:.40}")
        # As the tokenizer has it: surrogates that make a pair are a character, one alone is U+FFFD.
        yield value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(path: Path, column: str) -> Iterator[str]:
    """The rows of a column, a row group at a time."""
    arrow = import_extra("parquet", "pyarrow", str(path))
    parquet = import_extra("parquet", "pyarrow.parquet", str(path))
    if not path.is_file():
        raise NotText(path, "parquet in a pipe", "Parquet is read from its end, which a pipe does not allow")
    try:
        with parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                known = ", ".join(map(repr, schema.names))
                raise NotText(path, f"no field {column!r}", f"no column {column!r}; it has {known}: --field")
            kind = schema.field(column).type
            kind = getattr(kind, "value_type", kind) if arrow.types.is_dictionary(kind) else kind
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise NotText(path, f"no text in {column!r}", f"column {column!r} is no text but {kind}")
            for batch in table.iter_batches(256, columns=[column]):
                yield from (value for value in batch.column(0).to_pylist() if value)
    except (arrow.ArrowException, OSError) as error:
        raise NotText(path, "damaged", f"damaged: {' '.join(str(error).split())}") from None
