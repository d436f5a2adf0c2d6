"""Plans for GPUs without one and without the CUDA plugin: topologies, memory by formula and roofline, by hand."""

import dataclasses
import json
import math
import re
import runpy
import types

import jax
import pytest
from support import fake_gcs
from support.measured_run import write_run
from support.tiny import REPOSITORY, tiny_config

from btlm_jax.cli import main
from btlm_jax.plan import calibration, estimate, gpu_estimate, gpu_roofline, measured_step
from btlm_jax.plan.calibration import left_out
from btlm_jax.plan.chips import CHIPS, chip_of, num_chips, slice_devices, topology_named
from btlm_jax.plan.compiling import CompiledStep
from btlm_jax.plan.estimate import state_bytes
from btlm_jax.plan.executable import UNESTIMATED, Collective, Executable, Operation, read_executable
from btlm_jax.plan.flop_count import count_step_work
from btlm_jax.plan.gpu_estimate import gpu_work, step_bytes_by_formula, traced_collectives, workspace_bytes
from btlm_jax.plan.gpu_roofline import GpuWork, gpu_parts, published_gpu_points, time_gpu_exchange
from btlm_jax.plan.gpus import GPUS, answering_for
from btlm_jax.plan.placement import cpu_placement
from btlm_jax.plan.slice_plan import program_on
from btlm_jax.storage import bucket
from btlm_jax.storage.files import read_json_object
from btlm_jax.train.flops import peak_of_kind
from btlm_jax.train.memory import bytes_of

H100 = GPUS["h100"]
FROZEN = "a4d7f72fa43e"  # hash of the published runs and their parts
MOST_ERROR = 0.35  # nats, of a published run predicted by the others


@pytest.fixture(autouse=True)
def without_the_plugin(monkeypatch):
    for module in ("gpus", "slice_plan", "compiling"):
        monkeypatch.setattr(f"btlm_jax.plan.{module}.has_cuda_plugin", lambda: False)


@pytest.fixture
def run(capsys):
    """Run `btlm plan`; return exit code, output and errors."""

    def run_plan(*words: str):
        code = main(["plan", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_plan


@pytest.mark.parametrize(
    "name, topology", [("h100-8", "h100:8"), ("h200:1", "h200:1"), ("a100-4", "a100:4"), ("h100-1024", "h100:1024")]
)
def test_gpus_are_named_by_their_number(name, topology):
    assert topology_named(name) == topology
    count = int(name[5:])
    assert num_chips(topology.partition(":")[2]) == len(slice_devices(topology)) == count
    assert chip_of(topology).name == name[:4]


@pytest.mark.parametrize("name", ["h100-3", "h100-12", "a100-0", "h200-1032"])
def test_numbers_that_no_machines_have_are_refused(name):
    with pytest.raises(ValueError, match="as 1, 2, 4 or 8 in one machine, and as multiples of 8 up to 1024 in sev"):
        topology_named(name)


def test_what_is_refused_of_gpus(run):
    config = "--config=gpu/80gb_8:111M"
    code, _, said = run(config, "--topology=b200-8")
    assert code == 1 and "or GPUs: {h100,h200,a100}-{1,2,4,8,16,24,...}; or cpu; did you mean h200-8?" in said
    code, _, said = run(config, "--topology=h100-8", "--check")
    assert code == 2 and "--check asks a table of layouts, which has TPU slices only" in said
    code, _, said = run(config, "--topology=h100-8", "--slices=2")
    assert code == 1 and "--slices=2 is of TPUs; several machines of GPUs are h100-16" in said


@pytest.fixture
def planned():
    """A tiny config's program on 8 H100, its first phase, and the work of the traced step."""
    config = tiny_config(
        model__dtype="bfloat16", model__remat="matmuls_saved", model__loss_chunk=12, mesh__accumulation=2
    )
    with answering_for(H100):
        program = program_on(config, slice_devices("h100:8"))
        phase = config.curriculum.table.phases[0]
        work = count_step_work(program.trace_train_step(phase).jaxpr.jaxpr)
    return types.SimpleNamespace(program=program, phase=phase, work=work)


def matrices(model) -> tuple[int, int]:
    """Return the values of the embedding, and of all matrices of layers."""
    D, F = model.d_model, model.d_ff
    return model.vocab_size * D, model.num_layers * (4 * D * D + 3 * D * F)


def test_memory_by_formula_is_counted_by_hand(planned):
    model, phase = planned.program.config.model, planned.phase
    L, D, F = model.num_layers, model.d_model, model.d_ff
    # Matrices are split 8 ways; biases of q, k, v, out, up, gate, down and the norms' are whole on every GPU.
    parameters = 4 * (sum(matrices(model)) // 8 + L * (4 * D + 2 * F + D + 4 * D) + 2 * D)
    counters = 4 * 5 + 4 * 3 * 64  # steps, of the state, the optimizer and its history, and that history
    state = 3 * parameters + counters
    # 8 sequences of 24 in a micro-batch, 24 tokens a GPU; heads of 10 come out 24 wide, with a statistic in float32.
    assert (phase.batch_size, phase.seq_len) == (16, 24) and planned.program.config.mesh.accumulation == 2
    attention = 4 * (2 * (3 * 10 + 24) + 4)
    kept = L * 24 * (2 * 2 * D + 2 * 2 * F + attention)
    one_layer = 24 * (2 * 6 * D + 2 * 5 * F + attention)
    logits = 1 * model.loss_chunk * model.vocab_size * 4
    found = step_bytes_by_formula(planned.program, phase, has_kernel=True)
    assert found == pytest.approx(state + kept + one_layer + logits, abs=16)
    assert workspace_bytes(planned.program, phase) == 4 * 24 * 4 * (24 + 1)
    scores = 2 * 4 * 1 * 4 * 24 * 24 // 8
    narrower = 4 * 2 * (24 - 10) * 24 * (L + 1)
    assert step_bytes_by_formula(planned.program, phase, has_kernel=False) == found + scores - narrower


def test_a_step_computed_twice_needs_a_second_state(planned):
    program, phase = planned.program, planned.phase
    bad_numbers = dataclasses.replace(program.config.bad_numbers, recompute_every=1)
    twice = dataclasses.replace(program, config=dataclasses.replace(program.config, bad_numbers=bad_numbers))
    once, then = (gpu_estimate._memory_by_formula(each, phase, gpu=H100, workspace=0) for each in (program, twice))
    assert then.needed - once.needed == state_bytes(program) > 0
    step = CompiledStep(
        program="", argument_bytes=state_bytes(program), output_bytes=0, alias_bytes=0, temporary_bytes=1,
        code_bytes=1, executable=Executable(collectives=(), operations=()), seconds=0,
    )  # fmt: skip
    once, then = (estimate._memory(each, step, chip=CHIPS["v5e"]) for each in (program, twice))
    assert then.needed - once.needed == state_bytes(program)


def test_work_of_the_traced_step_is_the_closed_form(planned):
    model, phase = planned.program.config.model, planned.phase
    tokens, T = phase.tokens_per_step / 8, phase.seq_len
    embedding, layers = matrices(model)
    work = gpu_work(planned.program, phase, planned.work)
    assert work.product_flops == pytest.approx(6 * (embedding + layers) * tokens)
    # 2 products forward and 5 backward, each at the diagonal and below, of heads widened to 24.
    assert work.attention_flops == pytest.approx(7 * 2 * tokens * (T + 1) / 2 * 24 * model.num_heads * model.num_layers)
    sent = {"all-gather": 0, "reduce-scatter": 0}
    for each in traced_collectives(planned.program, planned.work):
        assert each.groups == (tuple(range(8)),)
        if each.kind in sent:
            sent[each.kind] += each.count * each.num_bytes
            assert each.is_asynchronous
    # A micro-batch gathers everything twice in bfloat16; the table has a gradient of its own at either end.
    assert sent == {"all-gather": 2 * 2 * 2 * (embedding + layers), "reduce-scatter": 2 * 4 * (2 * embedding + layers)}


def test_exchanges_beside_products_are_those_of_weights():
    config = tiny_config(model__dtype="bfloat16", mesh__tensor=2, mesh__context=2)
    with answering_for(H100):
        program = program_on(config, slice_devices("h100:8"))
        work = count_step_work(program.trace_train_step(config.curriculum.table.phases[1]).jaxpr.jaxpr)
    found = {(each.kind, each.groups[0]): each for each in traced_collectives(program, work)}
    assert found["all-gather", (0, 4)].is_asynchronous and found["reduce-scatter", (0, 4)].is_asynchronous
    assert not found["all-reduce", (0, 1)].is_asynchronous  # of activations, over `tensor`


def test_what_the_executable_says_takes_the_formulas_place(planned, monkeypatch):
    program, phase = planned.program, planned.phase
    state = state_bytes(program)
    reduce = Collective(kind="all-reduce", num_bytes=9 * 10**9, num_devices=8, count=1, is_asynchronous=True)
    copy = Operation(name="copy", kind=UNESTIMATED, cycles=0, flops=0.0, num_bytes=335_232, count=10)
    step = CompiledStep(
        program="hash", argument_bytes=state + 50, output_bytes=700, alias_bytes=600, temporary_bytes=5000,
        code_bytes=7, executable=Executable(collectives=(reduce,), operations=(copy,)), seconds=1.0,
    )  # fmt: skip
    monkeypatch.setattr(gpu_estimate, "is_stand_in", lambda device: False)
    cache = types.SimpleNamespace(measured=None, compile_step=lambda *arguments, **named: step)
    with answering_for(H100):
        found = gpu_estimate.plan_gpu_phase(program, phase, topology="h100:8", gpu=H100, cache=cache)
    memory = found.memory
    assert (memory.outputs, memory.temporaries, memory.code) == (100, 5000, 7)
    history = bytes_of(program.state) - memory.parameters - memory.optimizer
    assert memory.other_arguments == 50 + history and memory.workspace == workspace_bytes(program, phase)
    # XLA starts it asynchronously; nothing but what it waits for comes next.
    assert found.step_time.parts.exposed == pytest.approx(2 * 9e9 * 7 / 8 / 450e9)
    assert found.moved_seconds == pytest.approx(1e-6) and found.is_compiled


GPU_PROGRAM = """
%body (state.1: (s32[], bf16[32,8])) -> (s32[], bf16[32,8]) {
  %state.1 = (s32[], bf16[32,8]{1,0}) parameter(0)
  %a = bf16[4,8]{1,0} fusion(%state.1), kind=kLoop, calls=%make_a
  %b = bf16[2,8]{1,0} fusion(%state.1), kind=kLoop, calls=%make_b
  %all-gather-start = ((bf16[4,8]{1,0}, bf16[2,8]{1,0}), (bf16[32,8]{1,0}, bf16[16,8]{1,0})) all-gather-start(%a, %b), \
channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %c = f32[32,8]{1,0} fusion(%state.1), kind=kLoop, calls=%make_c
  %reduce-scatter-start = ((f32[32,8]{1,0}), (f32[4,8]{1,0})) reduce-scatter-start(%c), channel_id=2, \
replica_groups=mesh['x'=8] {'x'}, dimensions={0}, to_apply=%add
}

ENTRY %main (state: (s32[], bf16[32,8])) -> (s32[], bf16[32,8]) {
  %state = (s32[], bf16[32,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[32,8]{1,0}) while(%state), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"23"},"known_init_step":{"init":"1","step":"1"}}
}
"""
CALLED = ("make_a", "make_b", "make_c", "add", "condition")


def test_exchanges_of_a_program_for_gpus():
    """Several arrays in one exchange, loops that say their trips; the form is that of jaxlib 0.10.2's plugin."""
    called = "".join(f"\n%{name} (x: f32[]) -> f32[] {{\n}}\n" for name in CALLED)
    found = read_executable(GPU_PROGRAM + called, num_devices=8).collectives
    whole = {each.kind: (each.num_bytes, each.count, each.num_devices, each.is_asynchronous) for each in found}
    assert whole == {"all-gather": (2 * 8 * (32 + 16), 23, 8, True), "reduce-scatter": (4 * 32 * 8, 23, 8, True)}


def test_a_roofline_by_hand():
    work = GpuWork(
        product_flops=2 * 989e12, attention_flops=98.9e12, tokens=1000, num_layers=2, d_model=10, d_ff=30, mlp_inputs=2,
        itemsize=2, logits=50, parameters=100, micro_batches=3, computed_again=1.0,
    )  # fmt: skip
    # A layer and token: 4 + 6 + 4 values of d_model, 3 of d_ff, forward, again, and twice backward.
    assert work.moved_bytes == 2 * 1000 * 2 * (14 * 10 + 3 * 30) * 4 + 50 * 18 + 100 * (3 * 24 + 32)
    gather = Collective(kind="all-gather", num_bytes=9 * 10**9, num_devices=8, count=2, is_asynchronous=True)
    parts = gpu_parts(work, [time_gpu_exchange(gather, gpu=H100)], gpu=H100)
    assert parts.roofline == pytest.approx(2 + 0.1 + work.moved_bytes / 3352.32e9)
    assert parts.asynchronous == pytest.approx(2 * 9e9 * 7 / 8 / 450e9) and parts.exchanged == 0


@pytest.mark.parametrize(
    "kind, group, seconds, way",
    [
        ("all-gather", range(4), 9e9 * 3 / 4 / 450e9, "NVLink of 4"),
        ("all-reduce", range(8), 2 * 9e9 * 7 / 8 / 450e9, "NVLink of 8"),
        ("reduce-scatter", range(16), 9e9 * 15 / 16 / 450e9, "2 machines, 8 GPUs of each"),  # the network: 0.011
        ("all-gather", (0, 8), 9e9 / 2 / 50e9, "2 machines, 1 GPUs of each"),
        ("all-to-all", range(8), 9e9 * 7 / 8 / 450e9, "NVLink of 8"),
        ("all-to-all", range(16), 9e9 / 2 / 50e9, "2 machines, 8 GPUs of each"),
        ("collective-permute", (7, 8), 9e9 / 50e9, "2 machines, 1 GPUs of each"),
    ],
)
def test_seconds_of_exchanges(kind, group, seconds, way):
    group = tuple(group)
    each = Collective(
        kind=kind, num_bytes=9 * 10**9, num_devices=len(group), count=3, is_asynchronous=False, groups=(group,)
    )
    found = time_gpu_exchange(each, gpu=H100)
    assert found.seconds == pytest.approx(3 * seconds) and found.way == way


def test_published_runs_correct_the_times():
    points, runs = published_gpu_points(), read_json_object(gpu_roofline.RUNS_FILE)["runs"]
    assert gpu_roofline.gpu_calibration_hash() == FROZEN
    for run, (point, predicted) in zip(runs, left_out(points), strict=True):
        assert run["source"].startswith("https://") and 1.4 < point.ratio < 2.6
        assert abs(math.log(point.measured / predicted)) < MOST_ERROR
        if rate := re.match(r"([\d,]+) tokens/s", run["published"]):
            tokens = run["batch_size"] * run["seq_len"]
            assert point.measured == pytest.approx(tokens / int(rate[1].replace(",", "")), rel=1e-4)
    # Llama 2 7B by hand, one GPU of 8: 6.607e9 in matrices, causal attention, fsdp hidden.
    first = points[0]
    matrices_7b = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert first.parts.products * 989e12 == pytest.approx(6 * matrices_7b * 16 * 4096 / 8)
    assert first.hfu == pytest.approx(0.50, abs=0.01)
    assert calibration.correction_by(points, chip="h100").error == calibration.correction_by(points, chip="a100").error


def test_the_table_of_published_runs_is_of_these():
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "gpu_plans.py"))
    assert script["RUNS_REPORT"].read_text() == script["make_runs_report"]() + "\n"


SMALL = [
    f"--config.{key}={value}"
    for key, value in {
        "model.vocab_size": 300, "model.num_layers": 2, "model.d_model": 64, "model.d_ff": 96, "model.loss_chunk": 64,
        "curriculum.seq_len": "(256,)", "curriculum.batch_size": "(8,)", "curriculum.num_tokens": "(204800,)",
    }.items()
]  # fmt: skip


def test_the_command_by_formula(run, tmp_path):
    path = tmp_path / "plan.json"
    code, said, _ = run("--config=local_cpu", *SMALL, "--topology=h100-4", f"--json={path}", "--usd_per_chip_hour=2",
                        f"--cache={tmp_path}")  # fmt: skip
    assert code == 0
    assert "Attention: chunked, in XLA: cuDNN's kernel takes bfloat16" in said  # of a config for CPUs
    assert "By formula, not compiled; to have the steps compiled" in said and "btlm_jax[cuda]" in said
    assert "by 4 published runs on h100, of 8 in all, none of this model" in said and "Cost: " in said
    plan = json.loads(path.read_text())
    (phase,) = plan["phases"]
    memory = phase["memory"]
    assert plan["works"] and plan["num_chips"] == 4 and not phase["compiled"]
    assert memory["available"] == int(0.9 * 84_942_979_072)
    assert sum(memory[name] for name in memory if name not in ("available", "needed")) == memory["needed"]
    assert phase["peak_flops"] == 4 * peak_of_kind(H100.kind) == 4 * 989e12


def test_steps_of_ones_own_on_gpus_correct_later_plans(run, tmp_path, monkeypatch):
    write_run(tmp_path / "run", steps=30, devices="4 x NVIDIA H100 80GB HBM3")
    asked = [f"--measured={tmp_path / 'run'}", "--topology=h100-4", f"--cache={tmp_path}"]
    code, said, _ = run(*asked)
    assert code == 0 and said.count("Measured, run, phase 1") == 1 and "by 4 published runs on h100" in said
    assert run(*asked)[1] == said  # a run is not held against itself
    monkeypatch.setenv(bucket.STAGING_VARIABLE, str(tmp_path / "staging"))
    with fake_gcs.connected({}, monkeypatch) as url:
        bucket.upload_run(tmp_path / "run", f"{url}/run")
        assert run(f"--measured={url}/run", *asked[1:])[1] == said
        code, _, error = run(f"--measured={url}/run", "--topology=h100-8")
        assert code == 1 and f"{url}/run ran on 4 chips" in error
        bucket._kept_open.close()
    _, said, _ = run(f"--config={tmp_path / 'run' / 'config.json'}", *asked[1:])
    assert "by steps measured here (1 of about this length)" in said
    code, _, said = run(asked[0], "--topology=h100-8")
    assert code == 1 and "ran on 4 chips of h100; --topology=h100:8 has 8 of h100" in said


def test_layouts_are_searched_by_formula(run, tmp_path):
    bfloat16 = "--config.model.dtype=bfloat16"
    code, said, _ = run("--config=local_cpu", *SMALL, bfloat16, "--topology=a100-2", "--search", f"--cache={tmp_path}")
    assert code == 0 and "layouts planned by formula" in said and "--config.mesh.tensor=1" in said


def test_a_config_is_written_for_gpus(tmp_path, capsys):
    path = tmp_path / "my.py"
    asked = ["--params=69K", "--vocab_size=300", "--tokens=10M", "--seq_len=64", "--topology=h100-2"]
    assert main(["new", *asked, f"--cache={tmp_path}", f"--output={path}"]) == 0
    assert re.search(r"the fastest of \d+ layouts planned by formula for h100:2", path.read_text())
    assert 'dtype="bfloat16"' in path.read_text()


def test_a_step_that_does_not_fit(run, tmp_path):
    code, said, _ = run("--config=gpu/80gb_1:2.7B", "--config.mesh.accumulation=8", "--topology=a100-1",
                        f"--cache={tmp_path}")  # fmt: skip
    assert code == 1 and re.search(
        r"PROBLEM: phase 1 .* does not fit: it needs 1\d\d\.\d\d GiB of a chip's 71.33", said
    )


def test_an_evaluation_that_does_not_fit(run, tmp_path):
    evaluation = "--config.evaluation.batch_size=1048576"
    code, said, _ = run("--config=local_cpu", *SMALL, evaluation, "--topology=h100-1", f"--cache={tmp_path}")
    assert code == 1 and "PROBLEM: evaluation.batch_size=1,048,576 of 256 tokens each needs at least " in said


@pytest.mark.parametrize(
    "changes",
    [
        {"data__weights": "web=3,books=1; web=1,books=1", "corpus__source": "prepared"},
        {"log__profile_steps": "5:7"},
        {"optimizer__schedule_begin": 5 * 384, "optimizer__schedule_tokens": 3 * 384},
        {"optimizer__schedule": "wsd", "optimizer__weight_decay": "auto", "optimizer__average": "last"},
    ],
)
def test_a_micro_batch_is_of_any_config(changes):
    """Keys that speak of the whole run's steps or phases are none of its one step."""
    config = tiny_config(**changes)
    placement = cpu_placement(config.curriculum.table)
    for phase in config.curriculum.table.phases:
        program = measured_step._micro_program(config, placement, phase, devices=jax.devices()[:1])
        assert program.config.curriculum.table.num_steps == 1


def test_cpu_is_measured_as_it_is_laid_out(run, monkeypatch):
    memory = types.SimpleNamespace(argument_size_in_bytes=2**30, temp_size_in_bytes=2**29)
    step = types.SimpleNamespace(memory_analysis=lambda: memory)
    monkeypatch.setattr(measured_step.Program, "trace_train_step", lambda program, phase: phase)
    monkeypatch.setattr(measured_step.Program, "compile", lambda program, traced: step)
    monkeypatch.setattr(measured_step, "_time_step", lambda program, step: 0.25)
    monkeypatch.setattr(measured_step, "memory_bytes", lambda device: 2**31)
    config = ["--config=local_cpu", *SMALL, "--config.mesh.accumulation=4", "--topology=cpu"]
    code, said, _ = run(*config)
    assert code == 0 and "A step needs 1.50 of 2.0 GiB, as compiled here" in said
    assert "Phase 1: 100 steps of 8 x 256 tokens, 1 s each, 2,048 tokens/s" in said  # four micro-batches
    assert run(*config, "--config.mesh.tensor=2")[0] == 1
    code, _, said = run(*config, "--config.evaluation.batch_size=1048576")
    assert code == 1 and "evaluation.batch_size=1,048,576 of 256 tokens each needs at least " in said
    code, _, said = run(*config, "--search")
    assert code == 2 and "--topology=cpu measures the config as it is: leave out --search" in said
    memory.temp_size_in_bytes = 2**31
    code, said, _ = run(*config)
    assert code == 1 and "PROBLEM: it does not fit" in said
