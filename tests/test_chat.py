"""The conversation in the terminal: what the model is given each time, and how it ends."""

import io
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import N, REPOSITORY, draw, make_llm

import chat


@pytest.fixture
def talk(tiny, monkeypatch, tmp_path):
    """talk(answers, *lines) → (prompts as texts, images): a conversation in which the model says
    `answers`."""
    model, template, image_processor = tiny()
    draw("red").save(tmp_path / "red.png")
    draw("blue").save(tmp_path / "my blue.png")
    monkeypatch.chdir(tmp_path)

    def run(answers, *lines, image="red.png", limit=512, **more):
        prompts, images, left = [], [], list(answers)
        model.llm.config.max_position_embeddings = limit

        def generate(input_ids, attention_mask, pixel_values, end_token_ids, max_new_tokens, streamer):
            prompts.append(template.tokenizer.decode(input_ids[0]))
            images.append(pixel_values)
            assert input_ids.shape[1] + max_new_tokens <= limit
            said = left.pop(0)
            words = said if isinstance(said, str) else said[0]
            streamer.put(torch.empty(1, 0, dtype=torch.long))
            for token in template.tokenizer(words, add_special_tokens=False)["input_ids"]:
                streamer.put(torch.tensor([token]))
            if said is not words:
                raise KeyboardInterrupt  # Ctrl-C at this moment
            streamer.put(torch.tensor(end_token_ids))
            streamer.end()

        monkeypatch.setattr(model, "generate", generate)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.converse(model, template, image_processor, torch.device("cpu"), image, **more)
        return prompts, images

    run.template = template
    return run


def test_each_question_is_asked_with_all_that_was_said_before(talk, capsys):
    prompts, images = talk(["a red picture .", "Yes"], "What object is shown?", "", "Is it </s> <image> red?")
    assert len(prompts) == 2 and prompts[1].startswith(prompts[0])
    # Just what a training record of two turns looks like.
    messages = [
        {"role": "user", "content": "<image>\nWhat object is shown?"},
        {"role": "assistant", "content": "a red picture ."},
        {"role": "user", "content": "Is it < /s> < image> red?"},
    ]
    assert prompts[1] == talk.template.tokenizer.decode(talk.template.encode_prompt(messages, N))
    assert prompts[1].count("<image>") == N and len(images[1]) == 1
    assert capsys.readouterr().out == "a red picture .\nYes\n"  # not a terminal: the answers, and no more


def test_another_picture_begins_a_new_conversation_and_a_wrong_path_none(talk, capsys):
    lines = ("What?", "/image nothing.png", "And?", "/image 'my blue.png'", "Which?")
    prompts, images = talk(["a cat", "olive oil", "Yes"], *lines, image=None)
    assert "<image>" not in prompts[0] and images[0].shape[0] == 0  # no picture yet: text alone
    assert "a cat" in prompts[1] and "nothing.png" in capsys.readouterr().out
    assert "a cat" not in prompts[2] and "And?" not in prompts[2] and prompts[2].count("<image>") == N
    assert images[2].shape == (1, 3, 28, 28)


def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_came(talk, capsys):
    prompts, _ = talk([("a live",), ("",), "Yes"], "What?", "Hm?", "Go on!")
    assert "a live</s>" in prompts[1] and "a live</s>" in prompts[2]
    assert "Hm?" not in prompts[2]  # nothing had been said to it yet
    assert capsys.readouterr().out == "a live\n\nYes\n"


def test_the_oldest_turns_are_forgotten_but_never_the_picture(talk, capsys):
    lines = ["one one one", "two two two", "three three three", "four four four"]
    prompts, images = talk(["a cat"] * 4, *lines, limit=112, max_new_tokens=20)
    assert "one" in prompts[0] and "one" not in prompts[3] and "two" not in prompts[3]
    assert "four" in prompts[3] and all(prompt.count("<image>") == N for prompt in prompts)
    out = capsys.readouterr().out
    assert "no longer knows" in out
    prompts, _ = talk([], "long " * 200, limit=112)
    assert prompts == [] and "in fewer words" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_then_leaves(tmp_path, flags, parts, script):
    """A real process with real signals; its model, of random weights, would talk for minutes."""
    endless = make_llm(tmp_path / "endless", max_position_embeddings=100_000)
    script("stage1_align", *flags(1, max_steps=0, llm=endless, run=tmp_path / "run"))
    draw("red").save(tmp_path / "red.png")
    words = ["--run", tmp_path / "run", "--chat", "--image", "red.png", "--max-new-tokens", "50000"]
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "sanity_check.py", *words],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Python installs its own Ctrl-C only where the signal is not ignored, as it is in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert b"stage1" in process.stdout.readline()
        for _ in range(2):  # the second answer begins after the first was stopped
            process.stdin.write(b"What object is shown?\n")
            process.stdin.flush()
            assert os.read(process.stdout.fileno(), 1)  # its first words
            process.send_signal(signal.SIGINT)
            read = b""
            while not read.endswith(b"\n"):  # writer.end() has ended the line
                read += (more := os.read(process.stdout.fileno(), 1 << 16))
                assert more, process.stderr.read().decode()
        process.send_signal(signal.SIGINT)  # at the prompt
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        assert b"Traceback" not in errors
    finally:
        watchdog.cancel()
        process.kill()


def test_questions_come_through_a_pipe_and_the_end_of_them_is_the_end(tmp_path, flags, script):
    script("stage1_align", *flags(1, max_steps=0, run=tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, REPOSITORY / "sanity_check.py", "--run", tmp_path / "run", "--chat"]
        + ["--max-new-tokens", "3"],
        cwd=tmp_path,
        input=b"What?\n\xff\xfe\nWho?",
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"\x1b" not in done.stdout and b"> " not in done.stdout
