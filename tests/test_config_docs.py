"""docs/configuration.md says what config.py says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_configuration_page_is_up_to_date():
    command = [sys.executable, ROOT / "tools" / "make_config_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cost_table_is_up_to_date():
    command = [sys.executable, ROOT / "tools" / "make_cost_table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
