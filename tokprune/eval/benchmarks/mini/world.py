"""What a scene can hold: kinds of objects, colours, sizes, characters."""

from __future__ import annotations

#: pixels of an image's side, of a patch, and patches per side (24 × 24 = 576)
SIDE, PATCH = 192, 8
GRID = SIDE // PATCH

#: drawn shapes, each in any of the colours
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLORS = {
    "red": (222, 38, 38),
    "green": (36, 158, 58),
    "blue": (40, 84, 226),
    "yellow": (246, 214, 32),
    "purple": (146, 48, 190),
    "orange": (246, 134, 22),
    "white": (250, 250, 250),
    "black": (14, 14, 14),
}

#: sprites with a name, and the code point of the emoji they come from
SPRITES = {
    "cat": 0x1F431,
    "dog": 0x1F436,
    "fish": 0x1F420,
    "frog": 0x1F438,
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "tree": 0x1F332,
    "car": 0x1F697,
    "house": 0x1F3E0,
    "key": 0x1F511,
    "ball": 0x26BD,
    "bell": 0x1F514,
    "clock": 0x23F0,
    "cup": 0x2615,
    "mushroom": 0x1F344,
    "book": 0x1F4D7,
}

#: sprites that no question names: they only get in the way
DISTRACTORS = (
    0x1F41D, 0x1F98B, 0x1F419, 0x1F427, 0x1F347, 0x1F351, 0x1F955, 0x1F354, 0x1F366, 0x1F381,
    0x1F388, 0x1F3B8, 0x1F680, 0x1F6B2, 0x2602, 0x1F335, 0x1F33B, 0x1F30D, 0x1F48E, 0x1F526,
    0x1F3A9, 0x1F45F, 0x1F9F8, 0x1F511 + 1,
)  # fmt: skip

KINDS = (*SHAPES, *SPRITES)

#: name → patches per side; smaller objects are 12 to 16 pixels across
SIZES = {"small": 2, "medium": 3, "large": 4}

#: plates carry dark text on a light ground; no two plates of a scene share a colour
PLATES = {
    "red": (255, 170, 166),
    "green": (172, 236, 168),
    "blue": (168, 200, 255),
    "yellow": (255, 244, 150),
    "purple": (226, 180, 250),
    "orange": (255, 208, 142),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS
#: patches per side of a character cell
CELL = 2

_WORDS = """
    is there a an the ? , what color shape number word written on plate shown how many are shapes
    which larger or where above below left right of top bottom yes no user assistant :
"""
#: every word that a question or an answer can hold, plate texts aside
WORDS = tuple(dict.fromkeys([*_WORDS.split(), *KINDS, *COLORS, *PLATES]))
