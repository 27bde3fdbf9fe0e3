"""Reading and writing safetensors folders, whole or in shards, onto one device or many."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from student_fixtures import LORA, TINY_NAMES, tiny_student, tiny_weights, write_folder

from cosr_jax import sharding
from cosr_jax.config import MeshConfig, StudentConfig
from cosr_jax.student import weights
from cosr_jax.student.model import ModelConfig, abstract_student, random_base
from cosr_jax.student.mxfp4 import ExpandedFolder
from cosr_jax.student.names import hf_names
from cosr_jax.student.tensor_files import INDEX_NAME, TensorFolder, building, write_tensors
from cosr_jax.student.text_part import TextFolder
from cosr_jax.student.weights import hf_tensors, load_base, load_config
from cosr_jax.types import UserError


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_tensor_comes_back_under_its_name(name):
    variables = ((p, v.get_raw_value()) for p, v in tiny_student(name).base.flat_state())
    got, wanted = dict(hf_tensors(tiny_student(name).config, variables)), tiny_weights(name)
    assert got.keys() == wanted.keys()
    for tensor, value in wanted.items():
        np.testing.assert_array_equal(got[tensor], value)


def test_the_name_table_covers_the_model():
    student = tiny_student("tiny_llama3")
    assert {path for path, _ in student.base.flat_state()} == set(hf_names(student.config))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_a_mesh_gets_the_same_weights_in_parts(sizes, tmp_path):
    folder = write_folder(tmp_path, "tiny_llama3")
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    student = tiny_student("tiny_llama3")
    abstract = abstract_student(student.config, StudentConfig(), LORA)
    spread = load_base(abstract, folder, mesh)
    wanted = sharding.state_shardings(mesh, abstract.base).flat_state()
    for (path, got), (_, alone), (_, where) in zip(
        spread.flat_state(), student.base.flat_state(), wanted, strict=True
    ):
        value = got.get_raw_value()
        assert value.sharding.is_equivalent_to(where.get_raw_value(), value.ndim), path
        np.testing.assert_array_equal(value, alone.get_raw_value())
    kernel = spread["layers"]["mlp"]["up_proj"]["kernel"].get_raw_value()
    shard = kernel.addressable_shards[0].data.size
    assert shard * sizes[1] * sizes[2] == kernel.size


def test_large_stacks_are_read_layer_by_layer(tmp_path, monkeypatch):
    """The same weights, on one device or many, and the host holds about one tensor at a time."""
    config = ModelConfig(64, 128, 512, 24, 2, 2, 64, 1e-6, 1e4, True)
    abstract = abstract_student(config, StudentConfig(), None)
    base = random_base(abstract.base, seed=0)
    variables = ((path, v.get_raw_value()) for path, v in base.flat_state())
    write_tensors(tmp_path, hf_tensors(config, variables))
    monkeypatch.setattr(weights, "HELD_BYTES", 0)
    tracemalloc.start()
    got = load_base(abstract, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * 128 * 512 * 4  # a stack has 24 of these tensors, and there are three
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    spread = load_base(abstract, tmp_path, mesh)
    for value, theirs, ours in zip(*map(jax.tree.leaves, (base, got, spread)), strict=True):
        np.testing.assert_array_equal(theirs, value)
        np.testing.assert_array_equal(ours, value)


def test_mxfp4_is_expanded_without_a_wider_copy_of_all_experts(tmp_path):
    experts, out, groups = 64, 64, 8
    blocks = np.full((experts, out, groups, 16), 0x31, np.uint8)
    scales = np.full((experts, out, groups), 127, np.uint8)
    write_tensors(tmp_path, [("w_blocks", blocks), ("w_scales", scales)])
    folder = ExpandedFolder(TextFolder(TensorFolder(tmp_path)))
    tracemalloc.start()
    values = folder.read("w")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values.dtype == ml_dtypes.bfloat16 and values.shape == (experts, groups * 32, out)
    assert (values[:, ::2] == 0.5).all() and (values[:, 1::2] == 1.5).all()
    assert peak < 1.25 * values.nbytes


@pytest.mark.slow
def test_the_host_holds_about_the_largest_tensor_of_many_files(tmp_path, monkeypatch):
    """360 MiB in files of 64 MiB, of which the embedding is 64 MiB, on eight devices."""
    config = ModelConfig(32768, 512, 2048, 18, 8, 8, 64, 1e-6, 1e4, True)
    abstract = abstract_student(config, StudentConfig(), None)
    base = random_base(abstract.base, seed=0)
    variables = ((path, v.get_raw_value()) for path, v in base.flat_state())
    write_tensors(tmp_path, hf_tensors(config, variables), shard_bytes=64 << 20)
    whole = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    largest = 32768 * 512 * 4
    assert whole > 5 * largest and len(list(tmp_path.glob("*.safetensors"))) > 5
    monkeypatch.setattr(weights, "HELD_BYTES", 0)
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    for where in (None, mesh):
        tracemalloc.start()
        load_base(abstract, tmp_path, where)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"{whole / 2**20:.0f} MiB of files: {peak / 2**20:.0f} MiB at most in NumPy")
        assert peak < 1.5 * largest


def test_bfloat16_rounds_once(tmp_path):
    folder = write_folder(tmp_path, "tiny_llama")
    config = load_config(str(folder))
    abstract = abstract_student(config, StudentConfig(param_dtype="bfloat16"), LORA)
    for ours, wide in zip(
        jax.tree.leaves(load_base(abstract, folder)),
        jax.tree.leaves(tiny_student().base),
        strict=True,
    ):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, np.asarray(wide).astype(ml_dtypes.bfloat16))


def test_an_untied_copy_of_a_tied_head_and_old_buffers_are_passed_over(tmp_path):
    folder = write_folder(tmp_path, "tiny_llama")
    weights = tiny_weights("tiny_llama")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_tensors(folder, weights.items())
    abstract = abstract_student(load_config(str(folder)), StudentConfig(), LORA)
    assert jax.tree.structure(load_base(abstract, folder)) == jax.tree.structure(abstract.base)


def test_a_head_that_is_no_copy_of_a_tied_embedding_is_refused(tmp_path):
    """transformers does not tie what differs."""
    folder = write_folder(tmp_path, "tiny_llama")
    stored = tiny_weights("tiny_llama")
    head = stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    write_tensors(folder, stored.items())
    abstract = abstract_student(load_config(str(folder)), StudentConfig(), LORA)
    with pytest.raises(UserError, match=r"'lm_head\.weight' is no copy of 'model\.embed_tokens"):
        load_base(abstract, folder)


def test_tensors_of_one_folder_may_differ_in_dtype(tmp_path):
    """Each is widened exactly."""
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
    values = enumerate(tiny_weights("tiny_llama").items())
    stored = {name: value.astype(kinds[i % 4]) for i, (name, value) in values}
    folder = write_folder(tmp_path, "tiny_llama")
    write_tensors(folder, stored.items())
    config = load_config(str(folder))
    base = load_base(abstract_student(config, StudentConfig(), LORA), folder)
    variables = ((path, v.get_raw_value()) for path, v in base.flat_state())
    for name, value in hf_tensors(config, variables):
        np.testing.assert_array_equal(value, stored[name].astype(np.float32))


def test_one_file_goes_before_an_index_that_was_left(tmp_path):
    """As in transformers."""
    write_tensors(tmp_path, [("old", np.ones(2)), ("older", np.ones(2))], shard_bytes=1)
    assert TensorFolder(tmp_path).names == {"old", "older"}
    write_tensors(tmp_path, [("new", np.ones(2))])
    assert TensorFolder(tmp_path).names == {"new"}


DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 5), DTYPES), min_size=1, max_size=6
    ),
    shard_bytes=st.integers(1, 600),
)
@settings(max_examples=25, deadline=None)
def test_shards_hold_what_was_written(sizes, shard_bytes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=(a, b)).astype(d) for i, (a, b, d) in enumerate(sizes)}
    write_tensors(folder, tensors.items(), shard_bytes)
    read = TensorFolder(folder)
    assert read.names == tensors.keys()
    for name, value in tensors.items():
        assert read.shape(name) == value.shape
        np.testing.assert_array_equal(read.read(name), value)
        part = (slice(1, 3), slice(0, 1))
        if value.shape[0] >= 3:
            np.testing.assert_array_equal(read.read(name, part), value[part])
    files = sorted(p.name for p in folder.iterdir())
    if len(files) > 1:
        index = json.loads((folder / INDEX_NAME).read_text())
        assert {*index["weight_map"].values(), INDEX_NAME} == set(files)
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    else:
        assert files == ["model.safetensors"]


def test_a_folder_is_built_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"

    def build(content, fail=False, **how):
        with building(target, **how) as fresh:
            (fresh / "file").write_text(content)
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        build("half", fail=True)
    assert list(tmp_path.iterdir()) == []
    build("one")
    with pytest.raises(UserError, match="already exists"):
        build("two")
    with pytest.raises(RuntimeError):
        build("two", fail=True, replace=True)
    assert (target / "file").read_text() == "one"
    build("two", replace=True)
    assert (target / "file").read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]
