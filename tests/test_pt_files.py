"""Files of torch.save: what they may hold, and what is said of those that hold something else."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rsd.pt_files import read_pt
from rsd.types import RsdError


def test_numpy_numbers_may_stand_beside_the_weights_and_nothing_else_of_numpy(tmp_path: Path) -> None:
    kept = {"loss": np.float32(0.5), "step": np.int64(3), "best_accuracy": np.float64(0.9), "done": np.bool_(True)}
    path = tmp_path / "best.pt"
    torch.save({"model_state_dict": {"w": torch.ones(2)}, **kept}, path)
    older = tmp_path / "older.pt"  # as NumPy 1 names its function
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(older, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    for each in (path, older):
        content = read_pt(each)
        assert {name: content[name] for name in kept} == kept
    for odd in (np.zeros(2), np.array([object()], dtype=object)[:1], np.datetime64("2020")):
        torch.save({"x": odd}, path)
        with pytest.raises(RsdError, match="not readable without unpickling"):
            read_pt(path)


def test_a_pointer_of_git_lfs_is_named_and_unpickling_never_advised(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(RsdError, match="git lfs pull"):
        read_pt(path)
    torch.save({"x": Path("a class")}, path)
    with pytest.raises(RsdError) as error:
        read_pt(path)
    assert not any(word in str(error.value) for word in ("weights_only", "still be loaded", "trust"))
    path.write_bytes(b"")
    with pytest.raises(RsdError, match="an empty one"):
        read_pt(path)
