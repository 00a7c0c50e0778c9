"""Bad demonstrations, for every command that reads them: one line, exit status 2, nothing written.

A case makes its input in an empty folder; what the line must say stands beside it. A new fault of a kind is a new row.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from refusals import check
from rsd.data.demonstrations import load_demonstrations
from rsd.data.lerobot_libero import read_actions
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError

STEPS, SIDE, DEMOS = 12, 16, 3
FILE = "pick_up_the_bowl_demo.hdf5"
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
DEEP = "[" * 100_000


def write_demos(folder: Path, images: bool = False, demos: int = DEMOS, steps: int = STEPS) -> Path:
    """Demonstrations as LIBERO publishes them, of random numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / FILE, "w") as file:
        for index in range(demos):
            demo = file.create_group(f"data/demo_{index}")
            actions = rng.uniform(-0.9, 0.9, (steps, 7))
            demo["actions"] = np.hstack([actions[:, :6], np.sign(actions[:, 6:])])
            demo["obs/ee_states"], demo["obs/gripper_states"] = rng.normal(size=(steps, 6)), rng.normal(size=(steps, 2))
            for key in CAMERAS if images else ():
                demo[f"obs/{key}"] = rng.integers(0, 256, (steps, SIDE, SIDE, 3), dtype=np.uint8)
            demo.attrs["num_samples"] = steps
    return folder / FILE


def put(group: h5py.Group, name: str, value: Any) -> None:
    if name in group:
        del group[name]
    group[name] = value


def replaced(name: str, value: Any) -> Callable[[h5py.File], None]:
    """Another value of demo_1's dataset, or the result of a function of the old one."""

    def apply(file: h5py.File) -> None:
        demo = file["data/demo_1"]
        put(demo, name, value(demo[name][()]) if callable(value) else value)

    return apply


def attribute(name: str, value: Any, of: str = "data/demo_1") -> Callable[[h5py.File], None]:
    return lambda file: file[of].attrs.__setitem__(name, value)


def spots(values: Any) -> Callable[[h5py.File], None]:
    """Where demo_1's one thing is seen; a number: everywhere that number."""

    def apply(file: h5py.File) -> None:
        attribute("asks", '[["take it", "bowl"]]')(file)
        number = isinstance(values, float)
        put(file["data/demo_1"], "obs/spots", np.full((STEPS, 1, 2), values, np.float32) if number else values)

    return apply


def both_cameras(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        for key in CAMERAS:
            replaced(f"obs/{key}", change)(file)

    return apply


def in_place_of_data(file: h5py.File) -> None:
    del file["data"]
    file["data"] = np.arange(4)


def no_data(file: h5py.File) -> None:
    del file["data"]


def no_demonstration(file: h5py.File) -> None:
    del file["data"]
    file.create_group("data")


def copied(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.copy("data/demo_0", f"data/{name}")


def member(name: str, value: Any) -> Callable[[h5py.File], None]:
    """Something else in the place of a member of `data`."""
    return lambda file: put(file["data"], name, value)


def obs_is_a_dataset(file: h5py.File) -> None:
    put(file["data/demo_1"], "obs", np.arange(3))


def group_for(name: str) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        del file[f"data/demo_1/{name}"]
        file.create_group(f"data/demo_1/{name}")

    return apply


SOFT, EXTERNAL = h5py.SoftLink("/nowhere"), h5py.ExternalLink("nowhere.hdf5", "/data")
COMPOUND = np.zeros(STEPS, [("x", "f4"), ("y", "i4")])
# what is wrong -> (how, what the line says); read without images by `tokenizer fit`
HDF5: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "ee-states-short": (replaced("obs/ee_states", lambda a: a[:-1]), "obs/ee_states [12, 6] of real numbers, found"),
    "ee-states-narrow": (replaced("obs/ee_states", lambda a: a[:, :5]), "found float64 [12, 5]"),
    "gripper-short": (replaced("obs/gripper_states", lambda a: a[:-1]), "obs/gripper_states [12, 2]"),
    "labels-short": (replaced("expert_actions", np.zeros((3, 7))), "expert_actions [12, 7] of real numbers, found"),
    "group-demo-x": (copied("demo_x"), "expected groups demo_0, demo_1, ..., found 'demo_x'; rename or remove it"),
    "group-bak": (copied("demo_0_bak"), "found 'demo_0_bak'"),
    "group-zero-padded": (copied("demo_007"), "found 'demo_007'"),
    "group-other-digits": (copied("demo_\u0663"), "expected groups demo_0, demo_1"),
    "group-huge-number": (copied("demo_" + "9" * 5000), "expected groups demo_0, demo_1"),
    "group-nameless": (copied("demo"), "found 'demo'"),
    "demo-dangling": (member("demo_1", SOFT), "group demo_1: not readable"),
    "demo-external": (member("demo_1", EXTERNAL), "group demo_1: not readable"),
    "demo-a-dataset": (member("demo_1", np.arange(4)), "expected the group demo_1, found a dataset"),
    "actions-dangling": (replaced("actions", SOFT), "actions: not readable"),
    "actions-missing": (lambda file: file.__delitem__("data/demo_1/actions"), "found none of actions"),
    "actions-scalar": (replaced("actions", 3.0), "actions [T, 7] of real numbers, found float64 []"),
    "actions-text": (replaced("actions", "x"), "actions [T, 7] of real numbers, found object []"),
    "actions-texts": (replaced("actions", [["x"] * 7] * STEPS), "of real numbers, found object [12, 7]"),
    "actions-complex": (replaced("actions", np.zeros((STEPS, 7), complex)), "real numbers, found complex128 [12, 7]"),
    "actions-bool": (replaced("actions", np.zeros((STEPS, 7), bool)), "of real numbers, found bool [12, 7]"),
    "actions-compound": (replaced("actions", COMPOUND), "actions [T, 7] of real numbers, found"),
    "actions-null": (replaced("actions", h5py.Empty("f8")), "of real numbers, found float64 []"),
    "actions-a-group": (group_for("actions"), "of real numbers, found a group"),
    "actions-of-six": (replaced("actions", lambda a: a[:, :6]), "of real numbers, found float64 [12, 6]"),
    "actions-nan": (replaced("actions", lambda a: a * np.nan), "expected finite numbers in actions"),
    "actions-huge": (replaced("actions", lambda a: a * 1e300), "expected finite numbers in actions"),
    "state-huge": (replaced("obs/ee_states", lambda a: a * 1e30), "expected numbers up to 1e+06 in obs/ee_states"),
    "no-steps": (replaced("actions", np.zeros((0, 7))), "actions [T, 7] of real numbers, found float64 [0, 7]"),
    "obs-missing": (lambda file: file.__delitem__("data/demo_1/obs"), "none of obs/ee_states, obs/gripper_states"),
    "obs-a-dataset": (obs_is_a_dataset, "demonstration demo_1"),
    "image-every-0": (attribute("image_every", 0), "attribute image_every to be an integer >= 1, found"),
    "image-every-half": (attribute("image_every", 1.5), "attribute image_every to be an integer >= 1, found"),
    "image-every-list": (attribute("image_every", [1, 2]), "attribute image_every to be an integer >= 1, found"),
    "success-step-x": (attribute("success_step", "x"), "success_step to be an integer from 0 to 11, found 'x'"),
    "success-step-negative": (attribute("success_step", -2), "attribute success_step to be an integer from 0 to 11"),
    "success-step-beyond": (attribute("success_step", STEPS), "success_step to be an integer from 0 to 11, found"),
    "success-step-nothing": (attribute("success_step", h5py.Empty("i8")), "attribute success_step to be an integer"),
    "seed-huge": (attribute("placement_seed", np.uint64(2**63)), "attribute placement_seed to be an integer >= -1"),
    "asks-cut-off": (attribute("asks", '[["a"'), "attribute asks to be pairs of a sentence and a thing, found [["),
    "asks-object": (attribute("asks", '{"ab": 1}'), "asks to be pairs of a sentence and a thing"),
    "asks-deep": (attribute("asks", "[" * 50_000), "asks to be pairs of a sentence and a thing"),
    "asks-numbers": (attribute("asks", "[[1, 2]]"), "asks to be pairs of a sentence and a thing"),
    "asks-of-three": (attribute("asks", '[["a", "b", "c"]]'), "asks to be pairs of a sentence and a thing"),
    "asks-texts": (attribute("asks", '["ab"]'), "asks to be pairs of a sentence and a thing"),
    "asks-blank": (attribute("asks", '[[" ", "x"]]'), "asks to be pairs of a sentence and a thing"),
    "asks-number": (attribute("asks", 5), "attribute asks to be text, found"),
    "seed-text": (attribute("placement_seed", "one"), "attribute placement_seed to be an integer >= -1"),
    "target-number": (attribute("target_object", 3), "attribute target_object to be text, found"),
    "instruction-no-utf8": (attribute("language_instruction", np.bytes_(b"\xff")), "instruction: not readable"),
    "instruction-list": (attribute("language_instruction", ["a", "b"]), "attribute language_instruction to be text"),
    "provenance-cut-off": (attribute("rsd_provenance", '{"format', "data"), "rsd_provenance: not valid JSON"),
    "provenance-deep": (attribute("rsd_provenance", "[" * 50_000, "data"), "rsd_provenance: not valid JSON"),
    "provenance-list": (attribute("rsd_provenance", "[1]", "data"), "rsd_provenance: expected a JSON object"),
    "provenance-number": (attribute("rsd_provenance", 7, "data"), "attribute rsd_provenance to be text, found"),
    "provenance-true": (attribute("rsd_provenance", '{"format_version": true}', "data"), "version 1, found True"),
    "provenance-old": (attribute("rsd_provenance", '{"format_version": 0}', "data"), "version 1, found 0; read them"),
    "provenance-odd": (attribute("rsd_provenance", '{"versions": [1]}', "data"), "format version 1, found None"),
    "data-a-dataset": (in_place_of_data, "expected the group data, found a dataset"),
    "data-missing": (no_data, "expected the group data, found none"),
    "data-empty": (no_demonstration, "found no demonstration"),
}
# the same with images, which the trainings read
IMAGES: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "another-size": (both_cameras(lambda v: v[:, :8, :8]), "expected images of 16 px as in"),
    "not-square": (both_cameras(lambda v: v[:, :, :12]), "square and of one size, found uint8 [12, 16, 12, 3"),
    "channels-first": (both_cameras(lambda v: v.transpose(0, 3, 1, 2)), "[12, S, S, 3], square and of one size, found"),
    "fewer": (both_cameras(lambda v: v[:-3]), "images uint8 [12, S, S, 3], square and of one size, found uint8 [9"),
    "float": (both_cameras(lambda v: v.astype(np.float32)), "square and of one size, found float32"),
    "empty": (both_cameras(lambda v: v[:, :0, :0]), "square and of one size, found uint8 [12, 0, 0, 3]"),
    "one-camera": (lambda file: file.__delitem__(f"data/demo_1/obs/{CAMERAS[0]}"), "found only eye_in_hand_rgb"),
    "of-two-sizes": (replaced(f"obs/{CAMERAS[1]}", lambda v: v[:, :8, :8]), "square and of one size"),
    "a-group": (group_for(f"obs/{CAMERAS[0]}"), "square and of one size, found a group"),
    "every-second": (attribute("image_every", 2), "images uint8 [6, S, S, 3]"),
    "spots-nan": (spots(np.nan), f"expected obs/spots float32 [{STEPS}, 1, 2], found"),
    "spots-far": (spots(1e30), "or numbers beyond 1e+06"),
    "spots-double": (spots(np.zeros((STEPS, 1, 2))), "expected obs/spots float32 [12, 1, 2], found float64 [12, 1, 2]"),
    "spots-short": (spots(np.zeros((STEPS - 1, 1, 2), np.float32)), "found float32 [11, 1, 2]"),
    "spots-of-two": (spots(np.zeros((STEPS, 2, 2), np.float32)), "found float32 [12, 2, 2]"),
    "spots-dangling": (replaced("obs/spots", SOFT), "obs/spots: not readable"),
    "dangling": (replaced(f"obs/{CAMERAS[0]}", SOFT), "images: not readable"),
}


def whole_file(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        change(write_demos(folder))

    return make


def overwritten(path: Path) -> None:
    """A block in the middle, as a bad disk or a broken copy leaves it."""
    content = bytearray(path.read_bytes())
    start = content.index(b"TREE")  # an index of a group
    content[start : start + 400] = b"\x5a" * 400
    path.write_bytes(content)


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "overwritten": (whole_file(overwritten), "not readable"),
    "truncated": (whole_file(lambda path: path.write_bytes(path.read_bytes()[:2000])), "that is cut off or damaged"),
    "empty": (whole_file(lambda path: path.write_bytes(b"")), "found an empty one"),
    "git-lfs": (whole_file(lambda path: path.write_text("version https://git-lfs")), "a pointer of Git LFS; run"),
    "another-kind": (whole_file(lambda path: path.write_text("x,y\n" * 50)), "or of another kind"),
    "a-folder": (whole_file(folder_in_its_place), "expected a file, found a folder"),
    "none": (lambda folder: folder.mkdir(), "found none; collect them with `rsd demos collect`"),
    "missing": (lambda folder: None, "found none; collect them with `rsd demos collect`"),
}


def write_lerobot(folder: Path, rows: Any = None, **info: Any) -> Path:
    """Three episodes of random actions in format 2.1; rows: of the second one, whatever they are."""
    rng = np.random.default_rng(0)
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    for episode in range(3):
        actions: list[Any] = rng.uniform(-0.9, 0.9, (STEPS, 7)).tolist()
        if episode == 1 and rows is not None:
            actions = rows
        table = pyarrow.table(
            {
                "action": pyarrow.array(actions),
                "episode_index": pyarrow.array([episode] * len(actions), pyarrow.int64()),
                "frame_index": pyarrow.array(range(len(actions)), pyarrow.int64()),
            }
        )
        parquet.write_table(table, folder / f"data/chunk-000/episode_{episode:06d}.parquet")
    content = {"codebase_version": "v2.1", "total_frames": 3 * STEPS, "features": {"action": {"shape": [7]}}, **info}
    (folder / "meta/info.json").write_text(json.dumps(content))
    return folder


def info_text(text: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_lerobot(folder)
        (folder / "meta/info.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def info(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_lerobot(folder, **changes) and None


def second_episode(rows: Any) -> Callable[[Path], None]:
    return lambda folder: write_lerobot(folder, rows) and None


def no_rows(folder: Path) -> None:
    write_lerobot(folder, total_frames=0)
    for path in folder.glob("data/*/*.parquet"):
        parquet.write_table(parquet.read_table(path).slice(0, 0), path)


def lfs_pointer(folder: Path) -> None:
    (write_lerobot(folder) / "data/chunk-000/episode_000001.parquet").write_text("version https://git-lfs\n")


def index_with_a_gap(folder: Path) -> None:
    path = write_lerobot(folder) / "data/chunk-000/episode_000001.parquet"
    table = parquet.read_table(path)
    column = pyarrow.array([None, *range(1, STEPS)], pyarrow.int64())
    parquet.write_table(table.set_column(table.schema.get_field_index("frame_index"), "frame_index", column), path)


ROW, MAP = [0.5] * 7, pyarrow.map_(pyarrow.string(), pyarrow.float64())
LEROBOT: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows-of-6-and-8": (second_episode([ROW] * 10 + [ROW[:6], [*ROW, 0.5]]), "7 numbers in every action, found 6"),
    "row-missing": (second_episode([*[ROW] * 11, None]), "expected 7 numbers in every action, found nothing"),
    "number-missing": (second_episode([*[ROW] * 11, [None, *ROW[1:]]]), "7 numbers in every action, found nothing"),
    "rows-of-text": (second_episode([["x"] * 7] * STEPS), "expected real numbers in action, found string"),
    "rows-of-bool": (second_episode([[True] * 7] * STEPS), "expected real numbers in action, found bool"),
    "rows-of-rows": (second_episode([[ROW] * 7] * STEPS), "LeRobot data set"),
    "structs": (second_episode([{"x": 0.5, "y": 1.0}] * STEPS), "expected 7 numbers in every action, found 1"),
    "maps": (second_episode(pyarrow.array([[("x", 0.5)]] * STEPS, MAP)), "7 numbers in every action, found 1"),
    "bytes": (second_episode([b"1234567"] * STEPS), "expected 7 numbers in every action, found 1"),
    "codes": (second_episode(pyarrow.array(["x"] * STEPS).dictionary_encode()), "7 numbers in every action, found 1"),
    "nothing": (second_episode([None] * STEPS), "expected 7 numbers in every action, found nothing"),
    "rows-of-structs": (second_episode([[{"x": 0.5}] * 7] * STEPS), "expected real numbers in action, found struct"),
    "nan": (second_episode([[float("nan")] * 7] * STEPS), "expected finite numbers in action"),
    "no-rows": (no_rows, "expected 0 frames as meta/info.json says, found 0"),
    "index-with-a-gap": (index_with_a_gap, "expected real numbers in frame_index, found 1 of 12 empty"),
    "episode-missing": (info(total_episodes=4), "expected 4 episodes as meta/info.json says, found 3"),
    "a-pointer-of-git-lfs": (lfs_pointer, "expected a parquet file with action, episode_index, frame_index"),
    "version-1.6": (info(codebase_version="v1.6"), "format v2.0, v2.1, v3.0, found 'v1.6'"),
    "total-wrong": (info(total_frames=40), "expected 40 frames as meta/info.json says, found 36"),
    "action-of-another-name": (info(features={"action.arm": {"shape": [7]}}), "feature action, found action.arm"),
    "total-null": (info(total_frames=None), "expected None frames as meta/info.json says, found 36"),
    "total-text": (info(total_frames="36"), "expected '36' frames as meta/info.json says, found 36"),
    "total-true": (info(total_frames=True), "expected True frames"),
    "features-null": (info(features=None), "expected the feature action, found none"),
    "features-list": (info(features=["action"]), "expected the feature action, found none"),
    "action-null": (info(features={"action": None}), "expected the feature action, found action"),
    "shape-text": (info(features={"action": {"shape": ["7"]}}), "action to be a vector, found the shape ['7']"),
    "shape-null": (info(features={"action": {"shape": None}}), "a vector, found the shape None"),
    "shape-true": (info(features={"action": {"shape": [True]}}), "a vector, found the shape [True]"),
    "shape-14": (info(features={"action": {"shape": [14]}}), "expected 14 numbers in every action, found 7"),
    "version-list": (info(codebase_version=["v2.1"]), "expected a LeRobot data set of format v2.0"),
    "version-missing": (info_text("{}"), "expected a LeRobot data set of format v2.0"),
    "info-no-utf8": (info_text(b'{"a": "\xff"}'), "info.json: not valid JSON"),
    "info-deep": (info_text(DEEP), "info.json: not valid JSON"),
    "info-list": (info_text("[]"), "info.json: expected a JSON object"),
    "info-cut-off": (info_text('{"codebase'), "info.json: not valid JSON"),
    "info-long-number": (info_text('{"total_frames": ' + "9" * 5000 + "}"), "info.json: not valid JSON"),
    "info-infinity": (info_text('{"total_frames": Infinity}'), "info.json: holds Infinity"),
}


@pytest.mark.parametrize("case", HDF5)
def test_demonstrations_with_odd_numbers_and_attributes(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = HDF5[case]
    with h5py.File(write_demos(tmp_path / "data"), "a") as file:
        change(file)
    command = ["tokenizer", "fit", "--data", tmp_path / "data", "--output", tmp_path / "out"]
    check(command, expected, tmp_path, capsys)


@pytest.mark.parametrize("case", IMAGES)
def test_demonstrations_with_odd_images(
    case: str, tmp_path: Path, tokenizer: ActionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = IMAGES[case]
    with h5py.File(write_demos(tmp_path / "data", images=True), "a") as file:
        change(file)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    command = ["train", "policy", "--data", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer"]
    check([*command, "--output", tmp_path / "out", "--device", "cpu"], expected, tmp_path, capsys)


def test_images_of_another_size_than_the_models(
    tmp_path: Path, tokenizer: ActionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demos(tmp_path / "data", images=True)
    tokenizer.save(tmp_path)
    command = ["train", "policy", "--data", tmp_path / "data", "--tokenizer", tmp_path, "--output", tmp_path / "out"]
    check([*command, "--device", "cpu"], "images of 16 x 16 px, expected 128 x 128", tmp_path, capsys)


UNFIT: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "radians": (lambda a: a * ([6.28] * 6 + [1.0]), "actions within +-1, the tokenizer's limit"),
    "gripper-0-1": (lambda a: np.c_[a[:, :6], a[:, 6:] > 0], "dimension 6 to be -1 or 1, found 0"),
    "gripper-continuous": (lambda a: np.c_[a[:, :6], a[:, 6:] * 0.7], "dimension 6 to be -1 or 1"),
}


@pytest.mark.parametrize("labelled", [False, True], ids=["actions", "labels"])
@pytest.mark.parametrize("case", UNFIT)
def test_labels_that_the_tokenizer_does_not_have(
    case: str, labelled: bool, tmp_path: Path, tokenizer: ActionTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = UNFIT[case]
    with h5py.File(write_demos(tmp_path / "data", images=True), "a") as file:
        demo = file["data/demo_1"]
        put(demo, "expert_actions" if labelled else "actions", change(demo["actions"][()]))
    tokenizer.save(tmp_path)
    command = ["train", "policy", "--data", tmp_path / "data", "--tokenizer", tmp_path, "--output", tmp_path / "out"]
    check([*command, "--device", "cpu"], expected, tmp_path, capsys)


READERS = {
    "fit": ["tokenizer", "fit", "--output", "OUT", "--data", "DATA"],
    "tokenizers": ["study", "tokenizers", "--output", "OUT", "--data", "DATA"],
    "render": ["demos", "render", "--out", "OUT", "--source", "DATA"],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_demonstrations(
    case: str, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = FILES[case]
    make(tmp_path / "data")
    places = {"DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out")}
    check([places.get(word, word) for word in READERS[reader]], expected, tmp_path, capsys)


def test_a_demonstration_file_in_use_is_not_called_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_demos(tmp_path / "data")
    code = f"import h5py, time; file = h5py.File({str(path)!r}, 'a'); print('open', flush=True); time.sleep(60)"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        command = ["tokenizer", "fit", "--data", tmp_path / "data", "--output", tmp_path / "out"]
        check(command, "in use by another program", tmp_path, capsys)
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("place", range(0, 6000, 250))
def test_overwritten_bytes_anywhere_are_one_line_or_do_no_harm(place: int, tmp_path: Path) -> None:
    path = write_demos(tmp_path / "data")
    content = bytearray(path.read_bytes())
    content[place : place + 64] = b"\xff" * 64
    path.write_bytes(content)
    with contextlib.suppress(RsdError):
        assert all(np.isfinite(demo.actions).all() for demo in load_demonstrations(path))


@pytest.mark.parametrize("case", LEROBOT)
@pytest.mark.parametrize("reader", ["fit", "tokenizers"])
def test_lerobot_data_sets(case: str, reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = LEROBOT[case]
    make(tmp_path / "data")
    places = {"DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out")}
    check([places.get(word, word) for word in READERS[reader]], expected, tmp_path, capsys)


def test_odd_but_good_data_is_read(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "data", images=True)
    with h5py.File(path, "a") as file:
        attribute("language_instruction", np.bytes_(b"pick up the bowl"))(file)
        attribute("rsd_provenance", np.bytes_(b'{"format_version": 1}'), "data")(file)
        file["data"].create_group("mask")["train"] = np.arange(3)  # of other tools
        replaced("actions", np.zeros((STEPS, 7), np.int8))(file)
    demos = list(load_demonstrations(tmp_path / "data"))
    assert [demo.instruction for demo in demos] == ["pick up the bowl"] * DEMOS
    assert demos[1].actions.dtype == np.float32
    folder = write_lerobot(tmp_path / "lerobot")
    content = (folder / "meta/info.json").read_bytes()
    (folder / "meta/info.json").write_bytes(b"\xef\xbb\xbf" + content.replace(b",", b",\r\n"))
    assert [len(actions) for actions in read_actions(folder)] == [STEPS] * 3


def test_a_blank_instruction_is_none(tmp_path: Path) -> None:
    with h5py.File(write_demos(tmp_path), "a") as file:
        attribute("language_instruction", "  ")(file)
    assert [demo.instruction for demo in load_demonstrations(tmp_path)] == ["pick up the bowl"] * DEMOS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None,), "demonstrations: expected text or a path, found None"),
        ((5,), "demonstrations: expected text or a path, found 5"),
        (("x", "no"), "images: expected true or false, found 'no'"),
        (("x", True, 0), "max_per_task: expected an integer from 1"),
        (("x", True, "2"), "max_per_task: expected an integer from 1"),
    ],
)
def test_odd_arguments(arguments: Any, expected: str) -> None:
    with pytest.raises(RsdError, match=expected):
        next(load_demonstrations(*arguments))
