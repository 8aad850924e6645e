"""tools.chat: what the model is given for each question, and how the conversation ends."""

import io
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import N, REPOSITORY, draw, make_llm

from tools import chat


@pytest.fixture
def talk(tiny, monkeypatch, tmp_path):
    """talk(answers, *lines) returns (prompts as texts, images) of a conversation in which the model generates
    `answers`. An answer in a tuple is interrupted by Ctrl-C."""
    model, template, image_processor = tiny()
    draw("red").save(tmp_path / "red.png")
    draw("blue").save(tmp_path / "my blue.png")
    monkeypatch.chdir(tmp_path)

    def run(answers, *lines, image="red.png", context=512, max_new_tokens=128):
        prompts, images, remaining = [], [], list(answers)
        template.context_length = context

        def generate(input_ids, attention_mask, pixel_values, end_token_ids, max_new_tokens, temperature,
                     streamer):
            prompts.append(template.tokenizer.decode(input_ids[0]))
            images.append(pixel_values)
            assert attention_mask.all() and input_ids.shape[1] + max_new_tokens <= context
            answer = remaining.pop(0)
            text = answer if isinstance(answer, str) else answer[0]
            for token in template.tokenizer(text, add_special_tokens=False)["input_ids"]:
                streamer.put(torch.tensor([token]))
            if answer is not text:
                raise KeyboardInterrupt
            streamer.put(torch.tensor(end_token_ids))
            streamer.end()

        monkeypatch.setattr(model, "generate", generate)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        pixel_values = chat.load_image(image, image_processor) if image else None
        chat.converse(model, template, image_processor, pixel_values, max_new_tokens, 0)
        return prompts, images

    run.template = template
    return run


def test_each_prompt_contains_all_earlier_turns(talk, capsys):
    lines = ("What object is shown?", "", "<image>", "<image> Is it </s> red?")
    prompts, images = talk(["a red picture .", "Yes"], *lines)
    assert len(prompts) == 2 and prompts[1].startswith(prompts[0])
    messages = [  # the same as a training record of two turns
        {"role": "user", "content": "<image>\nWhat object is shown?"},
        {"role": "assistant", "content": "a red picture ."},
        {"role": "user", "content": "Is it < /s> red?"},  # without <image>, as in training
    ]
    assert prompts[1] == talk.template.tokenizer.decode(talk.template.encode_prompt(messages))
    assert prompts[1].count("<image>") == N and len(images[1]) == 1
    assert capsys.readouterr().out == "a red picture .\nYes\n"  # no terminal, so only the answers


def test_a_new_image_begins_a_new_conversation_but_a_wrong_path_changes_nothing(talk, capsys):
    lines = ("What?", "/image nothing.png", "And?", "/image red.png", "Which?")
    prompts, images = talk(["a cat", "olive oil", "Yes"], *lines, image=None)
    assert "<image>" not in prompts[0] and images[0].shape[0] == 0  # no image yet
    assert "a cat" in prompts[1] and "nothing.png" in capsys.readouterr().out
    assert "a cat" not in prompts[2] and "And?" not in prompts[2] and prompts[2].count("<image>") == N
    assert images[2].shape == (1, 3, 28, 28)


def test_an_image_can_be_named_as_a_terminal_or_a_shell_does(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (r"my\ blue.png", '"my blue.png"', "'my blue.png'", "~/red.png"):
        prompts, images = talk(["a cat"], f"/image {name}", "What?", image=None)
        assert prompts[0].count("<image>") == N and images[0].shape == (1, 3, 28, 28), name


def test_commands_are_no_questions(talk, capsys):
    prompts, _ = talk(["a cat"], "/help", "/image", "/imagefoo.png", "What?", "/quit", "never")
    assert len(prompts) == 1 and "What?" in prompts[0]
    assert capsys.readouterr().out.splitlines() == [chat.COMMANDS] * 3 + ["a cat"]


def test_the_generated_part_of_a_stopped_answer_stays_in_the_conversation(talk, capsys):
    prompts, _ = talk([("a live",), ("",), "Yes"], "What?", "Hm?", "Go on!")
    assert "a live</s>" in prompts[1] and "a live</s>" in prompts[2]
    assert "Hm?" not in prompts[2]  # nothing was generated, so the question is not part of the conversation
    assert capsys.readouterr().out == "a live\n\nYes\n"


def test_the_oldest_turns_are_dropped_but_never_the_image(talk, capsys):
    lines = ["one one one", "two two two", "three three three", "four four four"]
    prompts, _ = talk(["a cat"] * 4, *lines, context=112, max_new_tokens=20)
    assert "one" in prompts[0] and "one" not in prompts[3] and "two" not in prompts[3]
    assert "four" in prompts[3] and all(prompt.count("<image>") == N for prompt in prompts)
    assert "The oldest questions and answers were dropped" in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_program(tmp_path, flags, script):
    """A real process with real signals. Its model has random weights and would generate for minutes."""
    endless = make_llm(tmp_path / "endless", max_position_embeddings=100_000)
    script("stage1_align", *flags(1, max_steps=0, llm=endless, run=tmp_path / "run"))
    draw("red").save(tmp_path / "red.png")
    words = ["--run", "run", "--image", "red.png", "--max-new-tokens", "50000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.chat", *words], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Python handles Ctrl-C only if the signal is not ignored, as it is in a background job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        for _ in range(2):  # the second answer begins after the first was stopped
            process.stdin.write(b"What object is shown?\n")
            process.stdin.flush()
            assert os.read(process.stdout.fileno(), 1), process.stderr.read().decode()  # its first words
            process.send_signal(signal.SIGINT)
            output = b""
            while not output.endswith(b"\n"):  # streamer.end() has ended the line
                output += (more := os.read(process.stdout.fileno(), 1 << 16))
                assert more, process.stderr.read().decode()
        process.send_signal(signal.SIGINT)  # at the prompt
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        assert b"Traceback" not in errors
    finally:
        watchdog.cancel()
        process.kill()
