"""The keys of state dicts: changed by a function, and by what wrappers of modules put before them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    MapKeys = Callable[[str], str]

# Code of functions of a key, which take off what wrappers put before it: DistributedDataParallel `module.`,
# torch.compile `_orig_mod.`.
_REMOVALS: dict[str, MapKeys] = {
    "key": lambda key: key,
    'key.replace("_orig_mod.", "")': lambda key: key.replace("_orig_mod.", ""),
    'key.replace("module.", "")': lambda key: key.replace("module.", ""),
    'key.removeprefix("module.")': lambda key: key.removeprefix("module."),
    'key.replace("_orig_mod.", "").replace("module.", "")': lambda key: key.replace("_orig_mod.", "").replace(
        "module.", ""
    ),
}
_PREFIXES = ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")


def map_state_keys(saved: dict[Any, Any], function: MapKeys) -> tuple[dict[Any, Any], list[str]]:
    """Return a state dict whose string keys went through `function`, with its metadata, and what is wrong."""
    mapped: OrderedDict[Any, Any] = OrderedDict()
    source: dict[Any, Any] = {}
    problems = []
    for old, value in saved.items():
        new = function(old) if isinstance(old, str) else old
        if isinstance(old, str) and not isinstance(new, str):
            problems.append(f"map_keys must return a str, but returned {new!r} for {old!r}")
        elif new in mapped:
            problems.append(f"map_keys makes {new!r} of both {source[new]!r} and {old!r}")
        else:
            mapped[new], source[new] = value, old
    metadata = getattr(saved, "_metadata", None)
    if isinstance(metadata, dict):
        # By module, for those that load what older versions of them saved.
        modules = OrderedDict(metadata)
        for new, old in source.items():
            if isinstance(old, str):
                modules |= {after: metadata[was] for was, after in _modules(old, new) if was in metadata}
        mapped._metadata = modules  # type: ignore[attr-defined]
    return mapped, problems


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
        mapped = {function(key) for key in found}
        matches = len(keys & mapped)
        if matches > best and len(mapped) == len(found):
            best, remedy = matches, f"{matches} of {len(keys)} keys match with map_keys={code}"
    return remedy


def _candidates(own: Collection[str]) -> Iterator[tuple[str, MapKeys]]:
    """Yield the code of a function of a key, and the function."""
    for code, remove in _REMOVALS.items():
        for prefix in _PREFIXES:
            text = f'"{prefix}" + {code}' if prefix else code
            yield f"lambda key: {text}", lambda key, p=prefix, f=remove: p + f(key)  # type: ignore[misc]
    for code, remove in _REMOVALS.items():
        names = {remove(key): key for key in own}
        text = f"names.get(key, key), where names = {{{code}: key for key in module.state_dict()}}"
        yield f"lambda key: {text}", lambda key, names=names: names.get(key, key)  # type: ignore[misc]
