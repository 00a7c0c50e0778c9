"""What an evaluation of the compact policy loads, seen from a process of its own."""

import json
import subprocess
import sys

CODE = """
import json, sys
from rsd.cli.eval import check_names
from rsd.evaluation.backend import describe_checkpoint, rsd_policy, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.doctor import checkpoint_files, load_and_predict
import rsd.evaluation.evaluate

config, note = settle(EvalConfig())
check_names(config)
assert config.decode == "rsd-ahead", note
assert rsd_policy(config).decode == "rsd-ahead"
describe_checkpoint(config)
checks = checkpoint_files(config.policy), load_and_predict(config.policy, "cpu", [])
assert all(check.status == "ok" for check in checks), checks
print(json.dumps([name for name in sys.modules if name.startswith("rsd.") or name == "simplejpeg"]))
"""


def test_the_compact_policy_needs_no_image_or_model_code_of_openvla() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "rsd.policy" in loaded
    assert "simplejpeg" not in loaded
    of_openvla = {name for name in loaded if name.startswith(("rsd.openvla.", "rsd.models.openvla", "rsd.models.lora"))}
    assert of_openvla == {"rsd.openvla.published", "rsd.models.openvla_files"}
