"""The keys of state dicts: changed by a function, and by what wrappers of modules put before them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    MapKeys = Callable[[str], str]


def map_state_keys(saved: dict[Any, Any], function: MapKeys) -> tuple[dict[Any, Any], list[str]]:
    """Return a state dict whose string keys went through `function`, with its metadata, and what is wrong."""
    names = {key: function(key) if isinstance(key, str) else key for key in saved}
    mapped: OrderedDict[Any, Any] = OrderedDict()
    source: dict[Any, Any] = {}
    problems = []
    for old, new in names.items():
        if isinstance(old, str) and not isinstance(new, str):
            problems.append(f"map_keys must return a str, but returned {new!r} for {old!r}")
        elif new in mapped:
            problems.append(f"map_keys makes {new!r} of both {source[new]!r} and {old!r}")
        else:
            mapped[new], source[new] = saved[old], old
    metadata = getattr(saved, "_metadata", None)
    if isinstance(metadata, dict) and not problems:
        # By module, for those that load what older versions of them saved.
        mapped._metadata = _map_metadata(metadata, names)  # type: ignore[attr-defined]
    return mapped, problems


def _map_metadata(metadata: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    mapped = OrderedDict(metadata)
    for old, new in names.items():
        if isinstance(old, str):
            mapped.update(
                (after, metadata[before]) for before, after in _modules(old, new) if before in metadata
            )
    return mapped


def _modules(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each module around a key, before and after, as far as its own names are the same."""
    while (old or new) and old.rpartition(".")[2] == new.rpartition(".")[2]:
        old, new = old.rpartition(".")[0], new.rpartition(".")[0]
        yield old, new


def prefix_remedy(own: Collection[Any], saved: Collection[Any]) -> str | None:
    """Return the `map_keys` under which more saved keys are found in `own`; None if prefixes are not why."""
    keys = {key for key in own if isinstance(key, str)}
    found = {key for key in saved if isinstance(key, str)}
    best, remedy = len(keys & found), None
    for code, function in _candidates(keys):
        mapped = [function(key) for key in found]
        matches = len(keys.intersection(mapped))
        if matches > best and len(set(mapped)) == len(mapped):
            best, remedy = matches, f"{matches} of {len(keys)} keys match with map_keys={code}"
    return remedy


def _candidates(own: Collection[str]) -> Iterator[tuple[str, MapKeys]]:
    """Yield the code of a function of a key, and the function: prefixes of wrappers are taken off or added.

    DistributedDataParallel puts `module.` before keys, and torch.compile `_orig_mod.`.
    """
    removals: list[tuple[str, MapKeys]] = [
        ("key", lambda key: key),
        ('key.replace("_orig_mod.", "")', lambda key: key.replace("_orig_mod.", "")),
        ('key.replace("module.", "")', lambda key: key.replace("module.", "")),
        ('key.removeprefix("module.")', lambda key: key.removeprefix("module.")),
        (
            'key.replace("_orig_mod.", "").replace("module.", "")',
            lambda key: key.replace("_orig_mod.", "").replace("module.", ""),
        ),
    ]
    for code, remove in removals:
        yield f"lambda key: {code}", remove
        for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
            yield f'lambda key: "{prefix}" + {code}', lambda key, p=prefix, f=remove: p + f(key)  # type: ignore[misc]
    for code, remove in removals[1:]:
        names = {remove(key): key for key in own}
        text = (
            f"lambda key: names.get(key, key), where names = {{{code}: key for key in module.state_dict()}}"
        )
        yield text, lambda key, names=names: names.get(key, key)  # type: ignore[misc]
