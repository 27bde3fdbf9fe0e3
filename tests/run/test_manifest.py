"""A manifest notices every change of a byte, in the data and in itself."""

import json

import pytest

from cosr_jax.run import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "data").write_bytes(b"some bytes")
    (tmp_path / "empty").touch()
    manifest.write(tmp_path, {"step": 3})
    return tmp_path


def test_an_untouched_folder_has_no_problems_and_its_facts_come_back(folder):
    content = manifest.read(folder)
    assert content["step"] == 3
    assert set(content["files"]) == {"inner/data", "empty"}
    assert manifest.problems(folder, content) == []


def test_every_problem_names_its_file(folder):
    content = manifest.read(folder)
    (folder / "inner" / "data").write_bytes(b"same lengt")
    (folder / "empty").write_bytes(b"x")
    assert manifest.problems(folder, content) == [
        "empty has 1 bytes instead of 0",
        "inner/data has the right size but other content than was saved",
    ]
    (folder / "empty").unlink()
    assert "empty is missing" in manifest.problems(folder, content)


def test_any_flipped_byte_or_cut_of_the_manifest_itself_is_noticed(folder):
    file = folder / manifest.NAME
    whole = file.read_bytes()
    for i in range(len(whole)):
        for changed in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            file.write_bytes(changed)
            with pytest.raises(manifest.DamagedError, match=r"manifest\.json is damaged"):
                manifest.read(folder)
    file.write_bytes(whole)
    assert manifest.read(folder)["step"] == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"seal": 1}', "\xff"])
def test_a_manifest_that_is_something_else_is_damaged(folder, text):
    (folder / manifest.NAME).write_text(text, encoding="latin-1")
    with pytest.raises(manifest.DamagedError):
        manifest.read(folder)


def test_a_manifest_of_a_later_schema_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifest, "_SCHEMA", 2)
    manifest.write(folder, {})
    assert json.loads((folder / manifest.NAME).read_text())["schema"] == 2
    monkeypatch.undo()
    with pytest.raises(manifest.DamagedError, match="schema 2 is not known"):
        manifest.read(folder)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(manifest.DamagedError, match=r"manifest\.json is missing"):
        manifest.read(tmp_path)
