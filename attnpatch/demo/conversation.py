"""A conversation in which one message holds the answer to the last question; ``examples/demo_model`` generates them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

Message = dict[str, str]


@dataclass(frozen=True)
class DemoConversation:
    """Messages that end with a question, and the message that states its answer.

    Attributes:
        messages: ``{"role", "content"}`` dicts: a system message, then user and assistant in turn. The last
            one is the user's question.
        fact_message: Index in ``messages`` of the only message that states the answer.
        answer: The exact reply that is expected.
        asked: For every earlier question: the index of its reply, and the index of the message that states the
            fact. Training computes its loss on the replies.
    """

    messages: list[Message]
    fact_message: int
    answer: str
    asked: list[tuple[int, int]]

    def with_answer(self) -> list[Message]:
        """The messages, followed by the expected answer as the assistant's message."""
        return [*self.messages, {"role": "assistant", "content": self.answer}]

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "DemoConversation":
        """Read a file that :meth:`save` wrote; unknown fields are ignored."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})
