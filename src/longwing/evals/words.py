"""The words that generated documents are made of: labels, topics, and sentences about them.

None of the words of a label, and no topic, occurs in LongChat's cases, so that what was learnt from
those, or from a contamination by them, is of no help (a test holds it against its words). They are
everyday enough to be two or three tokens each.

Everything takes a `random.Random` and draws from nothing else.
"""

import random
from collections.abc import Iterator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words("""
    cobalt russet ochre umber sepia cerulean crimson scarlet vermilion indigo maroon turquoise teal
    ebony dun roan piebald dappled brindled mottled speckled striped chequered tartan plaid gilded
    enamelled lacquered varnished burnished tarnished pewter brazen silvern oaken beechen birchen
    flaxen hempen woollen quilted knitted crocheted woven plaited braided felted tufted fringed
    hemmed pleated embroidered marbled granite basalt chalky sandy loamy peaty mossy ferny heathery
    reedy rushy thorny brambly wooded alpine coastal estuarine tidal lowland upland northern
    southern eastern polar tropical boreal lunar solar stellar autumnal wintry vernal nocturnal
    hexagonal conical cylindrical spherical oblong concave convex tapered fluted ribbed grooved
    notched serrated scalloped crenate latticed arched vaulted domed gabled thatched tiled shingled
    whitewashed cobbled paved gravelled fenced walled moated
""")

_SECOND = _words("""
    whimbrel curlew lapwing dotterel avocet godwit sandpiper turnstone redshank greenshank dunlin
    phalarope skua kittiwake fulmar gannet petrel shearwater guillemot razorbill wigeon pintail
    shoveler pochard goosander merganser smew garganey eider scoter bittern egret spoonbill
    corncrake moorhen waterrail kestrel merlin goshawk harrier siskin linnet twite redpoll brambling
    hawfinch crossbill bunting fieldfare redwing wheatear whinchat stonechat redstart nightjar
    wryneck nuthatch treecreeper dunnock pipit wagtail yaffle jackdaw chough bilberry cloudberry
    hawthorn blackthorn hornbeam rowan aspen sallow osier spindle wayfaring juniper cypress yarrow
    tansy teasel mullein campion bugloss comfrey figwort ragwort knapweed scabious harebell
    speedwell stitchwort willowherb meadowsweet loosestrife bedstraw woodruff celandine marigold
    samphire sandwort saxifrage stonecrop houseleek gorse bracken polypody spleenwort adze bodkin
    gimlet spokeshave drawknife trivet skillet colander tureen decanter flagon tankard goblet
    thimble distaff bobbin quern
""")

_CRAFTS = """
the carving of;the mending of;the naming of;the storage of;the measuring of;the colouring of;
the packing of;the drying of;the collecting of;the drawing of;the weighing of;the polishing of
""".replace("\n", "").split(";")

_THINGS = """
wooden spoons;harbour buoys;church bells;weather vanes;garden gates;millstones;bee hives;sundials;
fishing nets;brass hinges;clay roof tiles;paper kites;wicker baskets;tide tables;rope bridges;
stone walls;lantern glass;canal locks;pocket watches;apple barrels;sledge runners;signal flags;
ink bottles;window shutters;cart wheels;beeswax candles;chimney pots;leather saddles;seed drawers;
copper kettles;mooring posts;hay rakes
""".replace("\n", "").split(";")

_ASKS = (
    "What should a beginner know before starting with that?",
    "How long does it usually take, and what can go wrong on the way?",
    "Which tools would you keep within reach, and which are never needed?",
    "Does the season make any difference to it?",
    "Is it cheaper to do this at home, or to find somebody who does it every day?",
    "How would you explain it to a child of ten?",
    "What did people do about it before there were machines?",
    "Where could I see a good example of it?",
    "How do I know when I am finished?",
    "Which mistake do you see most often?",
)

_ANSWERS = (
    "Start with a small piece and a dry day. Most of what goes wrong comes from haste, and the "
    "rest from a blunt edge, so set aside a whole afternoon and keep a whetstone near you.",
    "It depends on the size. A careful hand needs about two evenings, of which the first goes to "
    "cleaning and the second to the work that can be seen.",
    "A soft brush, a folding rule, and a lamp that can be moved. Everything else may be borrowed "
    "from a neighbour when the moment comes, and given back on the same day.",
    "Damp weather slows it down by a half. In a cold shed the material shrinks a little, and the "
    "joints that were tight in June will rattle by the new year.",
    "Doing it at home costs a few coins and a good deal of patience. Paying for it costs more, but "
    "the result is even, and somebody else sweeps the floor.",
    "I would put two of them side by side, one well made and one badly, and let the child find out "
    "which is which. Nothing that I could say would work as well.",
    "They did it by hand, in pairs, and usually out of doors. One held the light and the other one "
    "worked, and after an hour they changed places without a word.",
    "Any village of some age has one, behind the smithy or beside the well. Look for the place "
    "where the paint is worn, since that is where people have touched it.",
    "You are finished when you can walk away and come back and find nothing to change. That sounds "
    "easy, and it takes most people several years.",
    "They skip the second rinse. It seems to be a waste of water, and then a week later there is a "
    "white bloom on everything that cannot be rubbed off.",
)

_SCENES = (
    "The ferry came in late, and nobody on the quay seemed to mind.",
    "A cart with two empty churns stood in front of the dairy until noon.",
    "Somebody had chalked a row of figures on the door of the boathouse and rubbed them out again.",
    "The wind went round to the west, and the smoke of the kilns with it.",
    "In the reading room the clock had been stopped for repairs since the spring.",
    "Three boys carried a ladder across the square and leaned it against the wrong wall.",
    "The postman took the lower road, because the upper one was under water.",
    "At the second bend the path leaves the stream and climbs between hedges.",
    "The baker counted the trays twice, shrugged, and closed the shutter.",
    "There was frost on the rails that morning, and the first train slid past the platform.",
    "A dog slept across the step of the customs house, and everyone walked round it.",
    "The orchard beyond the wall had not been pruned for years, and bore heavily all the same.",
    "Towards evening the rain thinned out, and a few windows were opened.",
    "The lamps on the bridge were lit one after the other by a man with a long pole.",
    "Nothing was said about the broken oar, though all four of them had seen it.",
    "The mill had two wheels, of which only the smaller one still turned.",
    "They ate on the steps of the hall, out of paper, and threw the crusts to the gulls.",
    "Behind the third milestone the road is paved with the hulls of old barges.",
)

NUM_LABELS = len(_FIRST) * len(_SECOND)
"""Labels of two words; where more are needed they have three."""

TOPICS = tuple(f"{craft} {thing}" for thing in _THINGS for craft in _CRAFTS)
"""Every topic a generated conversation may be about, lower case."""


def vocabulary() -> frozenset[str]:
    """Every word that labels are made of."""
    return frozenset((*_FIRST, *_SECOND))


def labels(rng: random.Random, count: int) -> list[str]:
    """So many different labels, such as "mossy-curlew"."""
    if count <= NUM_LABELS // 2:
        return [_label(number) for number in rng.sample(range(NUM_LABELS), count)]
    numbers = rng.sample(range(NUM_LABELS * len(_SECOND)), count)
    return [f"{_label(n % NUM_LABELS)}-{_SECOND[n // NUM_LABELS]}" for n in numbers]


def turns(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions and answers of a conversation, without an end; no two the same in a row of ten."""
    while True:
        asks = rng.sample(_ASKS, len(_ASKS))
        answers = rng.sample(_ANSWERS, len(_ANSWERS))
        yield from zip(asks, answers, strict=True)


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of a quiet place, without an end, in which no number occurs in digits."""
    while True:
        yield from rng.sample(_SCENES, len(_SCENES))


def _label(number: int) -> str:
    return f"{_FIRST[number // len(_SECOND)]}-{_SECOND[number % len(_SECOND)]}"
