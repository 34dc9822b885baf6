"""`matkv chat`: templates that rewrite what was said, Ctrl-C, pasted lines, what is shown."""

from __future__ import annotations

import copy
import io
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import matkv as package
from matkv.artifact.artifact import Artifact
from matkv.cache.cache import LatentCache
from matkv.commands.conversation import Conversation
from matkv.commands.tables import bytes_text
from matkv.errors import DataError, MatkvError
from matkv.evaluate.samples import chat_ids, generate
from program import Program
from tiny import FAMILIES, from_config, tokens

TURNS = "{% for m in messages %}{{ m.role }}: {{ CONTENT }}\n{% endfor %}"
TEMPLATES = {
    "plain": TURNS.replace("CONTENT", "m.content"),
    # As Qwen3's: the answer is asked for after an empty thought, which history does not have.
    "drops thoughts": TURNS.replace("CONTENT", "m.content")
    + "{% if add_generation_prompt %}assistant: <think></think>{% endif %}",
    "cuts answers": TURNS.replace("CONTENT", "m.content[:3]"),
    "counts turns": "{{ messages | length }} turns\n" + TURNS.replace("CONTENT", "m.content"),
    "none": None,
}
SAID = ("Hello there, how are you?", "And again", "Once more, please")


class Stage:
    """A tiny model with its tokenizer and artifact."""

    def __init__(self, model: Any, tokenizer: Any, artifact: Artifact) -> None:
        self.model, self.tokenizer, self.artifact = model, tokenizer, artifact

    def conversation(self, template: str | None, **options: Any) -> Conversation:
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = template
        options.setdefault("max_new_tokens", 12)
        return Conversation(self.model, tokenizer, **options)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def stage(request: pytest.FixtureRequest, home: Path) -> Iterator[Stage]:
    """The model of the other tests, and one with sliding windows of 8 tokens."""
    model, tokenizer = package.load_model(home / "model")
    artifact = Artifact.load(home / "run")
    if request.param == "gemma3":
        config = FAMILIES["gemma3"]()
        config.vocab_size, config.max_position_embeddings = len(tokenizer), 2048
        model = from_config(config)
        artifact = package.calibrate(model, [tokens(4, 48, seed=7)])
    package.attach(model, artifact, 0.5, sink=2, recent=4)
    yield Stage(model, tokenizer, artifact)
    package.detach(model)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_turn_is_answered_as_if_read_from_the_start(
    stage: Stage, template: str, temperature: float
) -> None:
    chat = stage.conversation(TEMPLATES[template], temperature=temperature, seed=1)
    for said in SAID:
        chat.answer(said)
        ids = chat_ids(chat.tokenizer, chat.turns[:-1])
        cache = LatentCache(stage.model)
        fresh = generate(
            stage.model, chat.tokenizer, ids, cache, None, 12, temperature=temperature, seed=1
        )
        reply = chat.tokenizer.decode(fresh, skip_special_tokens=True)
        assert chat.turns[-1] == {"role": "assistant", "content": reply}
        assert chat.read == [*ids, *fresh][: cache.get_seq_length()]
        assert chat.cache.used_nbytes == cache.used_nbytes
    assert len(chat.turns) == 2 * len(SAID)


def test_answers_of_bytes_do_not_survive_their_text(stage: Stage) -> None:
    chat = stage.conversation(TEMPLATES["plain"], temperature=1.5)
    chat.answer(SAID[0])
    read, ids = chat.read, chat_ids(chat.tokenizer, chat.turns)
    assert ids[: len(read)] != read  # what makes the test above one of going back


def test_only_what_is_new_is_read(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = stage.conversation(TEMPLATES["none"], max_new_tokens=1)
    chat.answer(SAID[0])
    resets: list[bool] = []
    monkeypatch.setattr(chat.cache, "reset", lambda: resets.append(True))
    chat.answer(SAID[1])
    assert not resets


def test_without_a_template_the_conversation_is_its_lines(stage: Stage) -> None:
    chat = stage.conversation(None)
    first = chat.answer(SAID[0])
    chat.answer(SAID[1])
    text = f"{SAID[0]}\n{first}\n{SAID[1]}"
    ids = list(chat.tokenizer(text).input_ids)
    assert chat.read[: len(ids)] == ids


def test_ctrl_c_keeps_what_was_said_and_the_conversation(stage: Stage) -> None:
    chat = stage.conversation(TEMPLATES["plain"])
    whole = chat.answer(SAID[0])
    chat.reset()
    forward, calls = stage.model.forward, 0

    def interrupted(*args: Any, **inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return forward(*args, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.model, "forward", interrupted)
        cut = chat.answer(SAID[0])
    assert chat.read == []
    assert cut
    assert whole.startswith(cut.rstrip("\ufffd"))
    assert chat.turns[-1]["content"] == cut
    chat.answer(SAID[1])
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.read


def test_ctrl_c_before_a_word_takes_the_turn_back(stage: Stage) -> None:
    chat = stage.conversation(TEMPLATES["plain"])

    def interrupted(*args: Any, **inputs: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.model, "forward", interrupted)
        assert chat.answer(SAID[0]) == ""
    assert not chat.turns
    assert not chat.read


def test_what_cannot_be_read_is_taken_back(stage: Stage) -> None:
    chat = stage.conversation(TEMPLATES["plain"])
    chat.answer(SAID[0])
    turns = list(chat.turns)
    with pytest.raises(DataError, match="the model has 2048"):
        chat.answer("far too long " * 300)
    assert chat.turns == turns
    assert chat.answer(SAID[1])
    refusing = stage.conversation("{{ raise_exception('no\nsystem role') }}")
    with pytest.raises(MatkvError, match="refuses the conversation: no system role"):
        refusing.answer("hi")


# ---- the command


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lines that are piped into the command."""

    def pipe(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return pipe


def test_each_answer_says_what_the_cache_took(run: Path, matkv: Program, typed: Any) -> None:
    typed("hello", "", "   ", "and again")
    ended = matkv("chat", run, "--max-new-tokens", 3, "--sink", 2, "--recent", 4)
    assert ended.code == 0, ended.err
    banner, hint, *notes = ended.err.splitlines()
    assert "first 2 and last 4 tokens kept exact" in banner
    assert "cache at 50.0%: 128 bytes a token, 256 bytes in full" in banner
    assert "/help" in hint
    assert len(notes) == 2
    for note in notes:
        held = int(note.split(" tokens", 1)[0])
        took, full = 128 * (held - 6) + 256 * 6, 256 * held
        assert f"cache of {bytes_text(took)}, {took / full:.1%} of the full cache's" in note


def test_commands_of_a_conversation(run: Path, matkv: Program, typed: Any) -> None:
    typed("hello", "/help", "/nothing", "/reset", "/usr/bin is a path", "/quit", "never read")
    ended = matkv("chat", run, "--max-new-tokens", 2)
    assert ended.code == 0, ended.err
    assert ended.err.count("/reset   forget the conversation") == 2
    assert "no command /nothing" in ended.err
    assert "the conversation is forgotten" in ended.err
    assert ended.err.count("of the full cache's") == 2


def test_bytes_that_are_no_utf8_end_no_conversation(
    run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    ended = matkv("chat", run, "--max-new-tokens", 2)
    assert ended.code == 0, ended.err
    assert ended.err.count("of the full cache's") == 2


def test_an_error_ends_the_turn_and_not_the_conversation(
    run: Path, matkv: Program, typed: Any
) -> None:
    typed("far too long " * 300, "hello")
    ended = matkv("chat", run, "--max-new-tokens", 2)
    assert ended.code == 0
    assert "error: a context of" in ended.err
    assert "/reset forgets the conversation" in ended.err
    assert ended.err.count("of the full cache's") == 1


def test_a_model_without_a_template_is_named_so(
    home: Path, run: Path, tmp_path: Path, matkv: Program, typed: Any
) -> None:
    bare = Path(shutil.copytree(home / "model", tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    typed("hello", "again")
    ended = matkv("chat", run, "--model", bare, "--max-new-tokens", 2)
    assert ended.code == 0, ended.err
    assert "no chat template" in ended.err


# A process of its own session takes its standard input for the terminal that Ctrl-C comes from.
ON_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv[0] = "matkv"
runpy.run_module("matkv", run_name="__main__")
"""


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        import pty

        self.end, inner = pty.openpty()
        source = str(Path(package.__file__).parent.parent)
        self.program = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *words],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": source, "TERM": "xterm", "COLUMNS": "200"},
        )
        os.close(inner)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def prompt(self) -> str:
        """What is shown up to the next prompt, once the program waits for keys.

        Between showing a prompt and waiting, Python's readline loses a Ctrl-C.
        """
        found = self.until("you: ")
        time.sleep(0.5)
        return found

    def until(self, text: str, seconds: float = 90) -> str:
        """What is shown up to `text` and has not been read before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.end], [], [], 0.5)[0]:
                self.shown += os.read(self.end, 4096).decode(errors="replace")
        found, _, self.shown = self.shown.partition(text)
        return found

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.end)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_on_a_terminal_lines_are_edited_pasted_and_cut_short(run: Path) -> None:
    words = ("chat", str(run), "--max-new-tokens", "100000", "--model", str(_endless(run)))
    with closing(Terminal(*words)) as chat:
        chat.prompt()
        chat.type("half a line\x03")
        chat.prompt()
        chat.type("helxx\x7f\x7flo\n")
        chat.until("\n")
        time.sleep(1.5)
        chat.type("\x03")
        assert "stopped" in chat.prompt()
        chat.type("one\ntwo\nthree\n")
        time.sleep(1.5)
        chat.type("\x03")
        assert chat.prompt().count("stopped") == 1
        chat.type("\x1b[A\x1b[A\x1b[A\x1b[A")
        chat.until("hello", 20)
        chat.type("\x15\x04")
        assert chat.program.wait(60) == 0


def _endless(run: Path) -> Path:
    """The model with room for a long answer, which never ends by itself."""
    model, tokenizer = package.load_model(Artifact.load(run).base_model)
    model.config.max_position_embeddings = 10**7
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    folder = run.parent / "endless"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_full_memory_shrinks_the_cache_and_the_talk_goes_on(
    home: Path, run: Path, matkv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--length", "64", "--search-tokens", "128", "--budget", "0.5", "--budget", "0.2")
    assert matkv("allocate", run, "--text", home / "text.txt", *asked).code == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there\nAnd again\n"))
    ended = matkv("chat", run, "--budget", "0.5", "--memory", "1kB", "--max-new-tokens", "8")
    assert ended.code == 0, ended.err
    assert "the cache was full: it goes on at" in ended.err
    assert "no smaller budget is stored" in ended.err
    for size in ("0", "-1MB", "much"):
        refused = matkv("chat", run, "--memory", size)
        assert refused.code == 2 and "as 64MB or 1GiB" in refused.err
