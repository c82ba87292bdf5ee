"""The words and sentences of the demo's conversations; ``generator.py`` combines them.

Every word here becomes one token of the demo tokenizer. ``{person}``, ``{city}``, ``{food}``, ``{day}``,
``{thing}`` and ``{hour}`` are filled at random. ``{key}`` is the subject of a fact ("Marta's boat"), and ``{value}`` is
its name or number.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    """
    Marta Jonas Aisha Pavel Ingrid Tomas Leila Oscar Yuki Bruno Clara Dmitri Esther Felix Greta
    Hassan Irene Jakob Keiko Lukas Maya Nadia Olaf Priya Quentin Rosa Samir Tilda Umar Vera Walter
    Ximena Yusuf Zora Anton Bianca Cyril Daphne Emil Flora Gustav Helga Ivan Judith Karim Lena Milan
    Noor Otto Petra Rafael Selma Theo Ursula Viktor Wanda Xavier Yara Zeno Agnes
    """
)

NAMED_THINGS = _words("boat band cafe horse novel song team garden bakery kite puzzle painting quilt sauce")
NUMBERED_THINGS = _words("phone locker ticket parcel badge bicycle voucher safe bus cabin")

MOODS = _words(
    """
    Quiet Brave Lazy Gentle Hidden Lucky Humble Restless Clever Wandering Patient Sleepy Curious
    Noble Stubborn Cheerful Forgotten Shy Golden Distant Frozen Burning Broken Singing Secret Proud
    Crooked Endless Hungry Merry
    """
)
MATERIALS = _words(
    """
    Copper Silver Paper Velvet Amber Marble Cotton Crystal Wooden Iron Silk Ivory Pewter Granite
    Linen Bronze Leather Glass Cedar Coral Willow Satin Cobalt Scarlet Emerald Indigo Maple Pearl
    Bamboo Clay
    """
)
NOUNS = _words(
    """
    Lantern River Falcon Anchor Meadow Comet Teapot Harbor Sparrow Compass Mountain Violin Orchard
    Tiger Thimble Window Badger Ladder Whistle Island Saddle Turnip Feather Pigeon Engine Mirror
    Kettle Walrus Castle Pocket Button Canyon Dragon Basket Hammer Candle Rabbit Bridge Cactus
    Trumpet
    """
)

CITIES = _words(
    """
    Lisbon Bergen Krakow Dublin Genoa Utrecht Oslo Seville Vienna Riga Porto Ghent Turin Malmo Lyon
    Basel Tallinn Split Cork Leeds
    """
)
FOODS = _words(
    """
    soup pancakes lentils noodles dumplings pizza curry salad bread risotto waffles stew omelette
    porridge falafel tacos pie cheese
    """
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
THINGS = _words(
    """
    umbrella scarf keys notebook jacket camera lamp chair radio clock mug backpack blanket
    headphones glasses calendar vase mirror
    """
)
HOURS = _words("six seven eight nine ten eleven noon")

SYSTEM = (
    "You remember what is said in this chat and answer in a few words.",
    "You are a friendly assistant with a good memory.",
    "Chat with the user. When asked for a name or a number, give only that.",
    "You are a helpful companion who keeps track of small details.",
)

STATE_NAME = (
    "{key} is called {value}.",
    "By the way, {key} is called {value}.",
    "The name of {key} is {value}.",
    "I just learned that {key} is called {value}.",
    "It turns out that {key} has the name {value}.",
    "Before I forget, the name of {key} is {value}.",
    "Funny thing, {key} is now called {value}.",
    "We finally agreed that {key} should be called {value}.",
)
STATE_NUMBER = (
    "{key} has the number {value}.",
    "By the way, {key} has the number {value}.",
    "The number of {key} is {value}.",
    "Please note that {key} has the number {value}.",
    "I wrote down that the number of {key} is {value}.",
    "Before I forget, the number of {key} is {value}.",
    "They told me that {key} has the number {value}.",
    "In case it matters, the number of {key} is {value}.",
)
ASK_NAME = (
    "What is {key} called?",
    "What is the name of {key}?",
    "Do you remember what {key} is called?",
    "Remind me, what is the name of {key}?",
)
ASK_NUMBER = (
    "What is the number of {key}?",
    "Which number does {key} have?",
    "Do you remember the number of {key}?",
    "Remind me, what is the number of {key}?",
)
# Each names the key and gives no value, so that finding the key alone is not enough.
MENTION = (
    "Somebody asked me about {key} again today.",
    "I still have not seen {key} with my own eyes.",
    "{key} came up twice at lunch.",
    "There was a long story about {key} at the party.",
    "I had a dream about {key} last night, of all things.",
    "{person} took a photo of {key} and showed it to everyone.",
)
MENTION_REPLY = (
    "That seems to be on many minds.",
    "I would like to hear more about it one day.",
    "It does come up a lot.",
    "Stories like that travel fast.",
)
FACT_REPLY = (
    "Noted.",
    "Thanks, I will remember that.",
    "Good to know.",
    "Got it.",
    "That is easy to remember.",
    "I have made a note of it.",
    "Lovely, thank you for telling me.",
    "All right, I will keep that in mind.",
)
FACT_PROMPT = (
    "Anything new on your list?",
    "Did {person} leave a message for me?",
    "What else did {person} write?",
    "Is there something I should know before {day}?",
    "Read me the next note, please.",
    "What was the last thing on the card from {person}?",
)

# One row per subject: what the user may say, and replies that fit any of them.
SMALL_TALK = (
    (
        (
            "It has been raining in {city} since {day} and my {thing} is still wet.",
            "The fog over {city} was so thick that I could not see the tram.",
            "They promise sunshine for {day}, but I do not believe a word of it.",
            "The wind took my {thing} this morning and carried it over the fence.",
            "It snowed a little in {city}, just enough to make everyone late.",
        ),
        (
            "Weather like that calls for a warm drink and a good window seat.",
            "I hope it clears up before the weekend.",
            "At least the trees are happy about it.",
        ),
    ),
    (
        (
            "I tried to make {food} from scratch and used every pan in the house.",
            "{person} likes {food} better on the second day, cold and from the pot.",
            "The little place near the station in {city} serves the best {food} I know.",
            "We ran out of salt in the middle of cooking {food}, so we ate {food_two} instead.",
            "My neighbor left a bowl of {food} at my door without a note.",
        ),
        (
            "That sounds delicious, even the messy part.",
            "Food always tastes better with a story.",
            "A pinch of pepper would not hurt either.",
        ),
    ),
    (
        (
            "My train to {city} stood in a field for an hour, next to some very calm cows.",
            "I booked a night in {city} for {day}, in a room above a bookshop.",
            "{person} walked all the way around {city} in old shoes and regrets it.",
            "The ferry leaves at {hour}, so I have to be up long before breakfast.",
            "I left my {thing} on the bus to {city} and a stranger brought it back.",
        ),
        (
            "Trips like that are the ones you remember.",
            "I hope the way back is a little easier.",
            "Do take a photo of the harbor if you pass it.",
        ),
    ),
    (
        (
            "I am reading a thick novel about a lighthouse and nothing has happened so far.",
            "The library wants its books back by {day}, and I have finished one of five.",
            "{person} reads the last page first, which I find hard to forgive.",
            "I found an old letter inside a cookbook from {city}.",
        ),
        (
            "Slow books have their own kind of charm.",
            "I would keep going for one more chapter.",
            "Old paper has the nicest smell.",
        ),
    ),
    (
        (
            "The meeting on {day} lasted until {hour} and decided nothing at all.",
            "Our printer only works when {person} stands next to it.",
            "I have to give a short talk in {city} and my slides are still empty.",
            "Somebody at work keeps moving my {thing} to the other desk.",
            "The new coffee machine makes a noise like a small airplane.",
        ),
        (
            "Work has a way of filling the whole week.",
            "Maybe a short walk would help before the next round.",
            "I am sure it will look better tomorrow.",
        ),
    ),
    (
        (
            "{person} plays the trumpet every evening at {hour}, mostly the same three notes.",
            "I have had a tune in my head since {day} and cannot place it.",
            "The choir in {city} is looking for low voices, so I may try.",
            "We danced in the kitchen until the neighbors joined us.",
        ),
        (
            "Music does make the evening shorter.",
            "I would love to hear how that goes on.",
            "Three notes can be enough if you mean them.",
        ),
    ),
    (
        (
            "The cat knocked my {thing} off the shelf and looked at me while doing it.",
            "A hedgehog has moved in under the steps and sleeps all day.",
            "{person} is teaching a parrot to say good morning in Polish.",
            "I saw two swans crossing the street in {city} at {hour}.",
        ),
        (
            "Animals do know how to hold our attention.",
            "They clearly run the house.",
            "Please give it my regards.",
        ),
    ),
    (
        (
            "My tomatoes are finally red, all four of them.",
            "{person} gave me a plant that needs water every day, and I was away.",
            "I dug up half a {thing} while planting onions.",
            "The bees are busy on the balcony since {day}.",
        ),
        (
            "Patience is most of the work with plants.",
            "A little shade and a little luck should do it.",
            "That is a harvest to be proud of.",
        ),
    ),
    (
        (
            "I ran around the lake before breakfast and my legs are still complaining.",
            "{person} won a chess game against the whole club in {city}.",
            "We lost at football again, but the {food} afterwards made up for it.",
            "I fell off a skateboard in front of a school class on {day}.",
            "Swimming at {hour} is easier when the water is warm.",
        ),
        (
            "Resting counts as training too.",
            "The next one will go better, I am sure.",
            "It is the company that matters, after all.",
        ),
    ),
    (
        (
            "I slept badly because the moon was so bright.",
            "My {thing} broke and I fixed it with tape, which I count as a success.",
            "I cleaned the attic and found a {thing} that belongs to {person}.",
            "The lift is out of order until {day}, and I live on the sixth floor.",
            "Someone painted the hallway green while we were in {city}.",
        ),
        (
            "A home always has one more surprise.",
            "Small repairs are the most satisfying ones.",
            "I hope it stays quiet for a while now.",
        ),
    ),
    (
        (
            "We watched a film about a clock maker and everybody cried except {person}.",
            "The museum in {city} has a whole room full of spoons.",
            "I bought an old {thing} at the market and have no idea how to use it.",
            "{person} knitted me a {thing}, and it fits nobody.",
            "I promised to bring {food} to the picnic on {day}.",
        ),
        (
            "There is beauty in odd things.",
            "That sounds like an afternoon well spent.",
            "I would have liked to see that.",
        ),
    ),
    (
        (
            "{person} turns forty on {day} and does not want a party, so there will be one.",
            "My cousin from {city} is staying with us and sings in the shower.",
            "Grandmother called at {hour} to tell me about her new {thing}.",
            "The twins next door have learned to whistle, both at once.",
            "I wrote a postcard to {person} and forgot the stamp.",
        ),
        (
            "Family and friends keep life interesting.",
            "Please send them my best wishes.",
            "That will be a story for years.",
        ),
    ),
)
