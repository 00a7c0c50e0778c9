"""Small inputs on which strangers saw earlier versions fail, made by the scripts beside the project (../shared/cases,
where that folder is there): each is read as what it is, or refused in one line. Their kinds, with makers of our own:
`data/test_bad_demonstrations.py`, `data/test_lerobot_actions.py`, `serving/test_client.py`."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refusals import check
from rsd.cli import dispatch
from rsd.models.config import PolicyConfig
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import LoopConfig, TrainPolicyConfig
from rsd.training.policy import load_frames
from rsd.types import RsdError

CASES = Path(__file__).parents[2] / "shared" / "cases"
FINE = ""
# maker -> case -> what the line says
EXPECTED = {
    "hdf5_cases.py": {
        **dict.fromkeys(("ok", "extra_group", "bytesattr"), FINE),
        "bak": "found 'demo_0_bak'",
        "missing_ee": "found none of obs/ee_states",
        "missing_actions": "found none of actions",
        "no_obs": "found none of obs/ee_states, obs/gripper_states",
        "state_short_both": "expected obs/ee_states [40, 6] of real numbers, found float64 [39, 6]",
        "actions_is_group": "found a group",
        "demo_is_dataset": "expected the group demo_1, found a dataset",
        "data_is_dataset": "expected the group data, found a dataset",
        "empty_data": "found no demonstration",
        "scalar": "found float64 []",
        "old_prov": "expected format version 1, found 0",
        "nan": "expected finite numbers in actions",
        "truncated": "found one that is cut off",
        "lfs": "found a pointer of Git LFS",
        "zero": "found an empty one",
        "dirname": "expected a file, found a folder",
        "image_every0": "image_every to be an integer >= 1",
        "six_dim": "expected actions [T, 7] of real numbers, found float64 [40, 6]",
        "unlimited_dup": "expected actions within +-1 (--tokenizer.limit), found 1.7",
    },
    "lerobot_cases.py": {
        **dict.fromkeys(("ok", "bimanual", "nullval", "one_frame_ep", "crlf_info", "bom_info"), FINE),
        "ragged": "expected 7 numbers in every action, found 6 in one",
        "nan": "expected finite numbers in action",
        **dict.fromkeys(("v16", "v31", "noversion"), "expected a LeRobot data set of format v2.0, v2.1, v3.0, found"),
        "total_wrong": "expected 310 frames as meta/info.json says, found 300",
        "total_null": "expected None frames as meta/info.json says, found 300",
        "features_null": "expected the feature action, found none",
        "shape14": "expected 14 numbers in every action, found 7 in one",
        "shape_str": "expected action to be a vector, found the shape ['7']",
        "key_state": "expected the feature action, found action.arm",
        "empty_ep": "expected 300 frames as meta/info.json says, found 240",
        "lfs": "expected a parquet file",
        "missing_ep": "expected 5 episodes as meta/info.json says, found 4",
        **dict.fromkeys(("deg", "huge"), "expected actions within +-1 (--tokenizer.limit)"),
        "one_dim": "and one left for the motion",
    },
    "image_cases.py": {
        **dict.fromkeys(("d_ok", "d_noisy", "d_bytes", "d_onestep"), FINE),
        "d_noimg": "states only, without images; run `rsd demos render`",
        "d_mixedsize": "expected images of 32 px as in",
        **dict.fromkeys(("d_rect", "d_allrect", "d_chw", "d_fewer"), "square and of one size, found uint8"),
        "d_zh": "expected words of the letters a to z and digits",
        "d_long": "expected 1 to 32 words, found 40",
        "d_one": "expected at least 2 demonstrations, found 1",
    },
}

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases lies beside the project, not in it")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for maker, cases in EXPECTED.items():
        command = [sys.executable, str(CASES / maker), str(folder / maker)]
        subprocess.run(command, check=True, capture_output=True)
        assert {path.name for path in (folder / maker).iterdir()} == {*cases}, "a case that nothing is expected of"
    return folder


@pytest.mark.parametrize(("maker", "case"), [(maker, case) for maker, cases in EXPECTED.items() for case in cases])
def test_what_strangers_brought(
    maker: str,
    case: str,
    made: Path,
    tmp_path: Path,
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, expected = made / maker / case, EXPECTED[maker][case]
    if maker == "image_cases.py":  # everything before the first step of a training
        config = TrainPolicyConfig(
            data=(data,), output=tmp_path / "out", policy=tiny_config, loop=LoopConfig(batch_size=4), device="cpu"
        )
        size = tiny_config.target.image_size
        with pytest.raises(RsdError, match=f"^[^\n]*{re.escape(expected)}") if expected else contextlib.nullcontext():
            training, held_out = load_frames(config, tokenizer, torch.device("cpu"), size, 8)
            assert len(training) + len(held_out) > 200
        return
    command = ["tokenizer", "fit", "--data", str(data), "--output", str(tmp_path / "out")]
    if expected:
        check(command, expected, tmp_path, capsys)
    else:
        assert dispatch(command) == 0, capsys.readouterr().err
