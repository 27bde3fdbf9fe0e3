"""Memory of a GRPO step on TPU chips that are not here, by the real TPU compiler: ours or Tunix's.

And, with ``--side=decode``, of our decoding program for 64 rows.

    python tools/aot_memory.py --model=qwen2.5-1.5b,qwen3-8b --tokens=512+512,512+3584
    python tools/aot_memory.py --side=tunix --model=qwen2.5-1.5b --tokens=512+512

Our side needs the ``topology`` extra; the other one google-tunix and libtpu, in an environment of
its own if need be (it imports nothing of ours then).  Both compile loss, gradient and update of
16 sequences, LoRA of rank 16 on all linears of the layers, AdamW with clipping, bfloat16 weights
and compute, no KL, weights cut 16-fold (fsdp) and the sequences with them, one a chip.  One line
of JSON for each; bytes are a chip's.  See docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from typing import Any

ROWS, RANK, DECODED = 16, 16, 64
#: What the models' config.json say, as far as it tells on memory.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is compiled."""

    model: str  # of ``MODELS``
    prompt: int  # tokens
    completion: int
    topology: str
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    group: int  # samples of a prompt, which is computed once where whole groups meet
    flash: bool  # Tunix: with its splash attention
    microbatch: int = ROWS  # ours: sequences
    targets: str = ".*"  # ours: linears with adapters
    experts: str = ".*"  # ours: experts whose adapters act
    quantise: str = "none"  # ours: form of the frozen kernels, in blocks of 32


def ours(job: Job) -> tuple[int, int]:
    """(arguments, temporary memory) of our step, in bytes a chip."""
    from cosr_jax.config import GrpoConfig, TrainConfig
    from cosr_jax.run.plan import compile_step
    from cosr_jax.train.batching import batch_shape
    from cosr_jax.train.losses import GrpoObjective
    from cosr_jax.train.step import batch_shards

    student, mesh = _student(job)
    shape = batch_shape(ROWS, job.microbatch, job.prompt, job.completion, batch_shards(mesh))
    objective = GrpoObjective(GrpoConfig(), 1.0, ROWS * job.completion)
    train = TrainConfig(microbatch_size=job.microbatch)
    memory = compile_step(student, objective, train, shape, mesh, group=job.group)
    return memory.arguments, memory.temporary


def decode(job: Job) -> tuple[int, int]:
    """The same of our decoding program: ``DECODED`` rows in groups of eight of a prompt."""
    import functools

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from cosr_jax.rollout import slots
    from cosr_jax.sharding import array_sharding, state_shardings

    student, mesh = _student(job)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype, where=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def spread(state):
        where = state_shardings(mesh, state)
        return jax.tree.map(lambda x, where: array(x.shape, x.dtype, where), state, where)

    def cached(x):  # as ``slots.pinned`` lays it out
        axes = ("layers", "batch", "kv_heads", None, None) if x.ndim == 5 else ("batch", None)
        return array(x.shape, x.dtype, array_sharding(mesh, axes, x.shape))

    empty = functools.partial(
        slots.empty_slots,
        student.config,
        DECODED,
        DECODED // 8,
        job.prompt,
        job.completion,
        jnp.bfloat16,
        unstacked=False,
    )
    state = jax.tree.map(lambda x: array(x.shape, x.dtype), jax.eval_shape(empty))
    state = dataclasses.replace(state, cache=jax.tree.map(cached, state.cache))
    number, count = array((), jnp.float32), array((), jnp.int32)
    stops = array((student.config.vocab_size,), bool)
    drawing = slots.Drawing(array((2,), jnp.uint32), stops, number, number, count)
    each, flags = array((DECODED,), jnp.int32), array((DECODED,), bool)
    positions = array((DECODED // 8, job.prompt), jnp.int32)
    turn = slots.Turn(flags, each, each, each, positions, flags, count)
    program = functools.partial(slots.decode, student.graphdef)
    options = functools.partial(program, adapters=True, greedy=False, truncated=False)
    with jax.set_mesh(mesh):
        lowered = jax.jit(options, donate_argnums=2).lower(
            spread(student.lora),
            spread(student.base),
            state,
            drawing=drawing,
            turn=turn,
        )
        stats = lowered.compile().memory_analysis()
    return stats.argument_size_in_bytes, stats.temp_size_in_bytes


def _student(job: Job) -> tuple[Any, Any]:
    """Our student, abstract, and the mesh."""
    from cosr_jax.config import LoraConfig, MeshConfig, StudentConfig
    from cosr_jax.run.plan import topology_devices
    from cosr_jax.sharding import make_mesh
    from cosr_jax.student.model import ModelConfig, abstract_student

    student = abstract_student(
        ModelConfig.from_hf(MODELS[job.model]),
        StudentConfig(
            param_dtype="bfloat16",
            compute_dtype="bfloat16",
            quantise=job.quantise,
            quantise_block=32,
        ),
        LoraConfig(rank=RANK, targets=(job.targets,), experts=(job.experts,)),
    )
    return student, make_mesh(MeshConfig(*job.mesh), topology_devices(job.topology))


def tunix(job: Job) -> tuple[int, int]:
    """The same of Tunix's ``PeftTrainer`` step with its GRPO loss.

    Each layer is recomputed in the backward pass, as in ours: with its default, which keeps all
    activations, it takes more.
    """
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_PLATFORMS="cpu",
    )
    import importlib
    import types

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tunix.rl import algo_core, common

    family, builder, module_class = {
        "qwen2.5-1.5b": ("qwen2", "qwen2p5_1p5b", "Qwen2"),
        "qwen3-8b": ("qwen3", "qwen3_8b", "Qwen3"),
    }[job.model]
    model_lib = importlib.import_module(f"tunix.models.{family}.model")

    def shard(x, axes):
        # Tunix's own leaves activations alone where a CPU is the default device, as it is here.
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    model_lib.shard = shard
    config = getattr(model_lib.ModelConfig, builder)()
    config.dtype = config.param_dtype = jnp.bfloat16
    config.remat_config = model_lib.RematConfig.DECODER
    config.use_flash_attention = job.flash
    config.flash_attention_block_size = 512
    data, fsdp, tensor = job.mesh
    found = topologies.get_topology_desc(platform="tpu", topology_name=job.topology)
    mesh = Mesh(np.array(found.devices).reshape(data * fsdp, tensor), ("fsdp", "tp"))

    def build() -> tuple[nnx.Module, nnx.Optimizer]:
        base = getattr(model_lib, module_class)(config, rngs=nnx.Rngs(0))
        provider = qwix.LoraProvider(
            module_path=".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj",
            rank=RANK,
            alpha=float(RANK),
        )
        model = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
        return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    with mesh:
        abstract = nnx.eval_shape(build)
        graphdef, state = nnx.split(abstract)
        algorithm = types.SimpleNamespace(
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.28,
            loss_algo="grpo",
            loss_agg_mode="token-mean",
            temperature=1.0,
            kl_loss_mode="kl",
            kl_clamp_value=None,
        )

        def loss(model, example):
            return algo_core.grpo_loss_fn(model, example, algorithm, pad_id=0, eos_id=1)

        def step(state, example):  # PeftTrainer._train_step
            model, optimizer = nnx.merge(graphdef, state)
            gradient = nnx.value_and_grad(
                loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True
            )
            (value, aux), grads = gradient(model, example)
            norm = optax.global_norm(grads)
            optimizer.update(model, grads)
            trained = nnx.split((model, optimizer))[1]
            return nnx.filter_state(trained, _is_trained(nnx)), (value, aux, norm)

        trained, frozen = nnx.split_state(state, _is_trained(nnx), ...)

        def whole_step(trained, frozen, example):
            return step(nnx.merge_state(trained, frozen), example)

        def where(state):
            return jax.tree.map(
                lambda spec: NamedSharding(mesh, spec or PartitionSpec()),
                nnx.get_partition_spec(state),
                is_leaf=lambda spec: spec is None or isinstance(spec, PartitionSpec),
            )

        def array(shape, dtype):
            by_row = NamedSharding(mesh, PartitionSpec("fsdp"))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

        tokens, mask = (ROWS, job.completion), (ROWS, job.prompt)
        example = common.TrainExample(
            prompt_ids=array(mask, jnp.int32),
            prompt_mask=array(mask, bool),
            completion_ids=array(tokens, jnp.int32),
            completion_mask=array(tokens, bool),
            advantages=array((ROWS,), jnp.float32),
            ref_per_token_logps=None,
            old_per_token_logps=None,
        )
        shardings = where(trained), where(frozen)
        compiled = (
            jax.jit(
                whole_step,
                in_shardings=(*shardings, None),
                out_shardings=(shardings[0], None),
                donate_argnums=0,
            )
            .lower(trained, frozen, example)
            .compile()
        )
    stats = compiled.memory_analysis()
    return stats.argument_size_in_bytes, stats.temp_size_in_bytes


def _is_trained(nnx: Any) -> Any:
    return nnx.Any(nnx.LoRAParam, nnx.optimizer.OptState)


SIDES = {"ours": ours, "tunix": tunix, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", choices=SIDES, default="ours")
    parser.add_argument("--model", default="qwen2.5-1.5b,qwen3-8b", help="names, with commas")
    parser.add_argument("--tokens", default="512+512,512+3584", help="prompt+completion, ...")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--mesh", default="1,16,1", help="data,fsdp,tensor")
    parser.add_argument("--group", type=int, default=1, help="ours: samples of a shared prompt")
    parser.add_argument("--flash", action="store_true", help="tunix: its splash attention")
    parser.add_argument("--microbatch", type=int, default=ROWS, help="ours: sequences")
    parser.add_argument("--targets", default=".*", help="ours: config.lora.targets, one pattern")
    parser.add_argument("--experts", default=".*", help="ours: config.lora.experts, one pattern")
    parser.add_argument("--quantise", default="none", help="ours: config.student.quantise")
    options = parser.parse_args()
    data, fsdp, tensor = map(int, options.mesh.split(","))
    for model in options.model.split(","):
        for tokens in options.tokens.split(","):
            prompt, completion = map(int, tokens.split("+"))
            job = Job(
                model,
                prompt,
                completion,
                options.topology,
                (data, fsdp, tensor),
                options.group,
                options.flash,
                options.microbatch,
                options.targets,
                options.experts,
                options.quantise,
            )
            started = time.monotonic()
            # The compiler's own words go to standard output; the table should not.
            with contextlib.redirect_stdout(sys.stderr):
                try:
                    arguments, temporary = SIDES[options.side](job)
                    found: dict[str, Any] = {"arguments": arguments, "temporary": temporary}
                except Exception as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    found = {"refused": " ".join(str(error).split())[:300]}
            seconds = round(time.monotonic() - started, 1)
            row = {"side": options.side, **dataclasses.asdict(job), **found, "seconds": seconds}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
