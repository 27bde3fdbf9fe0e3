"""The peers' side of ``bench_train``: transformers with PEFT, and TRL's GRPOTrainer.

Both keep activations instead of recomputing them (gradient checkpointing off), which is the
faster choice for them.
"""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import torch
from bench_work import (
    LEARNING_RATE,
    MICROBATCH,
    Channel,
    Job,
    clock,
    grpo_prompts,
    rollout_prompts,
    sample_reward,
    scored_completions,
    sft_rows,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

NO_TOKEN = -1  # as the end-of-sequence id: nothing ends a completion early


def _load(job: Job) -> Any:
    """The student with the same adapters as our side's, which PEFT keeps in float32."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(job.student, dtype=getattr(torch, job.dtype))
    return PeftModel.from_pretrained(base, job.adapter, is_trainable=True)


def _about(*packages: str) -> dict[str, Any]:
    names = ("torch", "transformers", "peft", *packages)
    return {
        "threads": f"torch: {torch.get_num_threads()} (intra-op)",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def sft(job: Job, channel: Channel) -> None:
    """An eager step: forward with labels, backward, clipping, AdamW on the adapters."""
    model = _load(job).train()
    ids = torch.tensor(sft_rows(model.config.vocab_size, job.sizes))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def take_step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    first_s, loss = clock(take_step)
    check = [loss, take_step()]
    channel.ready("transformers + PEFT, eager", {"step": first_s}, check, **_about())
    while channel.go_on():
        channel.done(step=clock(take_step)[0])


def rollout(job: Job, channel: Channel) -> None:
    """transformers' ``generate`` on merged weights: the fastest form that it has on a CPU."""
    model = _load(job).merge_and_unload().eval()
    sizes = job.sizes
    ids = torch.tensor(rollout_prompts(model.config.vocab_size, sizes))
    ones = torch.ones_like(ids)
    pad = model.generation_config.pad_token_id or 0

    def generate(number: int, **settings: Any) -> Any:
        # Sampling settings of the student's own generation_config.json must not apply.
        model.generation_config = GenerationConfig(
            max_new_tokens=number, pad_token_id=pad, eos_token_id=NO_TOKEN, **settings
        )
        with torch.inference_mode():
            return model.generate(input_ids=ids, attention_mask=ones)

    def sample() -> None:
        out = generate(
            sizes.rollout_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        new = out.shape[1] - ids.shape[1]
        if new != sizes.rollout_new_tokens:
            raise RuntimeError(f"completions of {new} tokens, expected {sizes.rollout_new_tokens}")

    first_s, _ = clock(sample)
    greedy = generate(
        sizes.greedy_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logprobs = torch.stack(greedy.logits, dim=1).log_softmax(-1).amax(-1)
    channel.ready(
        "transformers generate, adapters merged",
        {"rollout": first_s},
        logprobs.mean(-1).tolist(),
        **_about(),
    )
    while channel.go_on():
        channel.done(rollout=clock(sample)[0])


def grpo(job: Job, channel: Channel) -> None:
    """TRL's trainer, one repetition an optimizer step; its loop is held up between steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, sizes = _load(job), job.sizes
    vocab = model.config.vocab_size
    prompts = grpo_prompts(vocab, sizes)
    samples = sizes.grpo_prompts * sizes.grpo_samples
    rows = min(MICROBATCH, samples)
    generating_s = 0.0

    class Trainer(GRPOTrainer):
        """Reads prompts as token ids, and measures the time until the advantages are there."""

        def _tokenize_prompts(self, prompts):
            return [[int(token) for token in prompt.split()] for prompt in prompts], None, {}

        def _generate_and_score_completions(self, inputs):
            nonlocal generating_s
            generating_s, out = clock(super()._generate_and_score_completions, inputs)
            lengths = out["completion_mask"].sum(1)
            if not (lengths == sizes.grpo_new_tokens).all():
                raise RuntimeError(f"completions of {lengths.tolist()} tokens")
            return out

    class Repetitions(TrainerCallback):
        started = 0.0
        is_first = True

        def on_step_end(self, args, state, control, **_):
            step_s = time.perf_counter() - self.started
            seconds = {
                "rollout": generating_s,
                "train": step_s - generating_s,
                "step": step_s,
            }
            if self.is_first:
                self.is_first = False
                channel.ready("TRL GRPOTrainer", seconds, check, **_about("trl"))
            else:
                channel.done(**seconds)
            control.should_training_stop = not channel.go_on()
            self.started = time.perf_counter()
            return control

    repetitions = Repetitions()
    trainer = Trainer(
        model=model,
        reward_funcs=lambda completions, **_: [sample_reward(i) for i in range(len(completions))],
        args=GRPOConfig(
            output_dir=job.scratch,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=samples // rows,
            num_generations=sizes.grpo_samples,
            max_completion_length=sizes.grpo_new_tokens,
            temperature=1.0,
            top_k=0,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            max_steps=10**6,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            generation_kwargs={"eos_token_id": NO_TOKEN},
        ),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, p)) for p in prompts]}),
        processing_class=AutoTokenizer.from_pretrained(job.student, local_files_only=True),
        callbacks=[repetitions],
    )
    trainer.eos_token_ids = [NO_TOKEN]
    pairs = zip(prompts, scored_completions(vocab, sizes), strict=True)
    ids = torch.tensor([prompt + completion for prompt, completion in pairs])
    with torch.no_grad():
        scores, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), sizes.grpo_new_tokens
        )
    check = scores.mean(1).tolist()
    repetitions.started = time.perf_counter()
    trainer.train()
