"""The command line: `gemmaqat VERB --config=FILE[:ARG] [--config.x.y=VALUE] [--workdir=DIR]`.

Here are the flags, the help and the errors; `commands.py` holds what the verbs do.
"""

import difflib
import functools
import logging as python_logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
from absl import flags, logging
from ml_collections import config_flags

from gemmaqat import commands, shipping
from gemmaqat.interop.formats import FORMATS
from gemmaqat.interop.options import TableType
from gemmaqat.planning.size import KV_TYPES
from gemmaqat.training.loop import Terminated

_USAGE_STATUS = 2
_USER_ERRORS = (ValueError, TypeError, OSError, MemoryError)


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit status.

    It is 0, 2 for a mistake in what was asked, 130 after Ctrl-C, 143 when SIGTERM came and the run
    is saved.

    Args:
        argv: the program's name, the verb, its flags.
    """
    arguments = list(argv[1:])
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help_page())
        return 0
    debug = "--debug" in arguments or bool(os.environ.get("GEMMAQAT_DEBUG"))
    try:
        verb = _find_verb(arguments[0])
        if "--help" in arguments or "-h" in arguments:
            print(_verb_help(arguments[0]))
            return 0
        options = _parse_flags(verb, [argv[0], *arguments[1:]])
        _set_up_logging()
        _set_up_compilation_cache(options.compilation_cache)
        verb.run(options)
    except _USER_ERRORS as error:
        if debug:
            raise
        print(f"gemmaqat: error: {_explain(error)}", file=sys.stderr)
        return _USAGE_STATUS
    except Terminated as stopped:
        # The module, not argv[0]: that is no command where Python was started with -m.
        command = shlex.join([sys.executable, "-m", "gemmaqat", *arguments])
        print(f"gemmaqat: stopped and saved; to go on: {command}", file=sys.stderr)
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        print("gemmaqat: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


class _Verb(NamedTuple):
    run: Callable[[Any], None]
    flags: tuple[str, ...]
    example: str


_FULL_SIZE_EXAMPLE = "--config=experiments/quickstart.py:e2b"
_VERBS = {
    "train": _Verb(
        commands.train,
        ("config", "workdir", "tiny", "dry_run"),
        "--config=experiments/e2b_q4_0_qat.py --workdir=runs/e2b",
    ),
    "compare": _Verb(
        commands.compare,
        ("config", "workdir", "tiny", "dry_run"),
        "--config=experiments/quickstart.py --workdir=runs/quickstart",
    ),
    "evaluate": _Verb(
        commands.evaluate,
        ("config", "workdir", "checkpoint", "tiny"),
        "--config=experiments/quickstart.py --checkpoint=runs/short",
    ),
    "quantize": _Verb(
        commands.quantize,
        ("config", "workdir", "checkpoint"),
        "--config=experiments/quickstart.py --checkpoint=gemma-4-E2B --workdir=packed/e2b",
    ),
    "export": _Verb(
        shipping.export,
        (
            "checkpoint", "format", "workdir", "config", "float_dtype", "tables", "text_only",
            "allow_rescale", "allow_requantize", "packed_experts", "packed_tables",
            "per_layer_scales", "shard_bytes", "stacked_layers", "prefill_lengths", "cache_length",
            "dynamic_activations",
        ),
        "--checkpoint=runs/e2b --format=gguf --workdir=shipped/e2b",
    ),
    "verify": _Verb(shipping.verify, ("checkpoint", "workdir"), "--checkpoint=shipped/e2b"),
    "generate": _Verb(
        commands.generate,
        (
            "checkpoint", "workdir", "prompt", "chat", "tokenizer", "max_new_tokens",
            "temperature", "top_k", "top_p", "seed", "dtype", "kv_cache",
        ),
        '--checkpoint=packed/e2b --prompt="Why is the sky blue?" --temperature=0.7',
    ),
    "inspect": _Verb(commands.inspect, ("config", "tiny"), _FULL_SIZE_EXAMPLE),
    "plan": _Verb(commands.plan, ("config", "tiny"), _FULL_SIZE_EXAMPLE),
    "size": _Verb(
        commands.size,
        ("size", "format", "context", "kv_cache", "json", "memory", "bandwidth", "plot"),
        "--size=e2b,e4b --memory=8GiB --bandwidth=60GB/s --plot=fits.png",
    ),
    "doctor": _Verb(commands.doctor, (), ""),
}  # fmt: skip

_FLAGS: dict[str, Callable[..., Any]] = {
    "workdir": functools.partial(
        flags.DEFINE_string, default="", help="Directory the run reads and writes."
    ),
    "dry_run": functools.partial(
        flags.DEFINE_bool, default=False, help="Print table, memory and time; start nothing."
    ),
    "tiny": functools.partial(
        flags.DEFINE_bool, default=False, help="Shrink the config to seconds on a CPU."
    ),
    "checkpoint": functools.partial(
        flags.DEFINE_string,
        default="",
        help="Hugging Face folder, work directory of a training, or packed folder.",
    ),
    "format": functools.partial(
        flags.DEFINE_string,
        default="",
        help=f"export: {', '.join(FORMATS)}; size: as in q4_0-gguf,recipe:q4_0, default all.",
    ),
    "float_dtype": functools.partial(
        flags.DEFINE_string, default="", help="Of kept matrices; default: the format's own."
    ),
    "tables": functools.partial(
        flags.DEFINE_enum,
        default="as_is",
        enum_values=list(get_args(TableType)),
        help="How a GGUF stores float vocabulary tables.",
    ),
    "text_only": functools.partial(
        flags.DEFINE_bool, default=False, help="Leave out what is not the text decoder."
    ),
    "allow_rescale": functools.partial(
        flags.DEFINE_bool, default=False, help="Round scales that the format cannot hold."
    ),
    "allow_requantize": functools.partial(
        flags.DEFINE_bool, default=False, help="Choose new codes where the grid does not fit."
    ),
    "packed_experts": functools.partial(
        flags.DEFINE_bool, default=False, help="compressed-tensors: experts packed, not float."
    ),
    "packed_tables": functools.partial(
        flags.DEFINE_bool, default=False, help="compressed-tensors: tables packed, not float."
    ),
    "per_layer_scales": functools.partial(
        flags.DEFINE_bool, default=False, help="gemma-mobile: a scale per row and layer."
    ),
    "shard_bytes": functools.partial(
        flags.DEFINE_integer, default=5_000_000_000, help="Largest safetensors file."
    ),
    "stacked_layers": functools.partial(
        flags.DEFINE_bool, default=False, help="orbax: one array per kind of layer."
    ),
    "prefill_lengths": functools.partial(
        flags.DEFINE_multi_integer,
        default=[128],
        help="litert: tokens of a prefill signature; repeat for several signatures.",
    ),
    "cache_length": functools.partial(
        flags.DEFINE_integer, default=1024, help="litert: positions of the key/value cache."
    ),
    "dynamic_activations": functools.partial(
        flags.DEFINE_bool,
        default=False,
        help="litert: let the runtime quantize float activations; not what was evaluated.",
    ),
    "prompt": functools.partial(
        flags.DEFINE_multi_string, default=[], help="Text to continue; repeat for a batch."
    ),
    "chat": functools.partial(
        flags.DEFINE_bool, default=False, help="Put each prompt through the chat template."
    ),
    "tokenizer": functools.partial(
        flags.DEFINE_string, default="", help="Its file or folder; default: the checkpoint's own."
    ),
    "max_new_tokens": functools.partial(
        flags.DEFINE_integer, default=64, help="Most tokens generated per prompt."
    ),
    "temperature": functools.partial(
        flags.DEFINE_float, default=0.0, help="Of sampling; 0 takes the most likely token."
    ),
    "top_k": functools.partial(
        flags.DEFINE_integer, default=0, help="Sample from the k most likely; 0 = all."
    ),
    "top_p": functools.partial(
        flags.DEFINE_float, default=1.0, help="Sample from the nucleus of this probability."
    ),
    "seed": functools.partial(flags.DEFINE_integer, default=0, help="Of sampling."),
    "dtype": functools.partial(
        flags.DEFINE_enum,
        default="float32",
        enum_values=["float32", "bfloat16", "float16"],
        help="Of computation and float parameters.",
    ),
    "size": functools.partial(
        flags.DEFINE_string, default="", help="Sizes, as in e2b,31b; default: all five."
    ),
    "context": functools.partial(
        flags.DEFINE_string, default="", help="Positions of the cache, as in 4096,32768."
    ),
    "kv_cache": functools.partial(
        flags.DEFINE_enum,
        default="",
        enum_values=["", *KV_TYPES],
        help=f"Type of the cache: {', '.join(KV_TYPES)}; default: the format's own. To generate: "
        "static, int8 or int4; default: that of --dtype.",
    ),
    "json": functools.partial(flags.DEFINE_bool, default=False, help="Print JSON."),
    "memory": functools.partial(
        flags.DEFINE_string, default="", help="Memory of a device, as in 8GiB: what fits in it?"
    ),
    "bandwidth": functools.partial(
        flags.DEFINE_string, default="", help="Its bandwidth, as in 60GB/s: how fast at most?"
    ),
    "plot": functools.partial(
        flags.DEFINE_string, default="", help="File for a picture of what fits, e.g. fits.png."
    ),
    "compilation_cache": functools.partial(
        flags.DEFINE_string,
        default="",
        help="Directory of compiled programs; 'off' for none. Default: the user's cache directory.",
    ),
    "debug": functools.partial(
        flags.DEFINE_bool, default=False, help="Show the traceback of an error."
    ),
}
_COMMON_FLAGS = ("compilation_cache", "debug")


def _find_verb(name: str) -> _Verb:
    if name in _VERBS:
        return _VERBS[name]
    near = difflib.get_close_matches(name, _VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see gemmaqat --help."
    raise ValueError(f"{name!r} is not one of {', '.join(_VERBS)}; {hint}")


def _parse_flags(verb: _Verb, argv: list[str]) -> Any:
    """The verb's flags; every mistake names the flag and what is near it."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for name in (*verb.flags, *_COMMON_FLAGS):
        if name == "config":
            config_flags.DEFINE_config_file(
                "config", None, "The experiment.", flag_values=values, sys_argv=argv
            )
        else:
            _FLAGS[name](name, flag_values=values)
    _check_config_path(argv)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config.") and "config" in verb.flags:
            raise ValueError(f"--{error.flagname}: give --config=FILE before it.") from None
        raise ValueError(_one_line(error)) from None
    except flags.Error as error:
        # A mistake inside a config file arrives with its traceback in the text.
        raise ValueError(str(error).strip().splitlines()[-1]) from error
    except (AttributeError, KeyError) as error:
        raise ValueError(_unknown_field(error, argv)) from error
    if rest[1:]:
        raise ValueError(f"{rest[1]!r}: not a flag; write flags as --name=value.")
    return values


def _check_config_path(argv: list[str]) -> None:
    for i, argument in enumerate(argv):
        name, separator, value = argument.partition("=")
        if name in ("--config", "-config"):
            value = value if separator else (argv[i + 1] if i + 1 < len(argv) else "")
            path = Path(value.partition(":")[0])
            if path.is_file():
                return
            known = sorted(str(p) for p in (path.parent.glob("*.py") if path.name else ()))
            near = difflib.get_close_matches(str(path), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "give the path of an experiment file."
            raise FileNotFoundError(f"--config={path}: no such file; {hint}")


def _unknown_field(error: Exception, argv: list[str]) -> str:
    """The message of ml_collections ('x' / Did you mean "y") with the flag it came from."""
    words = re.findall(r"\w+", str(error)) or [""]
    near = re.search(r'Did you mean \W*"(\w+)', str(error))
    hint = f"; did you mean {near[1]!r}?" if near else "; see the sections of gemmaqat/config.py."
    names = [argument.partition("=")[0] for argument in argv]
    flag = next((n for n in names if n.startswith("--config.") and words[0] in n.split(".")), None)
    return f"{flag or '--config'}: no such field {words[0]!r}{hint}"


def _set_up_logging() -> None:
    """Plain lines with the time; the libraries below say nothing short of a warning."""
    flags.FLAGS.mark_as_parsed()  # or absl warns that it logs before flags are parsed
    logging.use_absl_handler()
    python_logging.getLogger().setLevel(python_logging.WARNING)
    logging.get_absl_logger().setLevel(python_logging.INFO)
    logging.get_absl_handler().setFormatter(
        python_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    )


def _set_up_compilation_cache(choice: str) -> None:
    """Lets compiled programs outlive the process: flag, our variable, JAX's own, the default."""
    choice = choice or os.environ.get("GEMMAQAT_COMPILATION_CACHE", "")
    if choice == "off" or (not choice and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", choice or str(user_cache / "gemmaqat" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _help_page() -> str:
    lines = [
        "gemmaqat: quantization-aware training of Gemma 4, measured against a fair control.",
        "",
        "usage: gemmaqat VERB [--config=FILE[:ARG]] [--config.x.y=VALUE ...] [--workdir=DIR] ...",
        "",
    ]
    for name, verb in _VERBS.items():
        lines.append(f"  {name:<9} {verb.run.__doc__}")
    lines += ["", "examples:"]
    lines += [f"  gemmaqat {name} {_VERBS[name].example}" for name in ("compare", "inspect")]
    lines += [
        "  gemmaqat train --config=experiments/quickstart.py --config.train.num_steps=20 \\",
        "      --workdir=runs/short --dry_run",
        f"  gemmaqat generate {_VERBS['generate'].example}",
        "",
        "`gemmaqat VERB --help` lists its flags. Mistakes end with status 2; --debug shows where.",
    ]
    return "\n".join(lines)


def _verb_help(name: str) -> str:
    verb = _VERBS[name]
    values = flags.FlagValues()
    lines = [f"gemmaqat {name}: {verb.run.__doc__}", ""]
    for flag in (*verb.flags, *_COMMON_FLAGS):
        if flag == "config":
            lines.append(
                "  --config=FILE[:ARG]    The experiment; --config.x.y=VALUE changes a field."
            )
            continue
        _FLAGS[flag](flag, flag_values=values)
        said = values[flag].help.partition(";\n")[0]  # absl adds a line to those that repeat
        lines.append(f"  --{flag:<20} {said}")
    return "\n".join([*lines, "", f"example: gemmaqat {name} {verb.example}"])


def _explain(error: BaseException) -> str:
    """One line for the user; a hint where it may be our fault that the error was met at all."""
    if isinstance(error, OSError) and error.strerror:  # from the system, not written by us
        return f"{error.filename or 'output'}: {error.strerror}; choose another path, or free it."
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    return _one_line(error) + ("" if ours else " (run with --debug to see where)")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
