"""1.31B parameters, 26.2B tokens (20 a parameter), 2,048 then 8,192 long, on v5e:8x8.

Written by: btlm new --params=1.3B --topology=v5e:8x8 --plan_from=table.json --output=1.3B.py
See first:  btlm train --config=1.3B.py --dry-run
Train:      btlm train --config=1.3B.py --workdir=DIR --config.data.store=STORE
Memory:     predicted: 10.79 of a chip's 15.75 GiB on v5e:8x8, 64 chips, 32% to spare
Time:       predicted: 9.2 to 11.1 hours, of steps alone (docs/guide/plan.md; jax 0.10.2, jaxlib 0.10.2, libtpu
            0.0.42.1)
Loss:       none is predicted: no scaling law has been fitted to models of this recipe
Rules:      docs/guide/new.md; what follows from none is as in configs/btlm_3b_8k.py
"""

from ml_collections import ConfigDict

TOPOLOGY = "v5e:8x8"
OTHERS = ()  # further layouts for btlm plan --table
TOKENS_PER_STEP = 512 * 2048  # = 128 * 8192 = 1,048,576


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=1,  # of the initial parameters
            model=dict(
                vocab_size=50257,  # GPT-2's tokenizer
                # the shape nearest to the parameters asked for and to BTLM's d_model = 80 num_layers: here 85
                num_layers=24,
                d_model=2048,  # a multiple of 128, a TPU's lanes
                num_heads=32,  # heads 64 wide: the least power of two, from 4 on, that makes them at most 112
                # 8/3 d_model, rounded down to an even number as BTLM's 6,826; a TPU pads it to 5,504, 0.8% more
                d_ff=5460,
                layer_norm_eps=1e-5,  # as BTLM's
                qk_norm="none",  # none, as BTLM's
                alibi_scaling=1.0,  # positions as trained
                dtype="bfloat16",  # of activations; parameters and sums are float32 anyway
                attention="auto",  # the fastest for the devices
                remat="matmuls_saved",  # what the backward pass keeps: compiled for v5e:8x8 (btlm plan --table)
                loss_chunk=512,  # positions whose logits exist at one time
            ),
            mup=dict(
                preset="btlm",  # as BTLM's: docs/internals/mup.md
                base_d_model=256.0,  # width of the proxy that the constants were tuned on: m = d_model / 256 = 8
                base_d_ff=682.5,  # d_ff / m: both widths grow alike
                base_num_layers=24,  # read by completep only
                init_std=0.073,  # BTLM's, tuned on the proxy; / sqrt(m) for hidden matrices
                embedding_multiplier=14.6,  # BTLM's, tuned on the proxy
                output_multiplier=2.22,  # BTLM's, tuned on the proxy; / m
            ),
            curriculum=dict(
                seq_len=(2048, 8192),  # BTLM's
                # 1,048,576 tokens: the best batch grows as tokens^0.383 (arXiv 2505.13738), through BTLM's 3,932,160 at
                # 627.7 B
                batch_size=(512, 128),
                # 3/4 and 1/4 of the steps, as BTLM's; 26.23 B in all, 20 a parameter
                num_tokens=(18_759 * TOKENS_PER_STEP, 6253 * TOKENS_PER_STEP),
            ),
            optimizer=dict(
                schedule="linear",  # as BTLM's
                peak_learning_rate=0.012,  # of BTLM, tuned on the proxy; hidden matrices have / m = 0.0015
                end_learning_rate=0.00010198,  # 0.85 % of the peak, as BTLM's
                initial_learning_rate=0.0,  # as BTLM's
                warmup_tokens=357 * TOKENS_PER_STEP,  # 375 M tokens (arXiv 2304.03208), at most a tenth of the run
                decay_share=0.2,  # of wsd only
                schedule_begin=0,  # with the run
                schedule_tokens=0,  # 0: the whole run
                beta1=0.9,  # as BTLM's
                beta2=0.95,  # as BTLM's
                eps=1e-8,  # as BTLM's
                # AdamW remembers tau = m / (peak decay steps) = 0.267 of the run in hidden matrices; arXiv 2505.13738
                # has 0.210 for so many tokens a parameter
                weight_decay=0.1,
                weight_decay_convention="preset",  # coupled to the learning rate, as BTLM's
                z_loss=0.0,  # none, as BTLM's
                clip_norm=1.0,  # as BTLM's
                hidden_optimizer="adamw",  # AdamW, as BTLM's
                muon_learning_rate=0.02,  # of muon only
                average="none",  # none is kept
                average_share=0.1,  # of ema and last only
                freeze="",  # every parameter is trained
            ),
            mesh=dict(
                tensor=1,  # ways that heads and d_ff are split: compiled for v5e:8x8 (btlm plan --table)
                context=1,  # ways that positions are split: compiled for v5e:8x8 (btlm plan --table)
                accumulation=2,  # micro-batches a step: compiled for v5e:8x8 (btlm plan --table)
                gradient_dtype="float32",  # in which devices sum gradients; bfloat16 halves what is exchanged
            ),
            data=dict(
                store="store",  # the token store, from the workdir if relative; --config.data.store=STORE
                seed=1,  # of the order of blocks
                weights="",  # the sources as they are
                max_epochs=1,  # passes over the store that the tokens may take
                prefetch=4,  # batches read ahead
                document_mask=False,  # as BTLM's
            ),
            corpus=dict(
                source="prepared",  # the store must exist: btlm corpus makes it
                max_bytes=2_570_000_000_000,  # as BTLM's; of no effect on a prepared store, as the two below
                heldout_fraction=0.0017,  # as BTLM's
                heldout_bytes_per_source=300_000_000,  # as BTLM's
            ),
            evaluation=dict(
                every_steps=1250,  # a twentieth of the run, at most BTLM's 2,000
                blocks_per_source=64,  # as BTLM's
                batch_size=64,  # a micro-batch of the last phase, whose sequences are a block of the store long
            ),
            checkpoint=dict(
                every_steps=200,  # a tenth of the run, at most BTLM's 200
                keep_last=3,  # as BTLM's
                keep_every=10_000,  # as BTLM's
                keep_hours=0.0,  # none for its age
            ),
            bad_numbers=dict(
                spike_score=30.0,  # deviations above the median; none of the runs measured has 14
                max_skips=8,  # steps in a row, and then the run goes back to a checkpoint
                max_rollbacks=3,  # times, and then it stops
                compare_every=0,  # steps between comparisons of the devices' copies; 0: none
                recompute_every=0,  # steps of which one is computed twice and compared; 0: none
            ),
            log=dict(
                every_steps=10,  # every step in runs below 1,000
                sample_prompt="The key to training a language model is",  # continued at the end
                sample_tokens=128,  # of the continuation
                trackers="",  # wandb, mlflow or both: a run's numbers go there too
                reference="",  # no run to compare the curve with
                profile_steps="",  # as 100:105: steps to trace
            ),
        )
    )
