import pytest
from typer.testing import CliRunner

from idloss.cli import app, main

run = CliRunner().invoke


def test_list_names_both_kinds():
    shown = run(app, ["list"]).output
    assert "sface" in shown
    assert "edsr32_256_id" in shown


def test_list_takes_a_wildcard():
    shown = run(app, ["list", "edsr*"]).output
    assert "edsr16_64" in shown
    assert "sface" not in shown


def test_info_names_source_licence_and_training_data():
    shown = run(app, ["info", "mobilefacenet"]).output
    for word in ("bubbliiiing", "MIT", "CASIA"):
        assert word in shown


def test_a_wrong_name_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["idloss", "info", "mobilfacenet"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert "mobilefacenet" in str(stop.value)
    assert "\n" not in str(stop.value)
