"""matkv chat: talk with a model whose cache is compressed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from io import TextIOWrapper
from types import ModuleType
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from matkv.artifact.setting import Setting, staying_text
from matkv.commands import console
from matkv.commands.conversation import Conversation
from matkv.commands.from_fields import from_fields
from matkv.commands.memory import attach_setting, cache_use
from matkv.commands.options import BudgetOpt, Loading, NewTokensOpt, RunArg, Sampling
from matkv.commands.tables import bytes_text
from matkv.errors import BudgetError, MatkvError
from matkv.ranks import RankTable

PROMPT = "you: "
# A paste ends when nothing more has come for so many seconds.
PASTE_GAP = 0.05
HELP = """\
/help    what can be typed
/reset   forget the conversation
/quit    end, as Ctrl-D does
Ctrl-C stops an answer and keeps what it said. Lines pasted together are one message."""


@from_fields(without=("budget",))
def chat_command(
    run: RunArg,
    way: Setting,
    sampling: Sampling,
    loading: Loading,
    budget: BudgetOpt = 0.5,
    max_new_tokens: NewTokensOpt = 512,
    memory: Annotated[
        str | None, typer.Option(help="bytes of cache, as 64MB, above which it shrinks")
    ] = None,
) -> None:
    """Talk with the model; the compressed cache is kept from turn to turn. Ends with Ctrl-D."""
    setting, most = way.at(budget), None if memory is None else as_bytes(memory)
    artifact, model, tokenizer = loading.open(run)
    table = attach_setting(model, artifact, setting)
    conversation = Conversation(model, tokenizer, max_new_tokens=max_new_tokens, **asdict(sampling))
    model_name = loading.model or artifact.base_model
    full = RankTable.full(table.geometry).bytes_per_token(model.dtype)
    _print_note(
        f"{model_name} · {_exact_text(*setting.exact(artifact))} · cache at "
        f"{table.budget:.1%}: {bytes_text(table.bytes_per_token(model.dtype))} a token, "
        f"{bytes_text(full)} in full\n/help says what can be typed, Ctrl-D ends"
    )
    staying = staying_text(artifact, [setting])
    if staying is not None:
        _print_note(staying)
    if not tokenizer.chat_template:
        _print_note("the model has no chat template: it goes on with the conversation as text")
    for message in _messages():
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
            _print_note("the conversation is forgotten")
        elif re.fullmatch(r"/[a-z]*", message):
            _print_note(HELP if message == "/help" else f"no command {message}; there are:\n{HELP}")
        else:
            _answer(conversation, message)
            if most is not None:
                _fit(conversation, most)


def as_bytes(text: str) -> int:
    """Bytes of a size as 64MB or 1GiB.

    Raises:
        BudgetError: it is none.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise BudgetError(f"memory {text!r} must be a number of bytes, as 64MB or 1GiB")
    return size


def _fit(conversation: Conversation, most: int) -> None:
    """Shrink a cache of more than `most` bytes, from one stored budget to the next."""
    if conversation.cache.used_nbytes <= most:
        return
    table = conversation.shrink(most)
    held = bytes_text(conversation.cache.used_nbytes)
    if conversation.cache.used_nbytes > most:
        _print_note(f"the cache holds {held}, and no smaller budget is stored: /reset forgets it")
    if table is not None:
        _print_note(f"the cache was full: it goes on at {table.budget:.1%}, with {held}")


def _answer(conversation: Conversation, message: str) -> None:
    """Print the answer and what the cache took; an error is said and ends the turn alone."""
    try:
        conversation.answer(message)
    except MatkvError as error:
        console.complain(str(error))
        _print_note("/reset forgets the conversation")
        return
    if conversation.read:
        _print_note(str(cache_use(conversation.model, conversation.cache)))
    else:
        _print_note("stopped; the conversation is read again with your next message")


def _exact_text(sink: int, recent: int) -> str:
    """Which tokens are exact, in words."""
    if not sink and not recent:
        return "no token kept exact"
    return f"first {sink} and last {recent} tokens kept exact"


def _print_note(text: str) -> None:
    console.err.print(text, style="dim", soft_wrap=True)


# ---- reading what is typed


def _messages() -> Iterator[str]:
    """What is typed or piped in, message by message, until it ends; empty ones are left out."""
    editor = _line_editor()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 end no conversation
    while True:
        try:
            message = _read_message(editor).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if message:
            yield message


def _line_editor() -> ModuleType | None:
    """Python's readline, which `input` uses once it is imported; None off a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        import readline
    except ImportError:  # Windows has its own
        return None
    readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def _read_message(editor: ModuleType | None) -> str:
    """A line, or all the lines of a paste; from a pipe each line is a message."""
    lines = [input(PROMPT if sys.stdin.isatty() else "")]
    while editor is not None and _more_is_waiting():
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)


def _more_is_waiting() -> bool:
    from select import select

    return bool(select([sys.stdin], [], [], PASTE_GAP)[0])
