"""What models answer to a few questions: python recipes/chat/say.py MODEL..."""

import sys

from craton.engine.converse import Ask, answer, open_talker, prepare

QUESTIONS = ("Hello! Who are you?", "What is the capital of France?", "Name three animals.", "Why is the sky blue?")
MOST = 60  # tokens


def main() -> None:
    for path in sys.argv[1:]:
        talker, ended = open_talker(path, path), 0
        for question in QUESTIONS:
            chats = talker.tokenizer.chat_template is not None
            asked = Ask(
                {"temperature": 0.0, "max_tokens": MOST}, prompt=None if chats else talker.tokenizer.encode(question)
            )
            if chats:
                asked.messages = [{"role": "user", "content": question}]
            said = list(answer(talker, prepare(talker, asked)))
            text = "".join(p.text for delta in said for p in delta.parts)
            ended += len(talker.tokenizer.encode(text)) < MOST - 1
            print(f"{path.rstrip('/').rpartition('/')[2]}: {question} -> {text!r}")
        print(f"{path}: {ended} of {len(QUESTIONS)} answers came to an end")


if __name__ == "__main__":
    main()
