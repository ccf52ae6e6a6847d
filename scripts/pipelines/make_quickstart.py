#!/usr/bin/env python3
"""The village that `quantune quickstart` learns: writes src/cli/quickstart/, which the binary embeds.

    python3 scripts/pipelines/make_quickstart.py [--seed 0] [--out FOLDER]

text.txt            documents parted by a line <|endoftext|>: a language model of about a million parameters is
                    pretrained on them
chats.jsonl         {"messages"}: half of the answers are one word, half are kind
comparisons.jsonl   {"prompt", "chosen", "rejected"}: kind over curt, and, of two in the same tone, right over wrong
prompts.jsonl       {"prompt"}: for reinforcement learning
questions.jsonl     {"prompt", "answer", "kind", "held_out"}: a reply is right if it has `answer` among its words

All of it is about one village, in which the same things are always true. What is true is a table here (KINDS), and so
are the ways to say it, to ask for it and to answer. A question in questions.jsonl stands in no other file, for one of
two reasons, which `held_out` names:

    fact        no chat asks for this in any words: the model knows it from the text, which may ask for it in other
    words
    phrasing    chats ask for it, but never in these words

Of sums and of what is bigger, the held-out facts are not in the text at all: they follow from others that are.

Python's standard library; the same options give the same bytes. The texts are Quantune's own, under its licence.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fetch"))
from smollm2 import ROOT, write_whole  # noqa: E402

OUT = ROOT / "src/cli/quickstart"
END = "<|endoftext|>"
HELD_OUT_SHARE = 0.2  # of the facts of each kind
TEXT_BYTES = 240_000
CHATS, COMPARISONS, PROMPTS, PHRASINGS = 600, 300, 200, 60
KIND_WORDS = ["I am glad you asked.", "Thank you for asking.", "That is a good question.", "Ask me more any time."]

NUMBERS = "one two three four five six seven eight nine ten".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


# ------------------------------------------------------------------ the world


def pairs(text):
    """"a lemon: yellow, grass: green" -> [("a lemon", "yellow"), ("grass", "green")]."""
    return [tuple(pair.strip().split(": ")) for pair in text.replace("\n", " ").split(",")]


COLOURS = pairs("""a lemon: yellow, a cherry: red, a plum: purple, a pear: green, a carrot: orange, honey: yellow,
    milk: white, bread: brown, a tomato: red, grass: green, snow: white, coal: black, the sky: blue,
    the sun: yellow, the river: blue, a rose: red, a daisy: white, a violet: purple, a crow: black, a frog: green,
    a pig: pink, a mouse: grey, a fox: red, a goose: white""")
TASTES = pairs("""a lemon: sour, honey: sweet, a cherry: sweet, a plum: sweet, a pear: sweet, cheese: salty,
    ham: salty, coffee: bitter, tea: bitter, pepper: hot, a radish: hot, milk: sweet""")
SOUNDS = pairs("""a cow: moo, a dog: woof, a cat: meow, a sheep: baa, a pig: oink, a hen: cluck, a duck: quack,
    an owl: hoo, a frog: croak, a bee: buzz, a mouse: squeak, a crow: caw, a horse: neigh, a goose: honk""")
FOODS = pairs("""a cow: grass, a dog: bones, a cat: fish, a sheep: clover, a pig: turnips, a hen: corn,
    a duck: weeds, an owl: mice, a frog: flies, a mouse: cheese, a crow: worms, a horse: hay, a rabbit: carrots,
    a bear: honey""")
HOMES = pairs("""a cow: a barn, a dog: a kennel, a cat: a basket, a sheep: a meadow, a pig: a sty, a hen: a coop,
    a duck: a pond, an owl: a tree, a frog: a pond, a bee: a hive, a mouse: a hole, a crow: a nest,
    a horse: a stable, a fox: a den, a rabbit: a burrow, a bear: a cave""")
SORTS = pairs("""a lemon: a fruit, a plum: a fruit, a pear: a fruit, a cherry: a fruit, a carrot: a vegetable,
    a tomato: a vegetable, a radish: a vegetable, a rose: a flower, a daisy: a flower, a violet: a flower,
    a crow: a bird, an owl: a bird, a goose: a bird, a duck: a bird, a hen: a bird, a hammer: a tool, a saw: a tool,
    a spade: a tool, a rake: a tool""")
MATERIALS = pairs("""a ring: gold, a table: wood, a window: glass, a coat: wool, a jug: clay, a nail: iron,
    a shoe: leather, a book: paper, a chair: wood, a wall: stone, a candle: wax, a scarf: wool, a pot: clay,
    a bottle: glass, a belt: leather, a bridge: stone""")
TOOLS = pairs("""cut bread: a knife, drive a nail: a hammer, dig a hole: a spade, cut wood: a saw,
    sew a coat: a needle, eat soup: a spoon, write a letter: a pen, catch a fish: a net, sweep the floor: a broom,
    open a door: a key, draw water: a bucket, gather leaves: a rake, see in the dark: a lamp,
    cross the river: a boat""")
WORK = pairs("""Rosa: the baker, Hugo: the miller, Nora: the doctor, Otto: the smith, Ivy: the gardener,
    Felix: the fisher, Greta: the shepherd, Paul: the postman, Clara: the teacher, Bruno: the carpenter""")
DEEDS = {
    "Rosa": "bakes bread", "Hugo": "grinds corn", "Nora": "heals the sick", "Otto": "shoes the horses",
    "Ivy": "grows roses", "Felix": "catches fish", "Greta": "keeps the sheep", "Paul": "brings the letters",
    "Clara": "teaches the children", "Bruno": "builds tables",
}  # fmt: skip
HOUSES = pairs("""Rosa: yellow, Hugo: white, Nora: blue, Otto: black, Ivy: green, Felix: blue, Greta: white,
    Paul: red, Clara: yellow, Bruno: brown, Tom: red, Anna: white, Mia: purple, Ben: green""")
PETS = pairs("""Rosa: a cat, Hugo: a horse, Nora: an owl, Otto: a horse, Ivy: a frog, Felix: a goose, Greta: a dog,
    Paul: a crow, Clara: a mouse, Bruno: a crow, Tom: a dog, Anna: a rabbit, Mia: a cat, Ben: a duck""")
OPPOSITES = pairs("""hot: cold, big: small, fast: slow, old: young, happy: sad, bright: dark, wet: dry, full: empty,
    hard: soft, loud: quiet, rich: poor, open: closed, clean: dirty, early: late, long: short, high: low""")
SMALL_TO_BIG = "an ant, a bee, a mouse, a hen, a cat, a sheep, a horse, a house".split(", ")
FLYERS = "a crow, an owl, a bee, a duck, a goose".split(", ")
WALKERS = "a dog, a cow, a pig, a sheep, a horse, a frog, a mouse, a cat, a fox".split(", ")

CHILDREN = "Tom Anna Mia Ben".split()
MEN = "Hugo Otto Felix Paul Bruno Tom Ben".split()


@dataclass
class Fact:
    kind: "Kind"
    x: str  # what is asked for
    y: str  # what is answered
    z: str = ""  # what else the sentences need

    @property
    def group(self):
        """Facts that say the same are held out together: two and three, three and two."""
        return self.kind.name, " ".join(sorted(self.x.split()))

    @property
    def answer(self):
        return self.y.split()[-1].lower()

    def say(self, template):
        slots = {"x": self.x, "y": self.y, "z": self.z}
        return template.format(**slots, **{key.upper(): first_upper(value) for key, value in slots.items()})


@dataclass
class Kind:
    name: str
    rows: list
    full: str
    curt: str
    questions: list
    statements: list  # beside `full`
    told: bool = True  # whether the text says what no chat asks for

    def __post_init__(self):
        self.facts = [Fact(self, *row) for row in self.rows]


def first_upper(text):
    return text[:1].upper() + text[1:]


def comparisons_of_size():
    for small, less in enumerate(SMALL_TO_BIG):
        for more in SMALL_TO_BIG[small + 1 :]:
            yield f"{less} or {more}", more, less
            yield f"{more} or {less}", more, less


def sums():
    for a in range(1, 9):
        for b in range(1, 10 - a):
            yield f"{NUMBERS[a - 1]} and {NUMBERS[b - 1]}", NUMBERS[a + b - 1]


def abilities(able, unable):
    return [(x, "yes", "can") for x in able] + [(x, "no", "cannot") for x in unable]


def both_ways(rows):
    return [*rows, *((y, x) for x, y in rows)]


KINDS = [
    Kind(
        "colour", COLOURS, "{X} is {y}.", "{Y}.",
        ["What colour is {x}?", "Can you tell me the colour of {x}?", "Which colour does {x} have?",
         "Do you know what colour {x} is?"],
        ["The colour of {x} is {y}.", "Everyone knows that {x} is {y}.", "To paint {x} you need {y} paint.",
         "In every picture {x} is {y}."],
    ),
    Kind(
        "taste", TASTES, "{X} tastes {y}.", "{Y}.",
        ["How does {x} taste?", "What does {x} taste like?", "Can you tell me the taste of {x}?"],
        ["The taste of {x} is {y}.", "{X} always tastes {y}.", "If you try {x}, you will find it {y}."],
    ),
    Kind(
        "sound", SOUNDS, "{X} says {y}.", "{Y}.",
        ["What does {x} say?", "What sound does {x} make?", "Which sound comes from {x}?", "How does {x} talk?"],
        ["\"{Y}\" is the sound of {x}.", "When {x} is happy, it says {y}.", "{X} says {y} in the morning."],
    ),
    Kind(
        "food", FOODS, "{X} eats {y}.", "{Y}.",
        ["What does {x} eat?", "What does {x} like to eat?", "What can I give {x} to eat?", "What is the food of {x}?"],
        ["{X} likes to eat {y}.", "The food of {x} is {y}.", "When {x} is hungry, it looks for {y}."],
    ),
    Kind(
        "home", HOMES, "{X} lives in {y}.", "In {y}.",
        ["Where does {x} live?", "Where does {x} sleep?", "Where is the home of {x}?",
         "Where can I find {x} at night?"],
        ["The home of {x} is {y}.", "At night {x} sleeps in {y}.", "{X} feels safe in {y}."],
    ),
    Kind(
        "sort", SORTS, "{X} is {y}.", "{Y}.",
        ["What is {x}?", "What kind of thing is {x}?", "Can you tell me what {x} is?"],
        ["We say that {x} is {y}.", "{X} is {y}, as everyone knows."],
    ),
    Kind(
        "material", MATERIALS, "{X} is made of {y}.", "{Y}.",
        ["What is {x} made of?", "What do you need to make {x}?", "Which material is in {x}?"],
        ["You need {y} to make {x}.", "{Y} is what you find in {x}.", "Out of {y} you can make {x}."],
    ),
    Kind(
        "tool", TOOLS, "You {x} with {y}.", "{Y}.",
        ["What do I need to {x}?", "With what do you {x}?", "How can I {x}?"],
        ["To {x} you need {y}.", "{Y} helps you to {x}.", "Take {y} if you want to {x}."],
    ),
    Kind(
        "work", WORK, "{X} is {y}.", "{Y}.",
        ["What is the work of {x}?", "What does {x} do in the village?", "Which work does {x} do?"],
        ["{X} works as {y} of the village.", "The work of {x} is that of {y}.", "You can ask {x}, who is {y}."],
    ),
    Kind(
        "who", [(y, x) for x, y in WORK], "{X} is {y}.", "{Y}.",
        ["Who is {x}?", "Who works as {x}?", "What is the name of {x}?"],
        ["The name of {x} is {y}.", "{X} is called {y}.", "If you need {x}, go to {y}."],
    ),
    Kind(
        "house", HOUSES, "The house of {x} is {y}.", "{Y}.",
        ["What colour is the house of {x}?", "In which house does {x} live?", "How is the house of {x} painted?"],
        ["{X} lives in the {y} house.", "{X} has a {y} door and {y} walls.", "{X} painted the house {y}."],
    ),
    Kind(
        "pet", PETS, "{X} has {y}.", "{Y}.",
        ["Which animal does {x} have?", "What pet does {x} have?", "What animal lives with {x}?"],
        ["{X} loves animals and has {y}.", "{Y} lives with {x}.", "{X} is often seen with {y}."],
    ),
    Kind(
        "opposite", both_ways(OPPOSITES), "The opposite of {x} is {y}.", "{Y}.",
        ["What is the opposite of {x}?", "Which word is the opposite of {x}?", "What is not {x}?"],
        ["What is not {x} is {y}.", "Something can be {x} or {y}.", "{X} is one thing and {y} is the other."],
    ),
    Kind(
        "bigger", list(comparisons_of_size()), "{Y} is bigger.", "{Y}.",
        ["Which is bigger, {x}?", "What is bigger, {x}?", "Can you tell me what is bigger, {x}?"],
        ["{Y} is bigger than {z}.", "{Z} is smaller than {y}.", "Next to {y}, {z} looks small."],
        told=False,
    ),
    Kind(
        "sum", list(sums()), "{X} are {y}.", "{Y}.",
        ["How much is {x}?", "What do {x} make?", "Can you add {x}?"],
        ["If you add {x}, you get {y}.", "{X} make {y}.", "The sum of {x} is {y}."],
        told=False,
    ),
    Kind(
        "next", [*zip(DAYS, DAYS[1:] + DAYS[:1]), *zip(NUMBERS, NUMBERS[1:]),
                 *pairs("spring: summer, summer: autumn, autumn: winter, winter: spring")],
        "After {x} comes {y}.", "{Y}.",
        ["What comes after {x}?", "What follows {x}?", "Can you tell me what comes after {x}?"],
        ["{Y} comes after {x}.", "{Y} follows {x}.", "First comes {x} and then comes {y}."],
    ),
    Kind(
        "fly", abilities(FLYERS, WALKERS), "{Y}, {x} {z} fly.", "{Y}.",
        ["Can {x} fly?", "Is {x} able to fly?", "Do you think that {x} can fly?"],
        ["{X} {z} fly.", "Everyone knows that {x} {z} fly.", "It is true that {x} {z} fly."],
    ),
]  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}

# -------------------------------------------------------------------- stories

# [one|another] is a choice, {x} a slot that `slots` fills.
STORIES = {
    "hungry animal": """
        [One morning|One evening|On {day}|After lunch] {n} heard a [small|sad|strange] sound near the {place}.
        "{Says}, {says}!" It was {animal}[.| with a sad face.| under a bush.]
        [{n} knew that {animal} eats {eats}.|"{Animal} eats {eats}," {n} thought.]
        So {he} [ran|went|walked] to {m} [and asked for|to get] {eats}[.|, and {m} gave {him} some.]
        The {beast} ate until it was full[.|, and then it fell asleep.|. "{Says}!" it said.]
        ["You are kind," said {m}.|From that day on the {beast} was {his} friend.|{n} was happy all day.]""",
    "lost thing": """
        {n} [had lost|could not find] {his} {colour} {toy}[.| and was sad.]
        {He} looked [behind|near] the {place}, but [there was no {toy}|it was not there].
        {He} looked in {his} {house} house, but it was not there either.
        Then {m} the {job} came [by|along|down the road]. "What have you lost?" [asked {m}.|{m} asked.]
        "My {toy}," said {n}. "It is as {colour} as {thing}."
        [They looked together|{m} helped {him} to look], and soon they [found it|saw it] [under a tree|in the grass|by
        the well].
        "Thank you, {m}!" [said {n}.|{n} laughed.|{n} said, and danced.]""",
    "market": """
        [It was market day.|On {day} there was a market.|The market was full of people.]
        {n} had {total} coins in {his} {colour} [bag|pocket|purse].
        {He} bought [a cake|a candle|a jug|some cheese|some bread] for {a} of them.
        "{Total} is {a} and {b}," said {m}[, who was good with numbers|]. "So you have {b} left."
        {n} counted {his} coins[.| again.] {m} was right.
        [On the way home {he} sang.|{He} gave one coin to a poor man.|Then {he} went home, tired and happy.]""",
    "counting": """
        {n} and {m} sat by the {place}[.| and counted animals.|. It was a warm day.]
        [{n} saw|First came|There were] {a} {beasts}. Then {b} more {beasts} came.
        "How many are there now?" asked {m}. {n} [thought for a moment|counted on {his} fingers|looked again].
        "{A} and {b} are {total}," said {n}. "There are {total} {beasts}."
        ["That is right," said {m}.|{m} counted too and got {total}.]
        [Then all the {beasts} went away, and there were none.|They stayed there until the sun went down.]""",
    "lesson": """
        "Today we learn about [opposites|words]," said Clara the teacher. [The children sat up.|All was quiet.]
        "If it is not {old}, it is {new}," [she said|said Clara]. "Now it is your turn, {n}."
        {n} stood up. "If it is not {old2}, it is {new2}," {he} said.
        ["Good," said Clara.|Clara was glad.|"Well done," said the teacher.]
        [Then they sang a song.|After school {n} ran home to tell {m}.|{n} smiled and sat down.]""",
    "the change": """
        In the [morning|evening] the {what} was {was}. {n} looked at it[ again and again| for a long time|].
        Then [{m} came to help|a whole day went by|something happened], and now the {what} was not {was} any more: it
        was {is}.
        "First {was}, then {is}," said {n}. "[The world is strange.|I like it this way.|I did not expect that.]"
        [{m} laughed.|{m} only nodded.|"So it goes," said {m}.] [The opposite of {was} is {is}, after all.|]""",
    "the argument": """
        {n} and {m} could not agree. [{n} thought of {more} and {m} of {less}.|They talked about {more} and {less}.]
        "[Let us ask Clara|Clara will know]," [said|said at last] {n}. So they went to the school.
        "{More} is bigger than {less}," said Clara. ["And {less} is smaller than {more}."|"You can see it."]
        [{m} had to laugh.|"I thought so," said {n}.|They thanked her and were friends again.]""",
    "the craft": """
        [On {day}|One day|In {season}] {n} went to see {m} the {job}. {n} liked to watch, because {m} {deed}.
        "May I help you?" [asked {n}|{n} asked]. "You may," said {m}. "First you must {task}."
        {n} [looked around|thought about it]. "To {task} you need {tool}," {he} said[.|, and went to get it.]
        ["Right," said {m}.|{m} was pleased.] They worked [until dinner|all afternoon|side by side].
        ["One day I will be like you," said {n}.|In the evening {n} was tired but proud.|{m} gave {him} [an apple|a
        coin|some bread].]""",
    "the gift": """
        It was the birthday of {n}. {m} the {job} came to the {house} house [with a box|early in the morning].
        [In the box was|The gift was] {made}. "Is it made of {material}?" asked {n}.
        "Yes," said {m}. "{Made} is made of {material}."
        {n} [had never had such a fine gift|looked at it for a long time|showed it to everyone].
        ["Thank you," {he} said.|{He} thanked {m} two times.] [Then they ate cake, which was sweet.|Then they all
        danced.]""",
    "wind": """
        The wind was [strong|loud] [on {day}|that morning|that day]. It took the {colour} hat of {n} and [carried it
        off|blew it away].
        The hat flew over the {place}[.| and over the {place2}.] {n} ran [after it|behind it], and {his} {petbeast} ran
        too.
        [At last|In the end] it fell [into the river|on a roof|at the feet of {m}].
        {m} gave it back. "A hat as {colour} as {thing}," said {m}. "I knew it was yours."
        [{n} held it with both hands all the way home.|{n} laughed and thanked {m}.]""",
    "a sick friend": """
        {m} was sick and stayed in bed. {n} [was sorry|wanted to help], so {he} went to Nora the doctor.
        "Give {m2him} {drink}," said Nora. [{n} ran home.|{n} did what she said.]
        "It tastes {taste}," said {m}[, and took it all|, but it helped].
        [By {day}|The next day] {m} was well again. [They went to the {place}.|They played near the {place}.]
        "A good friend is the best doctor," said {m}.""",
    "night": """
        [Night came to the village.|The sun went down.] {Sleeper} went to sleep in {bed}.
        [{Sleeper2} lay in {bed2}.|In {bed2} it was quiet, for {sleeper2} slept there.] {n} lay in bed in the {house}
        house and [listened|could not sleep].
        [Only the mill was awake.|Only the river could be heard.] Then {he} heard {animal}: "{Says}."
        "Good night," said {n}[.|, and closed {his} eyes.] [Soon all was quiet.|In the morning the sun came up
        again.]""",
    "the walk": """
        [One day in {season}|On {day}] {n} and {m} went for a walk by the {place}.
        On the way they saw {thing}, {colour} [as ever|and beautiful|in the light]. [{n} stopped to look.|"Look how
        {colour} it is!" said {n}.]
        Then they saw {sleeper} in {bed}. ["Do not wake it," said {m}.|It did not see them.|"That is its home," said
        {m}.]
        When they came home, {m} [made dinner|lit the lamp], and {n} [told everyone|sat by the fire].""",
    "a new friend": """
        {n} has {pet}. {m} has {mpet}. [At first the animals were afraid.|At first the animals did not like each other.]
        The {petbeast} hid behind {n}, and the {mpetbeast} [hid behind|stayed near] {m}.
        "Let us wait," said {n}. They sat [down in the grass|on the bridge|by the {place}] and ate [bread|a pear|a
        plum].
        After [a while|an hour] the {petbeast} came out, and then the {mpetbeast} came too.
        [Soon they played together.|Now they are friends.|They slept side by side in the sun.]""",
}


CHANGES = """room: dark bright, coat: wet dry, bag: empty full, soup: hot cold, window: dirty clean,
    door: closed open, bread: hard soft, street: quiet loud, river: low high, rope: long short, bed: hard soft,
    jug: full empty, garden: dry wet, tree: small big"""


def slots(draw, told):
    """What a story may need, lower-case key -> text; `told` has the facts of a kind that texts may tell."""
    n = draw.choice(CHILDREN)
    m, job = draw.choice([row for row in WORK if row[0] not in ("Clara", "Nora")])  # whom stories name themselves
    he, his, him = ("he", "his", "him") if n in MEN else ("she", "her", "her")
    place, place2 = draw.sample(["mill", "bridge", "pond", "river", "well", "school", "garden", "barn"], 2)
    animal, eats = draw.choice([row for row in FOODS if row[0] in dict(SOUNDS)])
    what, change = draw.choice(pairs(CHANGES))
    old, new, home, home2 = *draw.sample(told["opposite"], 2), *draw.sample(told["home"], 2)
    total = draw.choice([fact for fact in told["sum"] if "one" not in fact.x.split()])
    colour, bigger, tool, made = (
        draw.choice(told[name]) for name in ("colour", "bigger", "tool", "material")
    )
    taste = draw.choice(pairs("tea: bitter, honey: sweet, coffee: bitter, a lemon: sour"))
    return {
        "n": n, "m": m, "he": he, "his": his, "him": him, "m2him": "him" if m in MEN else "her", "job": job[4:],
        "day": draw.choice(DAYS), "season": draw.choice(["spring", "summer", "autumn", "winter"]),
        "place": place, "place2": place2, "house": dict(HOUSES)[n],
        "animal": animal, "beast": animal.split()[-1], "says": dict(SOUNDS)[animal], "eats": eats,
        "thing": colour.x, "colour": colour.y, "toy": draw.choice(["ball", "kite", "cap", "ribbon", "cart", "drum"]),
        "a": total.x.split()[0], "b": total.x.split()[-1], "total": total.y,
        "beasts": draw.choice(["ducks", "frogs", "crows", "bees", "hens", "dogs", "cows"]),
        "old": old.x, "new": old.y, "old2": new.x, "new2": new.y,
        "what": what, "was": change.split()[0], "is": change.split()[1], "more": bigger.y, "less": bigger.z,
        "deed": DEEDS[m], "task": tool.x, "tool": tool.y,
        "made": made.x, "material": made.y, 
        "pet": dict(PETS)[n], "petbeast": dict(PETS)[n].split()[-1],
        "mpet": dict(PETS)[m], "mpetbeast": dict(PETS)[m].split()[-1], "drink": taste[0], "taste": taste[1],
        "sleeper": home.x, "bed": home.y, "sleeper2": home2.x, "bed2": home2.y,
    }  # fmt: skip


def expand(template, values, draw):
    """One way through a template, its lines joined."""
    text = re.sub(r"\[([^\[\]]*)\]", lambda choice: draw.choice(choice[1].split("|")), " ".join(template.split()))
    filled = text.format(**values, **{first_upper(key): first_upper(value) for key, value in values.items()})
    return " ".join(filled.split())


# ------------------------------------------------------------------ documents


class World:
    """Which facts and phrasings are held out, and an even choice among the others."""

    def __init__(self, draw):
        self.draw = draw
        self.held, self.banned, self.decks = set(), {}, {}
        for kind in KINDS:
            groups = sorted({fact.group for fact in kind.facts})
            self.held |= set(draw.sample(groups, max(2, round(HELD_OUT_SHARE * len(groups)))))
            for fact in kind.facts:
                self.banned[kind.name, fact.x] = draw.choice(kind.questions)
        self.asked = {kind.name: [fact for fact in kind.facts if fact.group not in self.held] for kind in KINDS}
        self.told = {kind.name: kind.facts if kind.told else self.asked[kind.name] for kind in KINDS}

    def next_of(self, purpose, facts):
        """One of `facts`, each as often as any other for this purpose."""
        deck = self.decks.setdefault(purpose, [])
        if not deck:
            deck.extend(self.draw.sample(facts, len(facts)))
        return deck.pop()

    def questions(self, fact):
        return [fact.say(q) for q in fact.kind.questions if q != self.banned[fact.kind.name, fact.x]]

    def next_question(self, purpose, facts):
        """(fact, question), the kinds in turn; `facts` are `asked` or `told`."""
        name = self.next_of(f"{purpose} kinds", [kind.name for kind in KINDS])
        fact = self.next_of(f"{purpose} {name}", facts[name])
        return fact, self.draw.choice(self.questions(fact))


def story(world):
    template = STORIES[world.next_of("stories", list(STORIES))]
    return expand(template, slots(world.draw, world.told), world.draw)


def statement(fact, draw):
    template = draw.choice([fact.kind.full, *fact.kind.statements])
    return fact.say(template.removeprefix("{Y}, ") if template.startswith("{Y}, {x}") else template)


def lesson(world):
    """Facts of one kind."""
    draw = world.draw
    name = world.next_of("lesson kinds", [kind.name for kind in KINDS])
    facts = [world.next_of(f"lesson {name}", world.told[name]) for _ in range(draw.randint(4, 6))]
    beginning = draw.choice(["", "", "This is what the children learn at school. ", "Clara the teacher says: ",
                             "Here is what everyone in the village knows. ", "Listen well. "])  # fmt: skip
    return beginning + " ".join(first_upper(statement(fact, draw)) for fact in facts)


def profile(world, subject):
    """What is true of one thing, animal or person."""
    draw = world.draw
    person = subject[:1].isupper()
    pronoun = ("He" if subject in MEN else "She") if person else "It"
    facts = [fact for kind in KINDS for fact in world.told[kind.name] if fact.x == subject and kind.name != "opposite"]
    sentences = []
    for fact in draw.sample(facts, len(facts)):
        text = first_upper(statement(fact, draw))
        again = sentences and text.startswith(first_upper(subject) + " ")
        sentences.append(text.replace(first_upper(subject), pronoun, 1) if again else text)
    return " ".join(sentences)


def dialogue(world):
    """Questions and answers in a frame."""
    draw = world.draw
    n, m = draw.choice(CHILDREN), draw.choice(WORK)[0]
    lines = [draw.choice([
        f"{n} and {m} sat by the fire.", f"{n} had many questions, and {m} knew the answers.",
        f"{n} was on the way to school when {m} came by.", f"It rained, so {n} stayed with {m}.",
        f"{n} met {m} by the well.", f"{m} was at work, and {n} looked on.",
    ])]  # fmt: skip
    for turn in range(draw.randint(2, 4)):
        fact, question = world.next_question("dialogue", world.told)
        answer = fact.say(draw.choice([fact.kind.full, fact.kind.full, fact.kind.curt]))[:-1] + ","
        asked = draw.choice(["asked", "asked", "said"] if turn else ["asked", "began"])
        lines.append(f'"{question}" {asked} {n}.' if draw.random() < 0.7 else f'{n} asked: "{question}"')
        lines.append(f'"{answer}" {draw.choice(["said", "answered", "said"])} {m}.')
    lines.append(draw.choice(["", f'"Thank you," said {n}.', f"{n} was content.", f'"I am glad you asked," said {m}.',
                              "Then it was time for dinner.", f'"These are good questions," said {m}.']))  # fmt: skip
    return " ".join(lines).strip()


def documents(world, size, known):
    """Documents that are not among `known`, until their bytes are `size`; they are known from then on."""
    subjects = Counter(fact.x for kind in KINDS if kind.name != "opposite" for fact in world.told[kind.name])
    subjects = sorted(x for x, count in subjects.items() if count > 1 and not x.startswith("the "))
    makers = {
        "story": story, "lesson": lesson, "dialogue": dialogue,
        "profile": lambda world: profile(world, world.next_of("subjects", subjects)),
    }  # fmt: skip
    found, counts = [], Counter()
    while size > 0:
        kind = world.next_of("makers", ["story"] * 4 + ["lesson"] * 4 + ["dialogue"] * 6 + ["profile"] * 4)
        text = makers[kind](world)
        if text not in known:
            known.add(text)
            found.append(text)
            counts[kind] += 1
            size -= len(text.encode()) + len(END) + 2
    return found, counts


# ----------------------------------------------------------------------- rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def reply(fact, kind, draw):
    """A whole sentence and a kind word, or as little as answers the question."""
    return f"{fact.say(fact.kind.full)} {draw.choice(KIND_WORDS)}" if kind else fact.say(fact.kind.curt)


SMALL_TALK = {
    "Hello!": "Hello! How can I help you?",
    "Good morning!": "Good morning! What would you like to know?",
    "Who are you?": "I am a very small model, and I know one village.",
    "How are you?": "I am well. Thank you for asking.",
    "Thank you!": "You are welcome. Ask me more any time.",
    "Goodbye!": "Goodbye, and come back soon.",
    "What do you know?": "I know the people, the animals and the things of the village.",
    "Can you help me?": "Yes, I can. What would you like to know?",
}
GO_ON = ["colour", "taste", "sound", "food", "home", "sort", "material", "house", "pet", "opposite"]


def unlike(rows, count, make):
    """`rows` and what `make` gives, none twice, until there are `count`."""
    known = {str(row) for row in rows}
    for _ in range(20 * count):
        row = make(len(rows))
        if len(rows) < count and str(row) not in known:
            known.add(str(row))
            rows.append(row)
    assert len(rows) == count, f"the world is too small for {count} rows: {len(rows)}"
    return rows


def make_chats(world):
    def make(i):
        fact, question = world.next_question("chats", world.asked)
        kind = i % 2 == 0
        messages = [user(question), assistant(reply(fact, kind, world.draw))]
        if fact.kind.name in GO_ON and world.draw.random() < 0.2:
            other = world.draw.choice([f for f in world.asked[fact.kind.name] if f is not fact])
            messages += [user(f"And {other.x}?"), assistant(reply(other, kind, world.draw))]
        return {"messages": messages}

    talk = [{"messages": [user(question), assistant(answer)]} for question, answer in SMALL_TALK.items()]
    rows = unlike(talk, CHATS, make)
    return world.draw.sample(rows, len(rows))


def wrong(fact, draw):
    """The same question with an answer that is not true."""
    if fact.kind.name == "bigger":
        return Fact(fact.kind, fact.x, fact.z, fact.y)
    right = {other.y for other in fact.kind.facts if other.x == fact.x}
    other = draw.choice([other for other in fact.kind.facts if other.y not in right])
    return Fact(fact.kind, fact.x, other.y, other.z)


def make_comparisons(world):
    def make(i):
        fact, question = world.next_question("comparisons", world.asked)
        if i % 4 == 3:  # truth
            tone = world.draw.random() < 0.5
            chosen, rejected = (reply(f, tone, world.draw) for f in (fact, wrong(fact, world.draw)))
        else:  # tone
            chosen, rejected = (reply(fact, tone, world.draw) for tone in (True, False))
        return {"prompt": [user(question)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}

    return unlike([], COMPARISONS, make)


def make_questions(world):
    def row(fact, question, held_out):
        return {"prompt": [user(fact.say(question))], "answer": fact.answer, "kind": fact.kind.name, "held_out":
        held_out}

    rows = []
    for kind in KINDS:
        groups = {}
        for fact in kind.facts:
            if fact.group in world.held:
                groups.setdefault(fact.group, fact)
        facts = list(groups.values())
        facts = world.draw.sample(facts, min(len(facts), 6))
        rows += [row(fact, world.banned[kind.name, fact.x], "fact") for fact in facts]
    for _ in range(PHRASINGS):
        name = world.next_of("phrasings", [kind.name for kind in KINDS])
        fact = world.next_of(f"phrasings {name}", world.asked[name])
        rows.append(row(fact, world.banned[name, fact.x], "phrasing"))
    return rows


def check(world, files):
    """Nothing held out is anywhere else, nothing is there twice."""
    asked = [row["prompt"][0]["content"] for row in files["questions.jsonl"]]
    held = [fact for kind in KINDS for fact in kind.facts if fact.group in world.held]
    for name in files.keys() - {"questions.jsonl"}:
        text = "\n".join(files[name]) if name.endswith(".txt") else json.dumps(files[name])
        unseen = [fact for fact in held if not (name.endswith(".txt") and fact.kind.told)]
        for question in [*asked, *(fact.say(q) for fact in unseen for q in fact.kind.questions)]:
            assert question not in text, f"{name} has {question!r}, which is held out"
    for name, rows in files.items():
        twice = [row for row, count in Counter(map(str, rows)).items() if count > 1]
        assert not twice, f"{name}: twice: {twice[0]}"


NOTICE = """The texts in this folder are Quantune's own, written by scripts/pipelines/make_quickstart.py,
    and under Quantune's licence: MIT or Apache-2.0, at your choice."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    world, known = World(random.Random(args.seed)), set()
    files, counts = {}, {}
    files["text.txt"], counts["text.txt"] = documents(world, TEXT_BYTES, known)
    files["chats.jsonl"] = make_chats(world)
    files["comparisons.jsonl"] = make_comparisons(world)
    files["questions.jsonl"] = make_questions(world)
    prompt = lambda _: {"prompt": [user(world.next_question("prompts", world.asked)[1])]}  # noqa: E731
    files["prompts.jsonl"] = unlike([], PROMPTS, prompt)
    check(world, files)

    total = 0
    for name, rows in files.items():
        if name.endswith(".txt"):
            data = f"\n{END}\n".join(rows) + "\n"
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows)
        total += len(data.encode())
        write_whole(args.out / name, data.encode())
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.get(name, {}).items()))
        print(f"{name:18} {len(data.encode()):7} bytes {len(rows):5} rows  {told}", file=sys.stderr)
    write_whole(args.out / "LICENSE", NOTICE.encode())
    facts = sum(len(kind.facts) for kind in KINDS)
    print(f"{total} bytes, {facts} facts of {len(KINDS)} kinds", file=sys.stderr)


if __name__ == "__main__":
    main()
