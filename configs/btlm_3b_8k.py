"""BTLM-3B-8K, the paper's run (arXiv 2309.11568): 2.65 B parameters, 627.7 B tokens of SlimPajama, 2k then 8k.

Command:   btlm train --config=configs/btlm_3b_8k.py --workdir=DIR --config.data.store=STORE
See first: btlm train --config=configs/btlm_3b_8k.py --workdir=DIR --dry-run
Hardware:  a TPU pod slice. Values: the published 2k and 8k training configs of the same authors.
"""

from ml_collections import ConfigDict

TOKENS_PER_STEP = 1920 * 2048  # = 480 * 8192 = 3,932,160


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=1,
            model=dict(
                vocab_size=50257,
                num_layers=32,
                d_model=2560,
                num_heads=32,
                d_ff=6826,
                layer_norm_eps=1e-5,
                qk_norm="none",
                alibi_scaling=1.0,
                dtype="bfloat16",
                attention="auto",
                remat="full",
                loss_chunk=512,
            ),
            mup=dict(
                preset="btlm",
                base_d_model=256.0,
                base_d_ff=682.6,
                base_num_layers=32,
                init_std=0.073,
                embedding_multiplier=14.6,
                output_multiplier=2.22,
            ),
            curriculum=dict(
                seq_len=(2048, 8192),
                batch_size=(1920, 480),
                num_tokens=(119_727 * TOKENS_PER_STEP, 39_909 * TOKENS_PER_STEP),
            ),
            optimizer=dict(
                schedule="linear",
                peak_learning_rate=0.012,
                end_learning_rate=1.0198e-4,
                initial_learning_rate=0.0,
                warmup_tokens=95 * TOKENS_PER_STEP,
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
                source="prepared",
                max_bytes=2_570_000_000_000,
                heldout_fraction=0.0017,
                heldout_bytes_per_source=300_000_000,
            ),
            evaluation=dict(every_steps=2000, blocks_per_source=64, batch_size=480),
            checkpoint=dict(every_steps=200, keep_last=3, keep_every=10_000, keep_hours=0.0),
            bad_numbers=dict(spike_score=30.0, max_skips=8, max_rollbacks=3, compare_every=0, recompute_every=0),
            log=dict(
                every_steps=10,
                sample_prompt="The key to training a language model is",
                sample_tokens=128,
                trackers="",
                reference="",
                profile_steps="",
            ),
        )
    )
