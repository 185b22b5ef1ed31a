"""A task whose success can be counted: free-text orders into JSON of a given schema.

The demo must show learning, not recall, so two things are kept apart here:

* **Closed words** are the same everywhere, because the schema defines them: weekdays, numbers, the keys.
* **Open words**, which are people, towns, goods and every sentence pattern, come from two disjoint lists. What the
  held-out orders are made of, training has never seen; a test holds the lists against each other. Training's lists are
  long: of few words a small model would learn the list instead of learning to copy. Held-out words that begin a JSON
  string are mostly such as the tokenizer spells alike after a space and after a quote, since spelling is not the task.

An order is a handful of sentences in any sequence: who orders, several goods with quantities in digits or in words,
where and on what day, whether it is a gift, and one that only distracts (other people, other goods, other numbers).
The prompt states the schema and the rules in full, so a model that fails has not been kept in the dark. An answer
counts when it parses as JSON and equals the expected object in every field; there is no partial credit.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
INSTRUCTION = (
    'Write the order as JSON: {"customer": name, "items": [{"name": singular, "quantity": integer}, ...], '
    '"city": text, "day": weekday, "gift": true or false}. Count only what is ordered now. Answer with the JSON alone.'
)


@dataclass(frozen=True)
class Vocabulary:
    """The open words of one part of the data: training or held out."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    cities: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    customer: tuple[str, ...]
    items: tuple[str, ...]
    delivery: tuple[str, ...]
    gift: tuple[str, ...]
    no_gift: tuple[str, ...]
    distraction: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One order: the text, and the object that a right answer equals."""

    text: str
    expected: dict

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt in conversational form."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.text}]

    @property
    def answer(self) -> str:
        """The right answer as the model should write it."""
        return json.dumps(self.expected)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)

TRAIN = Vocabulary(
    first_names=_words(
        "Anna Boris Carla David Elena Felix Grace Hugo Irene Jonas Karin Liam Maria Nils Olga Peter Rosa Simon "
        "Tessa Viktor Wanda Yusuf Zoe Akira Bruno Dalia Emre Fatima Gustav Hana Ivan Julia John Mary James Robert "
        "Linda Susan Karen Paul Mark George Laura Kevin Brian Helen Frank Alice Henry Jane Carl Arthur Diana "
        "Albert Ruth Joe Eric Roger Amy Rachel Daniel Lucy Adam Martin Emma Sarah Thomas Sam Max Leo"
    ),
    last_names=_words(
        "Adler Bishop Castro Dvorak Evans Fischer Garcia Hansen Ivanov Jensen Keller Lopez Meyer Novak Olsen "
        "Petrov Quinn Rossi Silva Tanaka Ulrich Vargas Walker Young Zhang Brandt Cohen Duarte Eriksen Foster "
        "Gomez Huber Smith Jones Brown Wilson Clark Lewis Hall Allen King Wright Scott Hill Baker Adams Nelson "
        "Mitchell Roberts Turner Phillips Campbell Parker Collins Stewart Morris Murphy Cook Rogers Morgan Cooper "
        "Peterson Reed Bailey Kelly Howard Ward Cox"
    ),
    cities=_words(
        "Berlin Paris Madrid Vienna Oslo Dublin Prague Lisbon Athens Boston Denver Toronto Sydney Osaka Lima "
        "Cairo Zurich Hamburg Milan Porto Leeds Bristol Austin Dallas Geneva Warsaw Krakow Turin Lyon Bergen "
        "Tokyo Moscow Delhi Atlanta Houston Miami Detroit Oxford Cambridge Manchester Liverpool Stockholm "
        "Amsterdam Brussels Barcelona Melbourne Vancouver Singapore"
    ),
    adjectives=_words(
        "blue red small large wooden steel heavy light round square cotton leather plastic golden white black "
        "folding striped cheap old short long thick soft new big little dark pink yellow purple gray brown flat "
        "thin wide deep hard warm cold clean dry fresh smooth simple modern classic paper metal stone rubber wool "
        "silk iron"
    ),
    nouns=_words(
        "chair table lamp bottle basket pillow blanket hammer ladder bucket mirror carpet curtain candle plate "
        "spoon kettle drawer notebook pencil backpack helmet jacket towel bowl clock jug poster cushion bracket "
        "screw barrel book pen bag hat coat shirt cup pan pot door window bed sofa cable battery filter lock key "
        "chain wheel board brick tile pipe tank tent boat doll toy ball card frame sign bell fan oven heater "
        "camera radio phone printer button belt ring rope net hook nail tool saw drill engine motor seat cart jar"
    ),
    customer=(
        "My name is {customer}.",
        "This is {customer} writing.",
        "{customer} here.",
        "The order is for {customer}.",
        "Put it on the account of {customer}, please.",
        "Customer: {customer}.",
        "Hello, {customer} speaking.",
        "I am {customer} and I would like to order something.",
        "Yours, {customer}.",
        "Please book this under {customer}.",
        "{customer} is the one who buys.",
        "Write {customer} on the invoice.",
        "{customer} is my name.",
        "The bill goes to {customer}.",
    ),
    items=(
        "I need {items}.",
        "We would like {items}.",
        "Please send {items}.",
        "Order: {items}.",
        "Could you ship {items}?",
        "I want to buy {items} from you.",
        "Our list: {items}.",
        "Give me {items}, please.",
        "We are short of stock and ask for {items}.",
        "What I want this time is {items}.",
    ),
    delivery=(
        "Deliver it to {city} on {day}.",
        "It has to be in {city} by {day}.",
        "Delivery: {city}, {day}.",
        "On {day} our team in {city} can receive it.",
        "The parcel goes to {city} and should arrive on {day}.",
        "Bring everything to our {city} office on {day}.",
        "{day} would be a good day, and the place is {city}.",
        "We are in {city} and somebody is here on {day}.",
    ),
    gift=(
        "It is a gift.",
        "Please wrap it as a present.",
        "This will be a birthday present for a friend.",
        "Use gift paper, please.",
        "It is a surprise for my mother, so wrap it nicely.",
        "Add a bow, it is a present.",
        "We will give it to our teacher as a gift.",
        "As it is for a wedding, wrap it.",
        "A ribbon and nice paper, please.",
    ),
    no_gift=(
        "It is not a gift.",
        "No gift paper is needed.",
        "It is for our own use.",
        "Plain packaging is fine.",
        "This is for the office, so no present.",
        "Do not wrap it.",
        "Nobody will unwrap it, it is not a present.",
        "No wrapping, please.",
        "You need not wrap it.",
        "Gift wrap is unnecessary.",
        "We do not want it wrapped.",
        "Leave out the gift paper.",
        "Wrapping would be a waste.",
        "It is for nobody's birthday, just send it.",
        "We keep it for ourselves.",
        "A plain box is enough, it is no gift.",
    ),
    distraction=(
        "My colleague {person} says hello.",
        "Last time we bought {other}, which was fine.",
        "A month ago you delivered {other}.",
        "You once sold {other} to us and all was well.",
        "The {others} that came in May were good.",
        "Two years ago you sent us {other} and they still work.",
        "In winter we got {other} from you.",
        "{person} told me about your shop.",
        "My neighbour {person} buys here too.",
        "My friend {person} likes what you sell.",
        "{person} is our new accountant.",
        "{person} will open the door.",
        "If nobody is there, ask for {person}.",
        "{person}, a cousin of mine, praised you.",
        "Our house has {number} floors.",
        "Call {person} if there are questions.",
        "We are {number} colleagues here.",
        "We have been customers for {number} years.",
        "Your shop in {place} is lovely.",
        "I called {number} times and nobody answered.",
        "We do not need any {others} this time.",
        "The invoice number of the last order was {number}.",
        "I still have {other} from last year.",
        "On {weekday} I talked to {person} about it.",
    ),
)

HELD_OUT = Vocabulary(
    first_names=_words(
        "Victor Edward Charles Ben Jack Michael William Richard Elizabeth Joseph Oscar Marco Nancy Kate Ann Luke"
    ),
    last_names=_words(
        "Weber Moore Taylor Carter Santos Anderson Harris Lee Martinez Bennett Russell Henderson Graham Moreau "
        "Kowalski Okafor Nilsson Watson"
    ),
    cities=_words("Rome London Chicago Washington Madison Lincoln Jackson Seattle Montreal Edinburgh"),
    adjectives=_words("green glass tall bright orange strong sharp tiny empty natural solid electric mini"),
    nouns=_words(
        "desk vase umbrella wallet lantern broom saddle napkin stool whistle tray magnet guitar rug ticket flag "
        "shield drum piano bike hose bracelet map flute sword statue"
    ),
    customer=(
        "You are reading a message from {customer}.",
        "Kind regards from {customer}.",
        "The person who orders and pays is {customer}.",
        "{customer} is the name for the receipt.",
        "Good morning, I'm {customer}.",
    ),
    items=(
        "Would you kindly get me {items}?",
        "For this order we are looking for {items}.",
        "Kindly reserve {items} for us.",
        "The following is wanted: {items}.",
        "I'd be happy to receive {items}.",
    ),
    delivery=(
        "Please have the goods dropped off in {city} on {day}.",
        "Our door in {city} is open for your van on {day}.",
        "See that it reaches {city} on {day}, please.",
        "Where and when: {city} on {day}.",
    ),
    gift=(
        "Since it is meant as a present, wrapping would be great.",
        "We give it to a neighbour as a gift for her wedding.",
        "Pack it in pretty gift paper with a ribbon.",
    ),
    no_gift=(
        "Wrapping is not needed.",
        "No need for gift wrap, a simple box will do.",
        "We will use it ourselves, so it is not a present.",
    ),
    distraction=(
        "A friend of mine, {person}, recommended you.",
        "In spring you sold us {other} and we were pleased.",
        "There are {number} people working in our company.",
        "I remember your stand at the fair in {place}.",
        "Forget about the {others} we once discussed.",
        "You can ring {person} if the driver gets lost.",
    ),
)


def generate_orders(vocabulary: Vocabulary, num_examples: int, seed: int) -> list[Example]:
    """Write orders from a vocabulary.

    Args:
        vocabulary (`Vocabulary`): `TRAIN` or `HELD_OUT`.
        num_examples (`int`): How many.
        seed (`int`): The same seed gives the same orders.

    Returns:
        `list[Example]`: All different in their text.
    """
    draw = random.Random(f"{seed}/{vocabulary.first_names[0]}")
    examples: dict[str, Example] = {}
    while len(examples) < num_examples:
        example = _write_order(vocabulary, draw)
        examples.setdefault(example.text, example)
    return list(examples.values())


def score(answer: str, expected: dict) -> bool:
    """Say whether an answer is right: JSON and nothing else, equal to the expected object in every field.

    `True == 1` in Python but not in JSON, so the comparison is made on the canonical text.
    """
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return _canonical(given) == _canonical(expected)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _write_order(words: Vocabulary, draw: random.Random) -> Example:
    customer, person = (f"{draw.choice(words.first_names)} {draw.choice(words.last_names)}" for _ in range(2))
    city, place = draw.sample(words.cities, 2)
    day, weekday = draw.sample(DAYS, 2)
    nouns = draw.sample(words.nouns, draw.choice((2, 2, 2, 3)) + 1)
    adjectives = draw.sample(words.adjectives, len(nouns))
    names = [f"{adjective} {noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
    *items, other = [(name, _draw_quantity(draw)) for name in names]
    gift = draw.random() < 0.5
    essential = [
        draw.choice(words.customer).format(customer=customer),
        draw.choice(words.items).format(items=_list_items(items, draw)),
        draw.choice(words.delivery).format(city=city, day=day),
        draw.choice(words.gift if gift else words.no_gift),
    ]
    distraction = draw.choice(words.distraction).format(
        person=person,
        other=_write_item(*other, draw),
        others=f"{other[0]}s",
        number=_write_number(draw.randint(2, 60), draw),
        place=place,
        weekday=weekday,
    )
    sentences = [*essential, distraction]
    draw.shuffle(sentences)
    expected = {
        "customer": customer,
        "items": [{"name": name, "quantity": quantity} for name, quantity in items],
        "city": city,
        "day": day,
        "gift": gift,
    }
    return Example(" ".join(sentences), expected)


def _draw_quantity(draw: random.Random) -> int:
    return draw.choice((draw.randint(1, 12), draw.randint(2, 20), draw.randint(2, 20), draw.randint(21, 99)))


def _write_number(number: int, draw: random.Random) -> str:
    return str(number) if number >= len(_NUMBERS) or draw.random() < 0.4 else _NUMBERS[number]


def _write_item(name: str, quantity: int, draw: random.Random) -> str:
    return f"{_write_number(quantity, draw)} {name}{'s' if quantity > 1 else ''}"


def _list_items(items: list[tuple[str, int]], draw: random.Random) -> str:
    *first, last = [_write_item(name, quantity, draw) for name, quantity in items]
    return f"{', '.join(first)} and {last}"
