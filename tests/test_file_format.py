"""The file is a stock torch.load zip: for all of torch's ways of loading, for zip tools and others."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config as _config

import asyncckpt
from asyncckpt import Checkpointer
from asyncckpt.layout.zip_format import DESCRIPTION
from sameness import assert_same
from states import DTYPES, Model, filled
from support import flip, payload_offset, run_python

if TYPE_CHECKING:
    from pathlib import Path


serialization: Any = _config  # patch() is put into it at run time


def sample() -> dict[str, Any]:
    """Return a state with storages of all sizes around the alignment, and shared ones."""
    tensors = {
        str(numel): filled(numel, torch.uint8, numel) for numel in (0, 1, 15, 47, 48, 63, 64, 65, 128, 5000)
    }
    tensors |= {
        f"{dtype}": filled(7, dtype, 3) for dtype in DTYPES if dtype not in {torch.bits8, torch.complex32}
    }
    return {
        "tensors": tensors,
        "view": tensors["128"].view(2, 64).t(),
        "model": Model().state_dict(),
        "step": 3,
    }


@pytest.fixture
def state() -> dict[str, Any]:
    return sample()


@pytest.fixture
def path(state: dict[str, Any], tmp_path: Path) -> Path:
    asyncckpt.save(state, tmp_path / "state.pt").committed.result()
    return tmp_path / "state.pt"


class TestTorchLoads:
    def test_weights_only(self, path: Path, state: dict[str, Any]) -> None:
        assert_same(torch.load(path, weights_only=True), state)

    @pytest.mark.parametrize("weights_only", [True, False])
    def test_mapped(self, path: Path, state: dict[str, Any], weights_only: bool) -> None:  # noqa: FBT001
        assert_same(torch.load(path, mmap=True, weights_only=weights_only), state)

    def test_with_computed_offsets(self, path: Path, state: dict[str, Any]) -> None:
        with serialization.patch("load.calculate_storage_offsets", True):  # noqa: FBT003 - torch's signature
            assert_same(torch.load(path, mmap=True), state)

    def test_with_torchs_own_check_of_computed_offsets(self, path: Path) -> None:
        script = """
            import sys, torch
            from torch.utils.serialization import config
            config.load.calculate_storage_offsets = True
            print(len(torch.load(sys.argv[1], mmap=True)["tensors"]))
        """
        status, output, errors = run_python(script, str(path), env={"TORCH_SERIALIZATION_DEBUG": "1"})
        assert (status, errors) == (0, "")
        assert int(output) == len(sample()["tensors"])

    @pytest.mark.parametrize(
        "location", ["cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, _: storage, lambda *_: None]
    )
    def test_onto_the_host(self, path: Path, state: dict[str, Any], location: Any) -> None:
        assert_same(torch.load(path, map_location=location), state)
        assert_same(asyncckpt.load(path, map_location=location), state)

    def test_onto_meta(self, path: Path, state: dict[str, Any]) -> None:
        expected = io.BytesIO()
        torch.save(state, expected)
        for location in ("meta", torch.device("meta"), {"cpu": "meta"}):
            expected.seek(0)
            torchs = torch.load(expected, map_location=location)
            assert_same(torch.load(path, map_location=location), torchs)
            assert_same(asyncckpt.load(path, map_location=location), torchs)
            assert torchs["view"].device.type == "meta"

    def test_a_callable_sees_the_bytes_and_the_location(self, path: Path) -> None:
        def seen_by(load: Any) -> list[tuple[str, bytes]]:
            seen = []

            def place(storage: torch.UntypedStorage, location: str) -> None:
                seen.append((location, bytes(storage)))

            load(path, map_location=place)
            return sorted(seen)

        assert seen_by(asyncckpt.load) == seen_by(torch.load)

    def test_as_fake_tensors_whose_offsets_in_the_file_are_true(
        self, path: Path, state: dict[str, Any]
    ) -> None:
        with FakeTensorMode():
            fake = torch.load(path)
        content = path.read_bytes()
        for name, tensor in state["tensors"].items():
            offset = fake["tensors"][name].untyped_storage()._checkpoint_offset
            content_of_storage = bytes(tensor.untyped_storage())  # torch 2.7 gets the fake one's size wrong
            assert content[offset:].startswith(content_of_storage)
        assert fake["view"].stride() == state["view"].stride()

    def test_as_an_open_file_and_as_bytes(self, path: Path, state: dict[str, Any]) -> None:
        with path.open("rb") as file:
            assert_same(torch.load(file), state)
        assert_same(torch.load(io.BytesIO(path.read_bytes())), state)

    def test_without_asyncckpt(self, path: Path) -> None:
        script = """
            import sys
            sys.modules["asyncckpt"] = None
            import torch
            for mapped in (False, True):
                print(torch.load(sys.argv[1], mmap=mapped)["tensors"]["65"].tolist())
        """
        status, output, errors = run_python(script, str(path))
        assert (status, errors) == (0, "")
        assert output == f"{sample()['tensors']['65'].tolist()}\n" * 2


class TestZipTools:
    def test_python_tests_every_checksum(self, path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
            offset = payload_offset(path, "data/9")
            flip(path, offset + 999)
            assert file.testzip() == "archive/data/9"

    @pytest.mark.skipif(shutil.which("unzip") is None, reason="there is no unzip here")
    def test_unzip_tests_every_checksum(self, path: Path) -> None:
        tested = subprocess.run(["unzip", "-t", str(path)], check=False, capture_output=True, text=True)
        assert tested.returncode == 0, tested.stdout
        assert "No errors detected" in tested.stdout
        assert "warning" not in tested.stdout + tested.stderr

    def test_records_are_those_of_torch_and_the_description_is_the_last(
        self, path: Path, tmp_path: Path
    ) -> None:
        torch.save(sample(), tmp_path / "archive.pt")
        with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "archive.pt") as theirs:
            assert set(ours.namelist()) == {*theirs.namelist(), DESCRIPTION}
            for name in ("version", "byteorder", ".format_version", ".storage_alignment"):
                assert ours.read(f"archive/{name}") == theirs.read(f"archive/{name}"), name
            for info in ours.infolist():
                assert info.compress_type == zipfile.ZIP_STORED
            assert ours.infolist()[-1].filename == DESCRIPTION
            described = json.loads(ours.read(DESCRIPTION))
        assert described["format"] == 1
        assert described["versions"]["torch"] == torch.__version__  # with the build, as 2.13.0+cu130

    def test_every_payload_is_aligned(self, path: Path) -> None:
        offsets = [payload_offset(path, f"data/{key}") for key in range(10)]
        assert [offset % 64 for offset in offsets] == [0] * 10


class TestSmallAndLarge:
    @pytest.mark.parametrize(
        "state", [{}, [], None, 3, "text", OrderedDict(a=1), torch.zeros(0), torch.tensor(1)]
    )
    def test_states_with_next_to_nothing(self, tmp_path: Path, state: Any) -> None:
        path = tmp_path / "a.pt"
        asyncckpt.save(state, path).committed.result()
        assert_same(torch.load(path), state)
        assert_same(torch.load(path, mmap=True), state)
        assert_same(asyncckpt.load(path), state)
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None

    def test_a_hundred_thousand_tensors(self, tmp_path: Path) -> None:
        flat = torch.arange(200_000)
        state = {str(i): flat[2 * i : 2 * i + 2].clone() for i in range(100_000)}
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, state)
            checkpointer.wait()
            checkpointer.verify()
            (listed,) = checkpointer.checkpoints()
        loaded = torch.load(listed.path, mmap=True, weights_only=False)
        assert list(loaded) == list(state)
        assert torch.equal(torch.cat(list(loaded.values())), flat)
        with zipfile.ZipFile(listed.path) as file:
            assert len(file.infolist()) > 100_000

    def test_a_stream_of_the_platforms_byte_order(self, path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            assert file.read("archive/byteorder").decode() == sys.byteorder


class TestFilesOfTorch:
    @pytest.mark.parametrize("weights_only", [True, False])
    def test_are_loaded(self, state: dict[str, Any], tmp_path: Path, weights_only: bool) -> None:  # noqa: FBT001
        torch.save(state, tmp_path / "any name.pt")
        assert_same(asyncckpt.load(tmp_path / "any name.pt", weights_only=weights_only), state)

    def test_of_another_alignment_are_loaded(self, state: dict[str, Any], tmp_path: Path) -> None:
        with serialization.patch("save.storage_alignment", 4096):
            torch.save(state, tmp_path / "a.pt")
        assert_same(asyncckpt.load(tmp_path / "a.pt"), state)

    def test_are_checked(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save(sample(), path)
        with zipfile.ZipFile(path) as file:
            at = file.getinfo("a/data/9").header_offset + 1000
        flip(path, at)
        torch.load(path)  # torch does not see it
        with pytest.raises(asyncckpt.CorruptCheckpointError, match=r"a\.pt: record a/data/9 "):
            asyncckpt.load(path)
