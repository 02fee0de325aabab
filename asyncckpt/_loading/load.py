"""From a file in memory to a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from asyncckpt._loading.load_failures import load_failure
from asyncckpt._loading.unpickle import PayloadFile, load_file
from asyncckpt.layout.description import Description, checkpoint_of
from asyncckpt.layout.zip_format import DESCRIPTION
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from asyncckpt._loading.reader import Image
    from asyncckpt._loading.unpickle import MapLocation


class Loaded(NamedTuple):
    """A state, and the checkpoint that it was read from."""

    state: Any
    checkpoint: Checkpoint


def load_image(image: Image, map_location: MapLocation = "cpu", *, weights_only: bool | None) -> Loaded:
    """Build the state of a file, as torch.load would; its storages lie where the image landed.

    Raises:
        CorruptCheckpointError: its pickle makes no sense.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entries.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    record = image.record(DESCRIPTION)
    checkpoint = Checkpoint(None, image.path, {}, image.nbytes)
    if record is not None:
        checkpoint = checkpoint_of(image.path, Description.decode(record), image.nbytes)
    landing = image.landing
    ranges = [(start, stop) for _, start, stop in image.directory.storages() if stop > start]
    payloads = {start: landing.storage(start, stop) for start, stop in ranges}
    file = PayloadFile(image.nbytes, image.read, payloads)
    try:
        return Loaded(load_file(file, map_location, weights_only=weights_only), checkpoint)
    except Exception as error:
        if file.misplaced:
            raise
        data_pickle = image.record(f"{image.directory.folder}/data.pkl") or b""
        failure = load_failure(error, image.path, data_pickle, [stop - start for start, stop in ranges])
        if failure is None:
            raise
        raise failure from error
