"""Stores: directories that checkpoints are written to and read from.

`open_store` makes the store of a path or a URL, which is what `Checkpointer("runs/gpt")` uses. A store of
your own is a subclass of `Store`, given to `Checkpointer(store=...)`: six methods (`path_of`, `prepare`,
`draft`, `list`, `open`, `remove`), a `Draft` with `write` and `commit`, and an `OpenFile` with `read`. The
other methods have defaults that work with these, and can be replaced where there is a faster way.

The coroutines run on the event loop of asyncckpt's background thread: what blocks belongs in a worker
thread (`anyio.to_thread.run_sync`). `asyncckpt.testing.store_contract.StoreContract` tests whether a store
keeps what this interface promises.

Sharded checkpoints are folders. A store that is to hold them also has `list_folders`, `folder`,
`folder_draft` and `join_folder`; `asyncckpt.testing.folder_contract.FolderContract` tests these, too.
"""

from __future__ import annotations

from asyncckpt.stores.base import FOLDER_MARK, Draft, FolderDraft, OpenFile, Store, StoredFile
from asyncckpt.stores.local import LocalStore
from asyncckpt.stores.opening import open_store

__all__ = [
    "FOLDER_MARK",
    "Draft",
    "FolderDraft",
    "LocalStore",
    "OpenFile",
    "Store",
    "StoredFile",
    "open_store",
]
