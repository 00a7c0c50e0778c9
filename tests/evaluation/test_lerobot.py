import json
from pathlib import Path

from scripted import episode

from rsd.evaluation.lerobot import write_eval_info
from rsd.evaluation.video import VIDEOS_DIR, video_name


def test_the_export_groups_and_counts_as_lerobot_does(tmp_path: Path) -> None:
    failure = episode(1, 0, success=False, failure="step limit", wall_s=3.0)
    episodes = [
        *(episode(0, 1), episode(0, 0), failure, episode(1, 1, success=False, failure="error: worker hung")),
        episode(0, 0, suite="libero_goal"),
    ]
    (tmp_path / VIDEOS_DIR).mkdir()
    video = tmp_path / VIDEOS_DIR / video_name(failure)
    video.touch()
    write_eval_info(tmp_path, episodes)
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert [(task["task_group"], task["task_id"]) for task in info["per_task"]] == [
        ("libero_goal", 0),
        ("libero_spatial", 0),
        ("libero_spatial", 1),
    ]
    assert info["per_task"][1]["metrics"] == {
        "sum_rewards": [1.0, 1.0],
        "max_rewards": [1.0, 1.0],
        "successes": [True, True],
        "video_paths": [],
    }
    spatial = info["per_group"]["libero_spatial"]
    assert (spatial["n_episodes"], round(spatial["pc_success"], 3)) == (3, 66.667)
    assert info["overall"]["n_episodes"] == 4
    assert info["overall"]["pc_success"] == 75.0
    assert info["overall"]["video_paths"] == [str(video)]
    assert info["overall"]["eval_s"] == 4 * info["overall"]["eval_ep_s"] == 1.5 * 3 + 3.0
