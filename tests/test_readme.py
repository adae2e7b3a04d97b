"""README is true: its figures are rows of the committed CSV, its commands exist."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_results_is_made_from_the_committed_rows():
    table = README.split("<!-- results: scripts/bench table -->")[1].split("<!-- end of results -->")[0].strip()
    made = subprocess.run([sys.executable, str(ROOT / "scripts/bench"), "table"], capture_output=True, text=True, check=True).stdout.strip()
    assert table == made


def test_the_tables_of_quality_are_made_from_the_committed_rows():
    table = README.split("<!-- quality: scripts/bench quality-table -->")[1].split("<!-- end of quality -->")[0].strip()
    made = subprocess.run([sys.executable, str(ROOT / "scripts/bench"), "quality-table"], capture_output=True, text=True, check=True).stdout.strip()
    assert table == made


@pytest.mark.parametrize("name", ["quality.csv", "needles.csv"])
def test_every_row_of_quality_names_commit_machine_model_command_and_config(name):
    with (ROOT / "results" / name).open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert all(row[key] for key in ("commit", "machine", "model", "command", "config", "side", "device_bytes")), row
        assert "+changes" not in row["commit"] and "/" not in row["config"]


def test_every_row_names_commit_machine_model_command_and_config():
    with (ROOT / "results/speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert all(row[key] for key in ("commit", "machine", "model", "command", "config", "metric", "side", "value", "unit")), row
        assert "+changes" not in row["commit"] and "=/" not in row["config"]


def test_scripts_that_the_readme_names_exist():
    for name in set(re.findall(r"scripts/[a-z_]+", README)):
        assert (ROOT / name).exists(), name


def test_every_row_of_what_is_supported_names_tests_that_exist():
    table = README.split("## What is supported")[1].split("\n\n")[2].splitlines()[2:]
    assert len(table) > 15
    for row in table:
        cited = re.findall(r"`([^`]+)`", row.split("|")[3])
        assert cited, row
        for name in cited:
            file, _, tests = name.partition(": ")
            path = ROOT / file if "/" in file else ROOT / "tests" / ("native" if file.endswith(".cpp") else "") / file
            text = path.read_text()
            for test in filter(None, tests.split(", ")):
                assert re.search(rf"TEST\({test},|def {test}\(", text), name


def test_none_of_llama_cpps_own_tests_failed_when_they_ran_last():
    with (ROOT / "results" / "upstream_tests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["result"] for row in rows} == {"passed", "skipped"}
    assert all(row["reason"] for row in rows if row["result"] == "skipped")
    assert {row["policy"] for row in rows} == {"none", "asrkf,pool=1.0", "asrkf,pool=256"}
