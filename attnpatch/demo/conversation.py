"""A conversation in which one message holds the answer to the last question; what made it: ``examples/demo_model``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

Message = dict[str, str]


@dataclass(frozen=True)
class DemoConversation:
    """Messages that end with a question, and where its answer was stated.

    Attributes:
        messages: ``{"role", "content"}`` dicts: a system message, then user and assistant in turn. The last
            one is the user's question.
        fact_message: Index in ``messages`` of the one message that states the fact asked for.
        answer: The exact reply expected.
        asked: For every question before the last: the index of its reply and of the message that states the
            fact. Training puts its loss on the replies.
    """

    messages: list[Message]
    fact_message: int
    answer: str
    asked: list[tuple[int, int]]

    def with_answer(self) -> list[Message]:
        """The messages with the expected answer appended as the assistant's."""
        return [*self.messages, {"role": "assistant", "content": self.answer}]

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "DemoConversation":
        """Read what :meth:`save` wrote; fields it does not know are ignored."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})
