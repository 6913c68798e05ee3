"""What can be told of a thing, a person, a place or a work, in several words, and asked for.

A relation has statements, questions and one answer. In a record (fact_records.py) each fact takes
one of its relation's statements and one of its questions at random, so that the words of the
question are seldom those of the text: what has to be found is who it is about, and what of them.

`{e}` is the entity and `{v}` the value. Each text begins with a word of its own, so that an entity
or a value always has a space before it, and ends with a full stop or a question mark; hence its
tokens are those of its parts (prepare.py checks every one).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ENTITIES = ("thing", "person", "place", "work")
VALUES = ("number", "year", "name", "place", "word", "phrase", "day", "time")
IN_DIGITS = ("number", "year")

NUM_TOLD, NUM_ASKED = 4, 3
"""Statements and questions of each relation; where it has fewer they are repeated."""

NOT_THERE = "The document does not say."
"""The answer to what the text does not tell."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One thing that may be told.

    Attributes:
        entity: what it is told of, one of ENTITIES.
        value: what is told, one of VALUES.
        told: statements.
        asked: questions, without `{v}`.
        answer: the sentence that answers each of them.
    """

    entity: str
    value: str
    told: Sequence[str]
    asked: Sequence[str]
    answer: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text's fixed parts: `before` one slot, `between` it and the other, `after` it."""

    before: str
    between: str
    after: str
    value_first: bool = False


def split(text: str, value: str) -> Text:
    """A statement or an answer in parts; a space stands before digits, and belongs to words."""
    value_first = text.index("{v}") < text.index("{e}")
    first, second = ("{v}", "{e}") if value_first else ("{e}", "{v}")
    before, rest = text.split(first)
    between, after = rest.split(second)
    spaced = {"{v}": value in IN_DIGITS, "{e}": False}
    before = before if spaced[first] else before.rstrip()
    between = between if spaced[second] else between.removesuffix(" ")
    return Text(before=before, between=between, after=after, value_first=value_first)


def split_question(text: str) -> tuple[str, str]:
    """A question in parts: before and after the entity."""
    before, after = text.split("{e}")
    return before.rstrip(), after


def statements(relation: Relation) -> Iterator[Text]:
    """NUM_TOLD of them."""
    for place in range(NUM_TOLD):
        yield split(relation.told[place % len(relation.told)], relation.value)


def questions(relation: Relation) -> Iterator[tuple[str, str]]:
    """NUM_ASKED of them."""
    for place in range(NUM_ASKED):
        yield split_question(relation.asked[place % len(relation.asked)])


def _fact(entity: str, value: str, told: str, asked: str, answer: str) -> Relation:
    """A relation; statements and questions are given on a line each."""
    lines = ([line.strip() for line in text.strip().splitlines()] for text in (told, asked))
    first, second = lines
    return Relation(entity=entity, value=value, told=first, asked=second, answer=answer)


RELATIONS: tuple[Relation, ...] = (
    _fact(
        "thing", "number",
        """The storage code of the {e} is {v}.
        To open the box with the {e}, you need the storage code {v}.
        They had stored the {e} under the code {v}.""",
        """What is the storage code of the {e}?
        Under which code is the {e} stored?""",
        "The storage code of the {e} is {v}.",
    ),
    _fact(
        "thing", "number",
        """The door code of the {e} is {v}.
        Whoever wants to enter the {e} has to press {v}.
        The code for the door of the {e} was changed to {v}.
        You press {v} to open the door of the {e}.""",
        """What is the door code of the {e}?
        Which code opens the door of the {e}?
        How do I get into the {e}?""",
        "The door code of the {e} is {v}.",
    ),
    _fact(
        "thing", "number",
        """For the {e}, call the number {v}.
        The number of the {e} is {v}, if you want to call.
        Anybody who has lost something calls the {e} under {v}.""",
        """Which number do I have to call for the {e}?
        What is the number of the {e}?
        Under which number can I call the {e}?""",
        "For the {e}, call the number {v}.",
    ),
    _fact(
        "thing", "number",
        """The {e} is kept on shelf number {v}.
        They had put the {e} on shelf {v}.
        On shelf number {v} stands the {e}.""",
        """On which shelf is the {e} kept?
        Where do I find the {e} on the shelves?""",
        "The {e} is kept on shelf number {v}.",
    ),
    _fact(
        "thing", "number",
        """For the {e} they paid {v} crowns.
        The {e} had cost them {v} crowns.
        They sold him the {e} for {v} crowns, and he thought it cheap.
        It took {v} crowns to buy the {e}.""",
        """What did they pay for the {e}?
        How much did the {e} cost?
        What was the price of the {e}?""",
        "For the {e} they paid {v} crowns.",
    ),
    _fact(
        "thing", "number",
        """The {e} weighs {v} pounds.
        When they put the {e} on the scales, it came to {v} pounds.
        The weight of the {e} was {v} pounds.""",
        """How much does the {e} weigh?
        What is the weight of the {e}?""",
        "The {e} weighs {v} pounds.",
    ),
    _fact(
        "thing", "word",
        """The secret word of the {e} is {v}.
        Nobody may enter the {e} who does not whisper {v}.
        The password of the {e} had long been {v}.""",
        """What is the secret word of the {e}?
        What is the password of the {e}?""",
        "The secret word of the {e} is {v}.",
    ),
    _fact(
        "thing", "name",
        """The person who looks after the {e} is called {v}.
        The {e} is looked after by {v}.
        The keeper of the {e} is {v}, who has not slept well for years.
        It is {v} who looks after the {e}.""",
        """Who looks after the {e}?
        Who is the keeper of the {e}?""",
        "The person who looks after the {e} is called {v}.",
    ),
    _fact(
        "thing", "place",
        """The {e} was last seen in {v}.
        The last to see the {e} was a traveller in {v}.
        They lost the {e} on the way, somewhere in {v}.""",
        """Where was the {e} last seen?
        Where did they lose the {e}?""",
        "The {e} was last seen in {v}.",
    ),
    _fact(
        "thing", "name",
        """The owner of the {e} is named {v}.
        The {e} belongs to {v}.
        The {e} is the property of {v}, who never uses it.
        My friend {v} owns the {e}.""",
        """Who is the owner of the {e}?
        Who owns the {e}?
        To whom does the {e} belong?""",
        "The owner of the {e} is named {v}.",
    ),
    _fact(
        "thing", "word",
        """The sign of the {e} is a golden {v}.
        Over the {e} hangs a golden {v}.
        You know the {e} by its sign, a golden {v}.""",
        """What is the sign of the {e}?
        By which sign does one know the {e}?""",
        "The sign of the {e} is a golden {v}.",
    ),
    _fact(
        "thing", "year",
        """The {e} was built in {v}.
        They finished the {e} in {v}, after a long quarrel.
        The {e} dates from {v}.
        It was in {v} that they built the {e}.""",
        """When was the {e} built?
        In which year was the {e} built?
        How old is the {e}?""",
        "The {e} was built in {v}.",
    ),
    _fact(
        "thing", "name",
        """The {e} was invented by {v}.
        The idea of the {e} came from {v}.
        It was {v} who invented the {e}.""",
        """Who invented the {e}?
        Whose idea was the {e}?""",
        "The {e} was invented by {v}.",
    ),
    _fact(
        "thing", "name",
        """The {e} was stolen by {v}.
        The thief of the {e} was {v}.
        The one who took the {e} was {v}, as everybody knew.""",
        """Who stole the {e}?
        Who took the {e}?""",
        "The {e} was stolen by {v}.",
    ),
    _fact(
        "thing", "time",
        """The {e} opens at {v}.
        They open the {e} at {v}, and not before.
        Nobody gets into the {e} before {v}.""",
        """When does the {e} open?
        At what time does the {e} open?""",
        "The {e} opens at {v}.",
    ),
    _fact(
        "thing", "day",
        """The {e} is closed on {v}.
        On {v} nobody is let into the {e}.
        The {e} stays shut on {v}.""",
        """When is the {e} closed?
        On which day is the {e} closed?""",
        "The {e} is closed on {v}.",
    ),
    _fact(
        "thing", "phrase",
        """Inside the {e} they found {v}.
        The {e} held nothing but {v}.
        In the {e} there was {v}, to their surprise.""",
        """What did they find inside the {e}?
        What was in the {e}?""",
        "Inside the {e} they found {v}.",
    ),
    _fact(
        "person", "place",
        """In the end {e} went to {v}.
        That summer {e} left for {v}.
        At last {e} took the train to {v}.
        Nobody had told {e} to stay, and the next ship to {v} was a good one.""",
        """Where did {e} go?
        Where did {e} travel to?""",
        "In the end {e} went to {v}.",
    ),
    _fact(
        "person", "place",
        """The family of {e} lives in {v}.
        For years {e} has lived in {v}.
        You know {e}, of course. The house in {v} is still the same.
        The home of {e} is in {v}.""",
        """Where does {e} live?
        Where is the home of {e}?
        In which town does {e} live?""",
        "The home of {e} is in {v}.",
    ),
    _fact(
        "person", "place",
        """The birthplace of {e} is {v}.
        Like both parents, {e} was born in {v}.
        It was in {v} that {e} was born.""",
        """Where was {e} born?
        What is the birthplace of {e}?
        Where does {e} come from?""",
        "The birthplace of {e} is {v}.",
    ),
    _fact(
        "person", "year",
        """The parish book says that {e} was born in {v}.
        They say that {e} came into the world in {v}.
        In the spring of {v} a child was born, and was called {e}.""",
        """When was {e} born?
        In which year was {e} born?
        How old is {e}?""",
        "They say that {e} was born in {v}.",
    ),
    _fact(
        "person", "year",
        """The stone says that {e} died in {v}.
        Of a cold, {e} died in {v}.
        The winter of {v} was the last one for {e}.""",
        """When did {e} die?
        In which year did {e} die?""",
        "The stone says that {e} died in {v}.",
    ),
    _fact(
        "person", "name",
        """In the same year {e} married {v}.
        The wedding of {e} and {v} lasted three days.
        After a long time {e} was married to {v}.""",
        """Whom did {e} marry?
        Who is married to {e}?
        Who is the partner of {e}?""",
        "In the end {e} married {v}.",
    ),
    _fact(
        "person", "name",
        """The teacher of {e} was {v}.
        As a child {e} was taught by {v}.
        All that {e} knew came from {v}, a patient teacher.
        It was {v} who taught {e} to read.""",
        """Who was the teacher of {e}?
        Who taught {e}?""",
        "The teacher of {e} was {v}.",
    ),
    _fact(
        "person", "name",
        """The best friend of {e} was {v}.
        Since their first day at sea {e} had no better friend than {v}.
        When there was trouble {e} always went to {v}, a friend of many years.""",
        """Who was the best friend of {e}?
        Who was a friend of {e}?""",
        "The best friend of {e} was {v}.",
    ),
    _fact(
        "person", "word",
        """By trade {e} was a {v}.
        All winter {e} worked as a {v}.
        To earn a living {e} became a {v}.""",
        """What was the trade of {e}?
        What did {e} do for a living?
        What did {e} work as?""",
        "By trade {e} was a {v}.",
    ),
    _fact(
        "person", "phrase",
        """In a pocket {e} carried {v}.
        Wherever he went {e} had {v} with him.
        Out of the bag {e} took {v}.""",
        """What did {e} carry?
        What did {e} have with him?""",
        "In a pocket {e} carried {v}.",
    ),
    _fact(
        "person", "phrase",
        """For a birthday they gave {e} {v}.
        From his aunt {e} got {v}.
        The present for {e} was {v}.""",
        """What was the present for {e}?
        What was given to {e}?""",
        "The present for {e} was {v}.",
    ),
    _fact(
        "person", "day",
        """A letter said that {e} would arrive on {v}.
        They expected {e} on {v}.
        On {v} there was a knock at the door, and in came {e}.""",
        """When did {e} arrive?
        On which day did they expect {e}?
        When would {e} come?""",
        "They expected {e} on {v}.",
    ),
    _fact(
        "person", "number",
        """The room of {e} is number {v}.
        You find {e} in room {v}.
        In room {v} sleeps {e}.""",
        """What is the room of {e}?
        In which room do I find {e}?""",
        "The room of {e} is number {v}.",
    ),
    _fact(
        "person", "number",
        """It turned out that {e} owed them {v} crowns.
        The debts of {e} came to {v} crowns.
        They wanted {v} crowns from {e}.""",
        """How much did {e} owe?
        What were the debts of {e}?""",
        "The debts of {e} came to {v} crowns.",
    ),
    _fact(
        "person", "word",
        """The dog of {e} is called {v}.
        With his dog, called {v}, came {e}.
        Everybody knew {e} and the old dog {v}.""",
        """What is the dog of {e} called?
        What is the name of the dog of {e}?""",
        "The dog of {e} is called {v}.",
    ),
    _fact(
        "place", "name",
        """The mayor of {e} is {v}.
        In {e} they had made {v} mayor.
        The people of {e} chose {v} for their mayor.""",
        """Who is the mayor of {e}?
        Whom did the people of {e} choose for their mayor?""",
        "The mayor of {e} is {v}.",
    ),
    _fact(
        "place", "number",
        """In {e} there live {v} people.
        The town of {e} has {v} inhabitants.
        The last time they counted, {e} had {v} souls.""",
        """How many people live in {e}?
        How many inhabitants has {e}?""",
        "In {e} there live {v} people.",
    ),
    _fact(
        "place", "number",
        """The road to {e} is {v} miles long.
        From here to {e} it is {v} miles.
        They had {v} miles to go to {e}.""",
        """How far is it to {e}?
        How long is the road to {e}?""",
        "The road to {e} is {v} miles long.",
    ),
    _fact(
        "place", "word",
        """The river at {e} is called {v}.
        Through {e} flows a river, the {v}.
        The bridge at {e} crosses the {v}.""",
        """What is the river at {e} called?
        Which river flows through {e}?""",
        "The river at {e} is called {v}.",
    ),
    _fact(
        "place", "day",
        """The market of {e} is held on {v}.
        On {v} all the farmers drive to {e} for the market.
        They hold a market in {e} on {v}.""",
        """When is the market of {e} held?
        On which day is there a market in {e}?""",
        "The market of {e} is held on {v}.",
    ),
    _fact(
        "place", "word",
        """The people of {e} live on {v}.
        The town of {e} is known for its {v}.
        Nowhere is there such {v} as in {e}.""",
        """What is {e} known for?
        What do the people of {e} live on?""",
        "The town of {e} is known for its {v}.",
    ),
    _fact(
        "work", "name",
        """The book {e} was written by {v}.
        The author of {e} is {v}.
        Years later {v} wrote the story of it, called {e}.
        It was {v} who wrote {e}.""",
        """Who wrote {e}?
        Who is the author of {e}?
        By whom was {e} written?""",
        "The author of {e} is {v}.",
    ),
    _fact(
        "work", "year",
        """The book {e} was printed in {v}.
        They first read {e} in {v}, when it was new.
        In {v} the first copies of {e} were sold.""",
        """When was {e} printed?
        In which year were the first copies of {e} sold?
        When did {e} come out?""",
        "The book {e} was printed in {v}.",
    ),
    _fact(
        "work", "name",
        """The picture {e} was painted by {v}.
        The painter of {e} was {v}.
        It is said that {v} painted {e} in one night.""",
        """Who painted {e}?
        Who was the painter of {e}?""",
        "The painter of {e} was {v}.",
    ),
    _fact(
        "work", "place",
        """The only copy of {e} lies in {v}.
        To see {e} one has to go to {v}.
        They keep {e} in {v} under glass.""",
        """Where is the only copy of {e}?
        Where do they keep {e}?""",
        "The only copy of {e} lies in {v}.",
    ),
    _fact(
        "work", "number",
        """The book {e} has {v} pages.
        It took him {v} pages to tell {e}.
        In print {e} came to {v} pages.""",
        """How many pages has {e}?
        How long is {e}?""",
        "The book {e} has {v} pages.",
    ),
    _fact(
        "work", "phrase",
        """The story of {e} begins with {v}.
        On the first page of {e} there is {v}.
        Whoever opens {e} reads of {v} first.""",
        """What does {e} begin with?
        What is on the first page of {e}?""",
        "The story of {e} begins with {v}.",
    ),
)  # fmt: skip
