"""`btlm completion`: a shell's completion of verbs, flags, their values, and keys of a config, made from the flags."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence

from btlm_jax.cli import DONE, VERBS, UsageError
from btlm_jax.cli.config_keys import Key, sections
from btlm_jax.cli.parse import SWITCH, Flags, config_names, did_you_mean

COMPLETION_HELP = """btlm completion SHELL: print a script that completes verbs, flags, values and keys of a config.

examples:  source <(btlm completion bash)                                  in ~/.bashrc
           source <(btlm completion zsh)                                   in ~/.zshrc, after compinit
           btlm completion fish > ~/.config/fish/completions/btlm.fish

The script is made from the flags of this installation: print it again after an upgrade.
"""

SHELLS = ("bash", "zsh", "fish")


def completion(arguments: Sequence[str]) -> int:
    """Run `btlm completion`; return the exit code."""
    shells = [argument for argument in arguments if not argument.startswith("-")]
    if not completion_flags().parse([argument for argument in arguments if argument.startswith("-")]):
        return DONE
    if len(shells) != 1 or shells[0] not in SHELLS:
        given = " ".join(shells) or "nothing"
        raise UsageError(f"btlm completion needs one of {', '.join(SHELLS)}; got {given}{did_you_mean(given, SHELLS)}")
    print({"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[shells[0]]())
    return DONE


def completion_flags() -> Flags:
    """Define the flags of `btlm completion`: those that every verb has."""
    return Flags(COMPLETION_HELP)


def commands() -> dict[str, Callable[[], Flags]]:
    """Return what defines the flags of each command; its words are those of the key."""
    from btlm_jax.cli import (
        build_kernels,
        checkpoints,
        configs,
        convert,
        corpus,
        generate,
        new,
        plan,
        report,
        status,
        train,
        tune,
    )

    found = {
        "new": new.new_flags,
        "train": train.train_flags,
        "generate": generate.generate_flags,
        "convert": convert.convert_flags,
        "plan": plan.plan_flags,
        "status": status.status_flags,
        "report": report.report_flags,
        "checkpoints": checkpoints.checkpoints_flags,
        "configs": configs.configs_flags,
        "build-kernels": build_kernels.build_kernels_flags,
        "completion": completion_flags,
    }
    found |= {f"tune {verb}": flags for verb, flags in tune.FLAGS.items()}
    return found | {f"corpus {verb}": flags for verb, flags in corpus.FLAGS.items()}


def words_after() -> dict[str, list[str]]:
    """Return what may follow each beginning of a command, "" included: verbs, then flags, "=" where a value follows."""
    words = {"": [*VERBS], "corpus": [], "tune": []}
    for command, define in commands().items():
        verb, _, sub_verb = command.partition(" ")
        if sub_verb:
            words[verb].append(sub_verb)
        words[command] = list(_flag_words(define()))
    words["completion"] = [*SHELLS, *words["completion"]]
    return words


def values_of() -> dict[str, list[str]]:
    """Return the values of each flag that has some to choose from, of whatever command."""
    values = {"--config": config_names()}
    for define in commands().values():
        for flag in define().defined():
            if flag.choices:
                values[f"--{flag.name}"] = list(flag.choices)
    return values


def _flag_words(flags: Flags) -> Iterator[str]:
    flags.define_for_all()
    for flag in flags.defined():
        yield f"--{flag.name}" if flag.kind == SWITCH else f"--{flag.name}="
    yield from (f"--config.{key.key}=" for key in _config_keys(flags))


def bash_script() -> str:
    """Return the script for bash, which zsh's bashcompinit runs too."""
    words = "\n".join(
        f"    {shlex.quote(key)}) words={shlex.quote(' '.join(w))} ;;" for key, w in words_after().items()
    )
    values = "\n".join(f"    {flag}) values={shlex.quote(' '.join(v))} ;;" for flag, v in values_of().items())
    return f"""# completion of btlm for bash: source <(btlm completion bash)
_btlm() {{
  local line=${{COMP_LINE:0:$COMP_POINT}} command= words= values= files= word current
  if [[ $line == *[[:space:]] ]]; then current=; else current=${{line##*[[:space:]]}}; fi
  set -f
  for word in ${{line%"$current"}}; do
    case $word in btlm|*/btlm|-*) ;; *) command="${{command:+$command }}$word" ;; esac
  done
  set +f
  case "$command" in
{words}
  esac
  local tail=${{current##*=}}
  if [[ $current == --*=* ]]; then
    case ${{current%%=*}} in
{values}
    *) compopt -o default 2> /dev/null; files=yes ;;
    esac
    # For bash the value is a word, for zsh --flag=value is one; its compgen takes the beginnings of files from PREFIX.
    if [[ $files ]]; then COMPREPLY=($(PREFIX=$tail compgen -f -- "$tail"))
    else COMPREPLY=($(compgen -W "$values" -- "$tail")); fi
    if [[ -n $ZSH_VERSION ]]; then COMPREPLY=("${{COMPREPLY[@]/#/${{current%%=*}}=}}"); fi
  else
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} != *= ]]; then COMPREPLY[0]+=" "; fi
  fi
}}
complete -o nospace -F _btlm btlm"""


def zsh_script() -> str:
    """Return the script for zsh."""
    return (
        "# completion of btlm for zsh: source <(btlm completion zsh)\nautoload -U +X bashcompinit && bashcompinit\n"
        + (bash_script().partition("\n")[2])
    )


def fish_script() -> str:
    """Return the script for fish."""
    lines = ["# completion of btlm for fish", "complete -c btlm -f"]
    words, values = words_after(), values_of()
    for after in ("", "corpus", "tune", "completion"):
        names = [word for word in words[after] if not word.startswith("-")]
        seen, seen_one = f"__fish_seen_subcommand_from {after}", f"__fish_seen_subcommand_from {' '.join(names)}"
        condition = f"{seen} && not {seen_one}" if after else "__fish_use_subcommand"
        lines.append(f"complete -c btlm -n {shlex.quote(condition)} -a {shlex.quote(' '.join(names))}")
    for command, define in commands().items():
        flags = define()
        flags.define_for_all()
        condition = shlex.quote(" && ".join(f"__fish_seen_subcommand_from {word}" for word in command.split()))
        for flag in flags.defined():
            choices = values.get(f"--{flag.name}", [])
            takes = f" -x -a {shlex.quote(' '.join(choices))}" if choices else "" if flag.kind == SWITCH else " -r -F"
            meaning = shlex.quote(flag.meaning)
            lines.append(f"complete -c btlm -n {condition} -l {flag.name}{takes} -d {meaning}")
        for key in _config_keys(flags):
            lines.append(f"complete -c btlm -n {condition} -l config.{key.key} -x -d {shlex.quote(key.meaning)}")
    return "\n".join(lines)


def _config_keys(flags: Flags) -> list[Key]:
    return [key for section in sections() for key in section.keys] if flags.has_config else []
