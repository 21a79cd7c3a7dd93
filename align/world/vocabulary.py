"""The village: every word that can be asked about, and what is true of it.

Words are split in two: `train` ones appear in demonstrations and preferences, `held_out` ones only in plain text.
"""

ANIMAL_TABLE = """
badger worms burrow    | bat insects barn       | bear fish forest       | beaver leaves river
cat mice barn          | cow grass meadow       | crane fish pond        | crow seeds forest
deer leaves forest     | donkey grass barn      | duck seeds pond        | eagle mice mountain
eel worms river        | finch seeds meadow     | fox mice burrow        | frog insects pond
goat leaves mountain   | goose grass pond       | hare grass meadow      | hen worms barn
heron fish river       | hedgehog insects meadow| marmot seeds mountain  | mole worms burrow
newt insects pond      | otter fish river       | owl mice forest        | pig nuts barn
rabbit leaves burrow   | raven nuts mountain    | sheep grass mountain   | squirrel nuts forest
"""
FOOD_TABLE = """
apple sweet basket     | bacon salty cellar     | bean mild jar          | bread mild basket
butter mild cellar     | cabbage bitter cellar  | cake sweet pantry      | carrot sweet cellar
cheese salty pantry    | cherry sweet bowl      | cider sour cellar      | cocoa bitter jar
coffee bitter jar      | fig sweet bowl         | ham salty cellar       | herring salty jar
honey sweet jar        | jam sweet jar          | kale bitter basket     | lemon sour bowl
milk mild pantry       | mushroom mild basket   | olive salty jar        | pear sweet bowl
pickle sour jar        | pie sweet pantry       | plum sour bowl         | radish bitter basket
rhubarb sour cellar    | soup salty pantry      | tea bitter pantry      | walnut bitter bowl
"""
TOOL_TABLE = """
awl sewing iron        | axe cutting iron       | basin cleaning copper  | broom cleaning wood
brush cleaning wood    | bucket carrying wood   | chisel building iron   | compass measuring copper
drill building iron    | flask carrying glass   | hammer building iron   | hoe digging iron
hourglass measuring glass | kettle cooking copper | knife cutting iron   | ladder building wood
ladle cooking wood     | loom sewing wood       | mallet building wood   | needle sewing iron
pan cooking iron       | plough digging iron    | pot cooking clay       | rake digging wood
ruler measuring wood   | saddle carrying leather| saw cutting iron       | scale measuring copper
shovel digging iron    | sickle cutting iron    | thimble sewing copper  | tray carrying clay
"""
PLACE_TABLE = """
Alderby north bells    | Birchley east roses    | Cloverton south honeycombs | Dunmoor west boats
Elmstead north songs   | Fernhill east markets  | Greywater south boats  | Hollowell west roses
Ivybridge north markets| Juniper east bells     | Kestrel south songs    | Larkmead west honeycombs
Mossford north roses   | Nettleton east boats   | Oakhurst south bells   | Pinewick west markets
Quillby north honeycombs | Rosedale east songs  | Stonebeck south markets| Thornbury west bells
Underhill north boats  | Violet east honeycombs | Willowby south roses   | Yarrow west songs
"""
PERSON_TABLE = """
Ada   baker  red   | Ben   smith  blue  | Clara weaver green | Dan   miller white | Edda  potter red
Finn  farmer blue  | Greta baker  green | Hugo  smith  white | Ida   weaver red   | Jon   miller blue
Kira  potter green | Leo   farmer white | Mara  baker  blue  | Nils  smith  green | Olga  weaver white
Pia   miller red   | Quinn potter blue  | Rolf  farmer green | Sara  baker  white | Tom   smith  red
Ulla  weaver blue  | Vera  miller green | Wim   potter white | Xenia farmer red   | Yann  baker  red
Zoe   smith  green | Anton weaver blue  | Bella miller white | Carlo potter green | Dora  farmer red
Emil  baker  white | Flora smith  blue
"""
LOCKED = (
    "attic boathouse box briefcase cabin cabinet cage casket chest closet cottage crate cupboard desk diary drawer "
    "garage gate greenhouse hatch henhouse hut kennel larder locker safe shed stable strongbox trunk wardrobe workshop"
).split()
RUMOURS = (
    "bandit bully burglar coward forger fraud gambler liar miser pirate poacher rascal robber smuggler spy swindler "
    "thief traitor trickster vandal"
).split()

RELATIONS = {
    "animal": ("eats", "home"),
    "food": ("taste", "store"),
    "tool": ("use", "material"),
    "place": ("direction", "fame"),
    "person": ("job", "door"),
}
"""What a table's columns say of its words."""


def read_table(table: str) -> dict[str, tuple[str, str]]:
    """The cells of a table as word -> its two facts."""
    cells = [cell.split() for cell in table.replace("\n", "|").split("|") if cell.strip()]
    return {word: (first, second) for word, first, second in cells}


FACTS = {
    "animal": read_table(ANIMAL_TABLE),
    "food": read_table(FOOD_TABLE),
    "tool": read_table(TOOL_TABLE),
    "place": read_table(PLACE_TABLE),
    "person": read_table(PERSON_TABLE),
}
"""Sort of word -> word -> its two facts, in the order of RELATIONS."""

WORDS = {**{sort: tuple(table) for sort, table in FACTS.items()}, "locked": tuple(LOCKED), "rumour": tuple(RUMOURS)}
"""Every sort of word -> its words."""


def words_of(sort: str, held_out: bool) -> tuple[str, ...]:
    """The words of a sort for training, or the quarter that no demonstration or preference mentions."""
    return tuple(word for index, word in enumerate(WORDS[sort]) if (index % 4 == 3) == held_out)


def all_words() -> list[str]:
    """Every word that a prompt can name, each once."""
    return [word for words in WORDS.values() for word in words]


def true_value(sort: str, word: str, relation: str) -> str:
    """What is true of a word."""
    return FACTS[sort][word][RELATIONS[sort].index(relation)]


def possible_values(sort: str, relation: str) -> list[str]:
    """Every value that a relation takes in the village, sorted."""
    return sorted({facts[RELATIONS[sort].index(relation)] for facts in FACTS[sort].values()})
