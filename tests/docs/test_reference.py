"""The configuration reference: every field has a meaning and a reader, and readers are found where they are."""

import functools

from support.docs_scripts import DOCS, load_script

from btlm_jax.recipe import config

generate_reference = load_script("generate_reference.py")

# Of all sources, so not when tests are collected, which each worker does.
readers = functools.cache(generate_reference.find_readers)


@functools.cache
def fields() -> list:
    return [key for section in generate_reference.sections() for key in section.keys]


def test_every_field_has_a_meaning_and_is_read():
    assert not [field.key for field in fields() if not field.meaning], "say in recipe/config.py what it is"
    assert not [field.key for field in fields() if not readers()[field.owner, field.name]], (
        "nothing reads it: delete it"
    )


def test_every_key_of_a_config_is_there():
    defined = generate_reference.example_values("local_cpu")
    keys = {f"{name}.{key}" for name, value in defined.items() if isinstance(value, dict) for key in value} | {"seed"}
    assert {field.key for field in fields()} == keys


def test_allowed_values_are_those_of_the_checks():
    allowed = {field.key: field.allowed for field in fields()}
    assert allowed["model.attention"] == (", ".join(config.ATTENTIONS),)
    assert allowed["model.d_model"] == ("> 0", "d_model % num_heads == 0")
    assert allowed["optimizer.beta1"] == ("0 <= beta1 < 1",)
    assert allowed["optimizer.weight_decay"] == (
        "== AUTO or float(weight_decay) >= 0",
        "hidden_optimizer == 'adamw' or weight_decay != AUTO",
    )
    assert allowed["corpus.heldout_fraction"] == ("0 < heldout_fraction < 1",)


def test_readers_are_found_through_types():
    readers_of = {field.key: readers()[field.owner, field.name] for field in fields()}
    assert "recipe/optimizer.py" in readers_of["optimizer.beta1"]
    assert "train/loop.py" in readers_of["log.every_steps"]
    assert "train/loop.py" not in readers_of["corpus.max_bytes"]
    # The same name in another class is not a reader: a phase has a batch_size too.
    assert not any(reader.startswith("data/") for reader in readers_of["curriculum.batch_size"])


def test_the_page_has_the_reference():
    page = (DOCS / "reference" / "configuration.md").read_text()
    shown = generate_reference.on_page_markdown(page)
    assert all(f"`{field.key}`" in shown for field in fields()) and generate_reference.MARKER not in shown
