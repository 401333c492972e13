"""The benchmark runs, and what it measures is worth having."""

import json
import sys

import pytest
from harness import run
from test_scan import needs_cpp


@pytest.mark.speed
@needs_cpp
def test_fast_scan_is_faster(tmp_path):
    output = tmp_path / "scan.json"
    run([sys.executable, "benchmarks/scan_cpu.py", "--quick", "--output", output])
    for record in json.loads(output.read_text())["compared"]:
        assert record["ratio"] > 1.2, record
