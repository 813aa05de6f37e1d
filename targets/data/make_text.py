"""Prints synthetic English from small grammars, for training and measuring the example language model.

Every document can be predicted in part from its own beginning: names and colours come back,
sums are right, weekdays fit their dates, lists are in alphabetical order, answers repeat facts
from the text before them. Choices are skewed, so one continuation is usually the likeliest.

    python targets/data/make_text.py --seed 7 --documents 20           # plain documents
    python targets/data/make_text.py --seed 7 --documents 20 --chat    # Phi-3 chat form
    python targets/data/make_text.py --eval                            # rewrites eval.txt

The output depends on the seed alone: only ``random.Random(int).random()`` and integers are used.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

EVAL_SEED = 1_000_003
EVAL_DOCUMENTS = 240
EVAL_FILE = Path(__file__).with_name("eval.txt")


def table(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The words of a text, the most frequent one first: see Draw.pick."""
    return tuple(text.split(separator))


GIRLS = table("Mira Anna Lena Tilda Nora Ruth Ida Clara Vera Olga Hanna Paula Elsa Greta Sofia Dina Julia Rosa")
BOYS = table("Oskar Tom Jonas Emil Peter Samir Felix Anton Karl Hugo Milan David Viktor Leo Martin Rolf Simon Otto")
COLOURS = table("red blue green yellow white black brown orange silver grey")
TOYS = table("kite ball boat drum basket lantern hat wagon umbrella bell scarf cup whistle ladder book blanket")
PLACES = table("river hill market garden harbour forest school bridge mill station orchard library meadow bakery tower")
ANIMALS = table("dog cat hen fox goat duck horse owl mouse sheep rabbit snail turtle donkey frog otter")
PET_NAMES = table("Biscuit Pepper Button Cloud Ginger Pebble Muffin Shadow Acorn Dusty")
FOODS = table(
    "apple bread cheese milk honey butter carrot egg plum rice onion pear soup tomato cake lemon bean potato cherry "
    "walnut salt fish pepper mushroom noodle cabbage biscuit grape melon tea"
)
COUNTED = table("apples eggs plums pears carrots stones buttons shells lemons cherries walnuts coins pencils feathers")
TRADES = table("baker teacher farmer doctor sailor painter gardener miller carpenter tailor postman fisher")
TOWNS = table("Northfield Oakham Riverton Greenport Milltown Stonebridge Westbury Lakeside Eastcliff Hillcrest")
WEATHER = table("sunny windy rainy cloudy cold warm foggy snowy")
DAY_PARTS = table("morning afternoon evening")
SEASONS = table("spring summer autumn winter")
WEEKDAYS = table("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = table("January February March April May June July August September October November December")
NUMBERS = table("zero one two three four five six seven eight nine ten eleven twelve")
ORDINALS = table("first second third fourth fifth sixth")
FEELINGS = table("happy glad proud tired calm cheerful")
TASKS = table(
    "water the garden|bake bread|paint the door|visit the library|"
    "mend the boat|wash the wagon|read a book|buy milk|call the doctor",
    "|",
)
COMPARISONS = table("faster older heavier taller louder stronger quieter smaller")


class Draw:
    """Skewed choices from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """A uniform integer in 0..limit-1."""
        return int(self._random.random() * limit)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, the k-th with a weight proportional to 1 / (k + 3)."""
        ticket = self.below(sum(1000 // (rank + 3) for rank in range(1, len(items) + 1)))
        for rank, item in enumerate(items, start=1):
            ticket -= 1000 // (rank + 3)
            if ticket < 0:
                return item
        raise AssertionError("the ticket is below the sum of the weights")

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """Different items, in the order in which they were drawn."""
        left = list(items)
        chosen = []
        for _ in range(count):
            chosen.append(self.pick(left))
            left.remove(chosen[-1])
        return chosen

    def number(self, low: int, high: int) -> int:
        """An integer in low..high, where small ones are the likelier."""
        return self.pick(range(low, high + 1))


@dataclass(frozen=True, kw_only=True)
class Person:
    """A name and the pronouns that agree with it."""

    name: str
    she: str
    her: str
    them: str
    kind: str


def person(draw: Draw, other_than: str = "") -> Person:
    """A girl or a boy whose name is not the given one."""
    girl = draw.below(10) < 6
    name = draw.pick([name for name in (GIRLS if girl else BOYS) if name != other_than])
    if girl:
        return Person(name=name, she="she", her="her", them="her", kind="girl")
    return Person(name=name, she="he", her="his", them="him", kind="boy")


def with_article(words: str) -> str:
    """``an owl``, ``a fox``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def say_date(day: date) -> str:
    """``Monday, 3 March 2025``, without the locale."""
    return f"{WEEKDAYS[day.weekday()]}, {day.day} {MONTHS[day.month - 1]} {day.year}"


def story(draw: Draw) -> str:
    """A hero with a thing and a friend, and one of five plots."""
    hero = person(draw)
    friend = person(draw, hero.name)
    colour, toy, place = draw.pick(COLOURS), draw.pick(TOYS), draw.pick(PLACES)
    title = f"The {colour} {toy}"
    opening = [
        f"Once there was a {hero.kind} named {hero.name}.",
        f"{hero.name} had {with_article(colour)} {toy}.",
        f"Every {draw.pick(DAY_PARTS)} {hero.name} took the {colour} {toy} to the {place}.",
    ]
    plot = draw.pick((plot_lost, plot_gift, plot_rain, plot_swap, plot_pet))
    sentences = opening + plot(draw, hero, friend, f"{colour} {toy}", place) + [plot_end(draw, hero, friend)]
    return f"{title}\n" + " ".join(sentences)


def plot_lost(draw: Draw, hero: Person, friend: Person, thing: str, place: str) -> list[str]:
    """The thing is lost and found in a second place."""
    found = draw.pick([other for other in PLACES if other != place])
    return [
        f"One day {hero.she} could not find the {thing}.",
        f"{hero.name} looked at the {place}, but the {thing} was not there.",
        f"Then {hero.she} met {hero.her} friend {friend.name}.",
        f'"Have you seen my {thing}?" asked {hero.name}.',
        f'"Yes," said {friend.name}. "Your {thing} is at the {found}."',
        f"So {hero.name} and {friend.name} went to the {found}, and there was the {thing}.",
    ]


def plot_gift(draw: Draw, hero: Person, friend: Person, thing: str, place: str) -> list[str]:
    """The friend brings food and is given the thing."""
    food = draw.pick(FOODS)
    return [
        f"One day {hero.she} met {friend.name} at the {place}.",
        f"{friend.name} had some {food} and gave half of the {food} to {hero.name}.",
        f'"Thank you for the {food}," said {hero.name}. "Now I will give you my {thing}."',
        f"{friend.name} took the {thing} and said thank you.",
    ]


def plot_rain(draw: Draw, hero: Person, friend: Person, thing: str, place: str) -> list[str]:
    """Weather sends both to a shelter."""
    shelter = draw.pick([other for other in PLACES if other != place])
    return [
        f"One day it began to rain, and {hero.name} ran from the {place} to the {shelter}.",
        f"At the {shelter} {hero.she} met {friend.name}, who was wet and cold.",
        f'"Come in and sit with me," said {hero.name}.',
        f"{friend.name} sat beside {hero.name}, and they looked at the {thing} until the rain was over.",
        f"Then they left the {shelter} and went back to the {place}.",
    ]


def plot_swap(draw: Draw, hero: Person, friend: Person, thing: str, place: str) -> list[str]:
    """Two things change hands and come back."""
    other = f"{draw.pick(COLOURS)} {draw.pick([toy for toy in TOYS if toy not in thing])}"
    return [
        f"{hero.her.capitalize()} friend {friend.name} had {with_article(other)}.",
        f'"May I use your {other}?" asked {hero.name}. "Then you may use my {thing}."',
        f"So {friend.name} took the {thing}, and {hero.name} took the {other}.",
        f"In the evening {friend.name} gave the {thing} back, and {hero.name} gave the {other} back.",
    ]


def plot_pet(draw: Draw, hero: Person, friend: Person, thing: str, place: str) -> list[str]:
    """An animal runs away with the thing."""
    animal, name = draw.pick(ANIMALS), draw.pick(PET_NAMES)
    return [
        f"{friend.name} had {with_article(animal)} named {name}.",
        f"One day {name} the {animal} took the {thing} and ran away from the {place}.",
        f'"Stop, {name}!" called {friend.name}, but the {animal} did not stop.',
        f"{hero.name} and {friend.name} ran after {name} and found the {animal} asleep beside the {thing}.",
    ]


def plot_end(draw: Draw, hero: Person, friend: Person) -> str:
    """A last sentence that names both people."""
    return draw.pick(
        (
            f"{hero.name} and {friend.name} were {draw.pick(FEELINGS)} and went home together.",
            f"From that day {hero.name} and {friend.name} were good friends.",
            f'"What a good day," said {hero.name}, and {friend.name} was {draw.pick(FEELINGS)} too.',
        )
    )


def sums(draw: Draw) -> str:
    """Additions and subtractions with right results."""
    left, sign = draw.number(2, 30), draw.pick("+-")
    lines = [f"Sums with {left}"]
    for step in range(4 + draw.number(0, 3)):
        right = 1 + step if sign == "+" else min(left, step)
        lines.append(f"{left} {sign} {right} = {left + right if sign == '+' else left - right}.")
    return "\n".join(lines)


def counting(draw: Draw) -> str:
    """Counting up in equal steps."""
    step, start = draw.pick((5, 2, 10, 3, 1)), draw.pick((0, 10, 20, 100))
    values = [start + step * index for index in range(7)]
    listed = ", ".join(str(value) for value in values)
    return f"Count from {start} in steps of {step}: {listed}. The last number is {values[-1]}."


def word_problem(draw: Draw) -> str:
    """Things given and taken, with the count after each sentence."""
    hero = person(draw)
    friend = person(draw, hero.name)
    things, held = draw.pick(COUNTED), draw.number(3, 8)
    given = draw.number(2, 4)
    taken = draw.number(2, 3)
    sentences = [
        f"{hero.name} has {NUMBERS[held]} {things}.",
        f"{friend.name} gives {hero.them} {NUMBERS[given]} more {things}.",
        f"Now {hero.name} has {NUMBERS[held]} and {NUMBERS[given]}, that is {NUMBERS[held + given]} {things}.",
    ]
    if draw.below(2):
        left = held + given - taken
        sentences += [
            f"Then {hero.she} loses {NUMBERS[taken]} {things}.",
            f"{NUMBERS[held + given].capitalize()} without {NUMBERS[taken]} is {NUMBERS[left]}, so {hero.name} has {NUMBERS[left]} {things} left.",
        ]
    return " ".join(sentences)


def calendar(draw: Draw) -> str:
    """Dates that follow one another."""
    day = date(2024, 1, 1) + timedelta(days=draw.below(1000))
    later = [day + timedelta(days=days) for days in (1, 2, 7)]
    return (
        f"Today is {say_date(day)}. Tomorrow is {say_date(later[0])}. "
        f"The day after tomorrow is {say_date(later[1])}. In one week it is {say_date(later[2])}."
    )


def diary(draw: Draw) -> str:
    """A week's plan: the weekdays follow one another, the name stays."""
    hero = person(draw)
    first = draw.pick(range(7))
    tasks = draw.several(TASKS, 4)
    lines = [f"The plan of {hero.name}"]
    lines += [f"{WEEKDAYS[(first + index) % 7]}: {task}." for index, task in enumerate(tasks)]
    lines.append(
        f"On {WEEKDAYS[first]} {hero.name} will {tasks[0]}, and on {WEEKDAYS[(first + 3) % 7]} {hero.she} will {tasks[3]}."
    )
    return "\n".join(lines)


def shopping(draw: Draw) -> str:
    """A list in alphabetical order, then facts about it."""
    hero = person(draw)
    foods = sorted(draw.several(FOODS, draw.number(3, 6)))
    lines = [f"The shopping list of {hero.name}"]
    lines += [f"- {food}" for food in foods]
    lines.append(
        f"There are {NUMBERS[len(foods)]} things on the list of {hero.name}. The first is {foods[0]} and the last is {foods[-1]}."
    )
    return "\n".join(lines)


def comparison(draw: Draw) -> str:
    """Two facts and what follows from them."""
    first, second, third = draw.several(ANIMALS, 3)
    quality = draw.pick(COMPARISONS)
    return (
        f"The {first} is {quality} than the {second}. The {second} is {quality} than the {third}. "
        f"So the {first} is {quality} than the {third}."
    )


def timetable(draw: Draw) -> str:
    """A departure, a duration and the arrival."""
    town = draw.pick(TOWNS)
    hour, minute, minutes = 6 + draw.number(0, 12), draw.pick((15, 0, 30, 45)), draw.pick((30, 15, 45, 60))
    end = hour * 60 + minute + minutes
    return (
        f"The train to {town} leaves at {hour}:{minute:02d} and takes {minutes} minutes. "
        f"It arrives in {town} at {end // 60}:{end % 60:02d}."
    )


def facts(draw: Draw) -> tuple[str, list[tuple[str, str]]]:
    """A short description of a person, and questions about it with their answers."""
    hero = person(draw)
    trade, town = draw.pick(TRADES), draw.pick(TOWNS)
    colour, toy, animal, name = draw.pick(COLOURS), draw.pick(TOYS), draw.pick(ANIMALS), draw.pick(PET_NAMES)
    text = (
        f"{hero.name} is a {trade} and lives in {town}. {hero.she.capitalize()} has {with_article(colour)} {toy} "
        f"and {with_article(animal)} named {name}."
    )
    questions = [
        (f"Where does {hero.name} live?", f"The home of {hero.name} is in {town}."),
        (f"What is the work of {hero.name}?", f"The work of {hero.name} is that of a {trade}."),
        (f"What colour is the {toy}?", f"The {toy} of {hero.name} is {colour}."),
        (f"What is the name of the {animal}?", f"The {animal} of {hero.name} is named {name}."),
    ]
    return text, draw.several(questions, 2 + draw.below(2))


def dialogue(draw: Draw) -> str:
    """Facts, then questions and answers in plain form."""
    text, questions = facts(draw)
    return "\n".join([text, *(f"Question: {question}\nAnswer: {answer}" for question, answer in questions)])


def letter(draw: Draw) -> str:
    """A letter of thanks that ends with the writer's name."""
    writer = person(draw)
    reader = person(draw, writer.name)
    colour, toy, town, season = draw.pick(COLOURS), draw.pick(TOYS), draw.pick(TOWNS), draw.pick(SEASONS)
    return (
        f"Dear {reader.name},\nthank you for the {colour} {toy}. It is {draw.pick(WEATHER)} here in {town}, and I use the {toy} every day. "
        f"I hope that you can come to {town} in {season}. In {season} {town} is beautiful.\nYour friend {writer.name}"
    )


def ranking(draw: Draw) -> str:
    """A race with its places, then who won."""
    people = draw.several(GIRLS + BOYS, 4)
    place = draw.pick(PLACES)
    lines = [f"The race to the {place}"]
    lines += [f"{rank.capitalize()}: {name}" for rank, name in zip(ORDINALS, people, strict=False)]
    lines.append(f"So {people[0]} won the race to the {place}, and {people[-1]} was last.")
    return "\n".join(lines)


DOCUMENTS: tuple[Callable[[Draw], str], ...] = (
    story, dialogue, letter, shopping, word_problem, diary, calendar, sums, ranking, comparison, timetable, counting,
)  # fmt: skip


def make_document(draw: Draw) -> str:
    """One plain document, without a blank line in it."""
    return draw.pick(DOCUMENTS)(draw)


def make_chat(draw: Draw) -> str:
    """One conversation in Phi-3 chat form."""
    turns = draw.pick((chat_facts, chat_sum, chat_story, chat_sort, chat_day))(draw)
    return "".join(f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n" for question, answer in turns)


def chat_facts(draw: Draw) -> list[tuple[str, str]]:
    """Questions about facts in the first turn."""
    text, questions = facts(draw)
    return [(f"{text} {questions[0][0]}", questions[0][1]), *questions[1:]]


def chat_story(draw: Draw) -> list[tuple[str, str]]:
    """A story about the thing that the user names."""
    title, text = story(draw).split("\n")
    return [(f"Tell me a story about the {title.removeprefix('The ')}.", text)]


def chat_sort(draw: Draw) -> list[tuple[str, str]]:
    """Words in alphabetical order."""
    words = draw.several(FOODS, draw.number(3, 5))
    return [(f"Sort these words: {', '.join(words)}.", f"In order: {', '.join(sorted(words))}.")]


def chat_sum(draw: Draw) -> list[tuple[str, str]]:
    """Two additions."""
    pairs = [(draw.number(2, 30), draw.number(1, 7)) for _ in range(2)]
    return [(f"What is {left} + {right}?", f"The sum of {left} and {right} is {left + right}.") for left, right in pairs]


def chat_day(draw: Draw) -> list[tuple[str, str]]:
    """The weekday after another."""
    first = draw.pick(range(7))
    return [
        (f"Today is {WEEKDAYS[first]}. What day is tomorrow?", f"Tomorrow is {WEEKDAYS[(first + 1) % 7]}."),
        ("And the day after tomorrow?", f"The day after tomorrow is {WEEKDAYS[(first + 2) % 7]}."),
    ]


def make_row(draw: Draw) -> str:
    """Words in an order that nothing foretells, said twice: pure copying, which is in no document."""
    words = [*GIRLS, *BOYS, *COLOURS, *TOYS, *PLACES, *ANIMALS, *PET_NAMES, *FOODS, *TRADES, *TOWNS]
    row = " ".join(words.pop(draw.below(len(words))) for _ in range(4 + draw.below(8)))
    return f"Words: {row}. Again: {row}."


def make_text(seed: int, documents: int) -> str:
    """Plain documents with a blank line between two of them."""
    draw = Draw(seed)
    return "\n\n".join(make_document(draw) for _ in range(documents)) + "\n"


def main() -> int:
    """Print documents, or rewrite the held-out text."""
    parser = argparse.ArgumentParser(description="Print synthetic English from small grammars.")
    parser.add_argument("--seed", type=int, default=1, help="an integer; the same seed gives the same text")
    parser.add_argument("--documents", type=int, default=10, help="how many documents")
    parser.add_argument("--chat", action="store_true", help="conversations in Phi-3 chat form instead of plain documents")
    parser.add_argument(
        "--eval",
        action="store_true",
        help=f"rewrite {EVAL_FILE.name} (seed {EVAL_SEED}, {EVAL_DOCUMENTS} documents) and print nothing",
    )
    arguments = parser.parse_args()
    if arguments.eval:
        EVAL_FILE.write_text(make_text(EVAL_SEED, EVAL_DOCUMENTS), encoding="utf-8", newline="\n")
    elif arguments.chat:
        draw = Draw(arguments.seed)
        print("\n".join(make_chat(draw) for _ in range(arguments.documents)), end="")
    else:
        print(make_text(arguments.seed, arguments.documents), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
