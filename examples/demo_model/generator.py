"""Seeded conversations in which one message holds the answer to the last question.

A conversation is small talk, mixed with facts ("Marta's boat is called Quiet Copper Lantern.") about many
people and things. Facts share people, things and words, and some messages name the same person and thing
without the value. So only the right message answers the question.

**Held-out facts.** A fact is a triple (person, thing, value). A checksum of the triple reserves a tenth of all
triples. Training conversations state only the other nine tenths, and held-out conversations only that tenth.
So no fact of a held-out conversation was ever stated in training, although each of its words was.
"""

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import phrases

from attnpatch.demo.conversation import DemoConversation, Message

HELD_OUT_SHARE = 10
# The demo tokenizer gives each of these one token, so lengths are known without loading it.
_PIECES = re.compile(r"'s|\w+|[^\w\s]")
_TOKENS_AROUND_MESSAGE = 2


@dataclass(frozen=True)
class Fact:
    """A statement that can be asked about: the name or number of a person's thing."""

    person: str
    thing: str
    value: str

    @property
    def key(self) -> str:
        """The words that statement and question share, such as ``Marta's boat``."""
        return f"{self.person}'s {self.thing}"

    @property
    def held_out(self) -> bool:
        """True if the triple is reserved for evaluation."""
        return zlib.crc32(f"{self.key}={self.value}".encode()) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Mix:
    """How often each kind of exchange comes up (the rest is small talk).

    Attributes:
        facts: Share of exchanges that state a fact.
        questions: Share that ask about an earlier fact and answer it.
        mentions: Share that name the key of some fact without its value.
        chatty: Chance that a fact comes with a sentence of small talk around it.
    """

    facts: float
    questions: float
    mentions: float
    chatty: float


# Training conversations ask about nearly every fact, for dense supervision. Conversations that are shown ask rarely.
DENSE = Mix(facts=0.42, questions=0.42, mentions=0.04, chatty=0.1)
NATURAL = Mix(facts=0.3, questions=0.05, mentions=0.05, chatty=0.4)


def count_tokens(text: str) -> int:
    """Tokens of a message made of the words in :mod:`phrases`, chat markers included."""
    return len(_PIECES.findall(text)) + _TOKENS_AROUND_MESSAGE


def all_phrases() -> Iterator[str]:
    """All texts of the generator, from which a vocabulary is built."""
    for name, value in vars(phrases).items():
        if name.isupper() and name != "SMALL_TALK":
            yield from value
    for said, replies in phrases.SMALL_TALK:
        yield from said
        yield from replies
    yield from (str(number) for number in range(10, 100))
    yield "'s"


class _Writer:
    """The state of a conversation while it is written."""

    def __init__(self, rng: random.Random, mix: Mix, held_out: bool):
        self.rng = rng
        self.mix = mix
        self.held_out = held_out
        self.messages: list[Message] = [{"role": "system", "content": rng.choice(phrases.SYSTEM)}]
        self.tokens = count_tokens(self.messages[0]["content"])
        self.facts: dict[Fact, int] = {}
        self.keys: set[str] = set()
        self.open: list[Fact] = []
        self.asked: list[tuple[int, int]] = []
        self.people: Sequence[str] = phrases.PEOPLE
        self.things: Sequence[str] = phrases.NAMED_THINGS + phrases.NUMBERED_THINGS
        self.listening = 0.0

    def add(self, role: str, content: str) -> int:
        """Append a message and return its index."""
        self.messages.append({"role": role, "content": content})
        self.tokens += count_tokens(content)
        return len(self.messages) - 1

    def fill(self, template: str, **words: str) -> str:
        """Fill every placeholder of a template; those that are not given are filled at random."""
        choose = self.rng.choice
        return template.format(
            person=choose(phrases.PEOPLE),
            city=choose(phrases.CITIES),
            food=choose(phrases.FOODS),
            food_two=choose(phrases.FOODS),
            day=choose(phrases.DAYS),
            thing=choose(phrases.THINGS),
            hour=choose(phrases.HOURS),
            **words,
        )

    def new_fact(self, person: str | None = None, thing: str | None = None) -> Fact:
        """A fact of the right side of the split (held out or not), with a key that this conversation has not used."""
        choose = self.rng.choice
        while True:
            who, what = person or choose(self.people), thing or choose(self.things)
            if what in phrases.NAMED_THINGS:
                words = [choose(phrases.MOODS), choose(phrases.MATERIALS), choose(phrases.NOUNS)]
            else:
                words = [str(number) for number in self.rng.sample(range(10, 100), 3)]
            fact = Fact(who, what, " ".join(words))
            if fact.held_out == self.held_out and fact.key not in self.keys:
                self.keys.add(fact.key)
                return fact

    def crowd(self, num_facts: int) -> None:
        """Limit people, things or both, so that many facts share them, with room for ``num_facts`` facts.

        Without limits, a person or thing rarely occurs twice in a short conversation, so either would be enough to
        find the fact.
        """
        people, things = len(self.people), len(self.things)
        both = math.isqrt(2 * num_facts) + 1
        few_people, few_things = -(-2 * num_facts // things), -(-2 * num_facts // people)
        people, things = self.rng.choice(
            ((people, few_things), (few_people, things), (both, both), (people, things))
        )
        self.people = self.rng.sample(self.people, min(people, len(self.people)))
        self.things = self.rng.sample(self.things, min(things, len(self.things)))

    def small_talk(self) -> None:
        """A remark and a reply that fits it."""
        said, replies = self.rng.choice(phrases.SMALL_TALK)
        self.add("user", self.fill(self.rng.choice(said)))
        self.add("assistant", self.rng.choice(replies))

    def mention(self, key: str | None = None) -> None:
        """Name a key, one in use or a new one, without its value."""
        if key is None:
            key = self.rng.choice(list(self.facts)).key if self.facts else self.new_fact().key
        self.add("user", self.fill(self.rng.choice(phrases.MENTION), key=key))
        self.add("assistant", self.rng.choice(phrases.MENTION_REPLY))

    def state(self, fact: Fact) -> None:
        """State a fact, by the user or, one time in four, by the assistant."""
        named = fact.thing in phrases.NAMED_THINGS
        templates = phrases.STATE_NAME if named else phrases.STATE_NUMBER
        text = self.rng.choice(templates).format(key=fact.key, value=fact.value)
        if self.rng.random() < self.mix.chatty:
            remark = self.fill(self.rng.choice(self.rng.choice(phrases.SMALL_TALK)[0]))
            text = f"{remark} {text}" if self.rng.random() < 0.5 else f"{text} {remark}"
        if self.rng.random() < 0.25:
            self.add("user", self.fill(self.rng.choice(phrases.FACT_PROMPT)))
            index = self.add("assistant", text)
        else:
            index = self.add("user", text)
            self.add("assistant", self.rng.choice(phrases.FACT_REPLY))
        self.facts[fact] = index
        self.open.append(fact)

    def ask(self, fact: Fact) -> None:
        """Ask about a fact. No fact is asked about twice, because the first reply would hold the answer too."""
        named = fact.thing in phrases.NAMED_THINGS
        templates = phrases.ASK_NAME if named else phrases.ASK_NUMBER
        self.add("user", self.rng.choice(templates).format(key=fact.key))
        self.open.remove(fact)

    def ask_and_answer(self) -> None:
        """Ask about a random fact that has not been asked about, and answer it."""
        fact = self.rng.choice(self.open)
        self.ask(fact)
        self.asked.append((self.add("assistant", fact.value), self.facts[fact]))

    def exchange(self) -> None:
        """Write one exchange of a random kind."""
        draw, mix = self.rng.random(), self.mix
        if draw < mix.facts:
            self.state(self.new_fact())
        elif draw < mix.facts + mix.questions:
            if self.tokens < self.listening and self.rng.random() < 0.5:
                self.small_talk()
            elif self.tokens < self.listening or not self.open:
                self.state(self.new_fact())
            else:
                self.ask_and_answer()
        elif draw < mix.facts + mix.questions + mix.mentions:
            self.mention()
        else:
            self.small_talk()

    def finish(self, fact: Fact) -> DemoConversation:
        """End with the question about ``fact``."""
        self.ask(fact)
        return DemoConversation(self.messages, self.facts[fact], fact.value, self.asked)


def training_conversation(
    seed: int, max_tokens: int, mix: Mix = DENSE, listen: float = 0.0
) -> DemoConversation:
    """A conversation with many questions; none of its facts is held out.

    Args:
        seed: Same seed, same conversation.
        max_tokens: Target length in tokens, with the final answer; reached within one exchange.
        mix: How often each kind of exchange comes up.
        listen: The first part of the conversation, up to this share, has no questions. Otherwise facts are asked about
            soon after they are stated.
    """
    writer = _Writer(random.Random(f"training {seed}"), mix, held_out=False)
    writer.crowd(num_facts=max_tokens // 40)
    if listen:
        writer.listening = writer.rng.uniform(0, listen) * max_tokens
    writer.state(writer.new_fact())
    while writer.tokens < max_tokens - 40:
        writer.exchange()
    if not writer.open:
        writer.state(writer.new_fact())
    return writer.finish(writer.rng.choice(writer.open))


def held_out_conversation(seed: int, num_tokens: int) -> DemoConversation:
    """A long chat with the question at its end; its facts were not in the training.

    The fact is anywhere before the last tenth. The conversation also has near misses: other things of the same person,
    the same thing of other people, and remarks that name the asked key without its value.

    Args:
        seed: Same seed, same conversation.
        num_tokens: Length in tokens with the answer, at least 400; it may be exceeded by one exchange.
    """
    if num_tokens < 400:
        raise ValueError(f"num_tokens={num_tokens}: the near misses need at least 400 tokens")
    rng = random.Random(f"held out {seed}")
    writer = _Writer(rng, NATURAL, held_out=True)
    fact = writer.new_fact()
    same_kind = phrases.NAMED_THINGS if fact.thing in phrases.NAMED_THINGS else phrases.NUMBERED_THINGS
    others = [name for name in phrases.PEOPLE if name != fact.person]
    things = [name for name in same_kind if name != fact.thing]
    near_misses = [
        *(writer.new_fact(person, fact.thing) for person in rng.sample(others, 3)),
        *(writer.new_fact(fact.person, thing) for thing in rng.sample(things, 2)),
    ]
    planned = [
        *(partial(writer.state, near_miss) for near_miss in near_misses),
        *[partial(writer.mention, fact.key)] * 2,
    ]
    room = num_tokens - 60
    schedule = sorted((rng.uniform(0.02, 0.98) * room, order) for order in range(len(planned)))
    fact_at = rng.uniform(0.02, 0.9) * room
    while writer.tokens < room or schedule or fact not in writer.facts:
        if fact not in writer.facts and writer.tokens >= fact_at:
            writer.state(fact)
            # It must not be asked about before the end.
            writer.open.remove(fact)
        elif schedule and writer.tokens >= schedule[0][0]:
            planned[schedule.pop(0)[1]]()
        else:
            writer.exchange()
    writer.open.append(fact)
    return writer.finish(fact)
