"""The laptop run: a 4 M parameter BTLM trained from nothing in under 6 minutes on 2 CPU cores.

Command:  btlm train --config=configs/local_cpu.py --workdir=runs/local
Hardware: 2 CPU cores, 3 GB of memory. Every key is btlm_3b_8k.py's; only the values differ.
The constants are BTLM's, except for the peak learning rate, 0.012 there (docs/guide/new.md), and mup.output_multiplier,
2.22 there: with it a run as short as this one spends a good part of its steps on unlearning the first logits, and ends,
in bfloat16, at 2.195 bits per byte instead of 2.142 (LOG.md, 2026-11-30).
Its corpus is the documentation that the installed Python packages carry, so it needs no download.
"""

from ml_collections import ConfigDict

TOKENS_PER_STEP = 8 * 128  # = 2 * 512 = 1,024


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=1,
            model=dict(
                vocab_size=4096,
                num_layers=4,
                d_model=256,
                num_heads=4,
                d_ff=682,
                layer_norm_eps=1e-5,
                qk_norm="none",
                alibi_scaling=1.0,
                dtype="float32",
                attention="auto",
                remat="matmuls_saved",
                loss_chunk=128,
            ),
            mup=dict(
                preset="btlm",
                base_d_model=256.0,
                base_d_ff=682.0,
                base_num_layers=4,
                init_std=0.073,
                embedding_multiplier=14.6,
                output_multiplier=0.6,
            ),
            curriculum=dict(
                seq_len=(128, 512),
                batch_size=(8, 2),
                num_tokens=(450 * TOKENS_PER_STEP, 150 * TOKENS_PER_STEP),
            ),
            optimizer=dict(
                schedule="linear",
                peak_learning_rate=0.006,
                end_learning_rate=1.0198e-4,
                initial_learning_rate=0.0,
                warmup_tokens=40 * TOKENS_PER_STEP,
                decay_share=0.2,
                schedule_begin=0,
                schedule_tokens=0,
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.1,
                weight_decay_convention="preset",
                z_loss=0.0,
                clip_norm=1.0,
                hidden_optimizer="adamw",
                muon_learning_rate=0.02,
                average="none",
                average_share=0.1,
                freeze="",
            ),
            mesh=dict(tensor=1, context=1, accumulation=1, gradient_dtype="float32"),
            data=dict(store="store", seed=1, weights="", max_epochs=1, prefetch=4, document_mask=False),
            corpus=dict(
                source="installed_python",
                max_bytes=48_000_000,
                heldout_fraction=0.05,
                heldout_bytes_per_source=250_000,
            ),
            evaluation=dict(every_steps=150, blocks_per_source=8, batch_size=8),
            checkpoint=dict(every_steps=100, keep_last=2, keep_every=1000, keep_hours=0.0),
            bad_numbers=dict(spike_score=30.0, max_skips=8, max_rollbacks=3, compare_every=0, recompute_every=0),
            log=dict(
                every_steps=1,
                sample_prompt="Return the number of",
                sample_tokens=64,
                trackers="",
                reference="",
                profile_steps="",
            ),
        )
    )
