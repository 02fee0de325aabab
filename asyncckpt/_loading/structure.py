"""Check the structure of a file: its directory and the headers of its records, without their content."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from asyncckpt._loading.reader import READERS
from asyncckpt._threads import for_each
from asyncckpt.layout.zip_reader import check_header, read_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.stores.base import OpenFile

# Headers that lie this close, in bytes, are read at once, with what is between them.
_SPAN = 256 << 10

_Header = tuple[str, int, int]  # name of the record, where the header begins, where the payload does


async def check_structure(file: OpenFile) -> None:
    """Read the directory of a file and every local header, and compare them.

    Raises:
        CorruptCheckpointError: names the damaged record.
        StoreError: the file could not be read.
    """
    directory = await file.answer(read_directory(file.file.nbytes))
    rows = zip(directory.names, directory.headers.tolist(), directory.starts.tolist(), strict=True)
    near = [list(group) for _, group in groupby(rows, key=lambda row: row[1] // _SPAN)]

    async def check(headers: Sequence[_Header]) -> None:
        begin, end = headers[0][1], headers[-1][2]
        data = bytearray(end - begin)
        await file.read(begin, memoryview(data))
        for name, header, start in headers:
            check_header(data[header - begin : start - begin], name, start - header)

    await for_each(check, near, READERS)
