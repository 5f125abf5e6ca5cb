"""Prompts that say all a scene shows, in many wordings, and the word-level tokenizer for them."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .world import BACKGROUNDS, COLORS, HALF_WAY, PATTERNS, SHAPES, SWITCHES, VECTORS, Scene, Sprite

MAX_WORDS = 47
CONTEXT = 512

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"

_GLUE = (
    "a the of on over in front against across and then later while it that which where is we see video scene "
    "to back away half way moves travels slides drifts glides goes upward downward circles around bounces "
    "stays still static stands place not does slowly gently quickly fast small little large big banded shaded "
    "leaves comes returns frame out view passes behind turns changes becomes color from camera pans panning "
    "background backdrop solid stripes pattern smooth with move"
)

# Read as the word on the right, by the tokenizer itself.
ALIASES = {
    "grey": "gray",
    "colour": "color",
    "tiny": "small",
    "rapidly": "quickly",
    "moving": "moves",
    "sliding": "moves",
    "drifting": "moves",
    "gliding": "moves",
    "heading": "moves",
    "heads": "moves",
    "traveling": "moves",
    "bouncing": "bounces",
    "circling": "circles",
    "checkered": "checkerboard",
    "disc": "circle",
    "disk": "circle",
    "box": "square",
    "plus": "cross",
    "upwards": "upward",
    "downwards": "downward",
    "leftward": "left",
    "rightward": "right",
    "fixed": "static",
    "leaving": "leaves",
    "returning": "returns",
    "passing": "passes",
    "turning": "turns",
    "becoming": "becomes",
    "changing": "changes",
    "stripy": "striped",
}

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys([PAD, EOS, UNK, *SHAPES, *COLORS, *BACKGROUNDS, *PATTERNS, *VECTORS, *_GLUE.split()])
)


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _noun(sprite: Sprite, rng: random.Random) -> str:
    size = sprite.size
    if rng.random() < 0.2:
        size = {"small": "little", "large": "big"}[size]
    texture = "" if sprite.texture == "plain" else f"{sprite.texture} "
    return _a(f"{size} {texture}{sprite.color} {sprite.shape}")


def _with_speed(verb: str, rest: str, sprite: Sprite, rng: random.Random) -> str:
    """The verb and its direction, with the adverb before, after, or (now and then) left out."""
    adverb = sprite.speed
    if rng.random() < 0.2:
        adverb = {"slowly": "gently", "quickly": "fast"}[adverb]
    form = rng.random()
    if form < 0.4:
        return f"{verb} {rest} {adverb}".replace("  ", " ")
    if form < 0.7 and adverb != "fast":
        return f"{adverb} {verb} {rest}".strip()
    return f"{verb} {rest}".strip()


def _motion(sprite: Sprite, rng: random.Random) -> str:
    verb = rng.choice(("moves", "moves", "moves", "travels", "slides", "drifts", "glides", "goes"))
    if sprite.motion in ("left", "right"):
        rest = rng.choice((sprite.motion, sprite.motion, f"to the {sprite.motion}"))
        return _with_speed(verb, rest, sprite, rng)
    if sprite.motion in ("up", "down"):
        rest = rng.choice((sprite.motion, sprite.motion, f"{sprite.motion}ward"))
        return _with_speed(verb, rest, sprite, rng)
    if sprite.motion == "circles":
        verb, rest = rng.choice((("circles", ""), ("circles", "around"), ("moves", "in a circle")))
        return _with_speed(verb, rest, sprite, rng)
    if sprite.motion == "bounces":
        verb, rest = rng.choice((("bounces", ""), ("bounces", "up and down")))
        return _with_speed(verb, rest, sprite, rng)
    return rng.choice(("stays still", "stays still", "does not move", "stands still", "stays in place", "is still"))


def _clauses(scene: Scene, rng: random.Random) -> list[str]:
    """One clause per sprite, "a large red circle moves left"; an occluder is named by what passes behind it."""
    clauses = []
    for index, sprite in enumerate(scene.sprites):
        noun = _noun(sprite, rng)
        if rng.random() < 0.1:
            noun += rng.choice((" that", " which"))
        if scene.event == "behind" and index == 1:
            continue
        if scene.event == "return" and index == 0:
            side = scene.event_side
            action = rng.choice(
                (
                    f"leaves on the {side} and comes back",
                    f"leaves the frame on the {side} and later comes back",
                    f"moves out of view to the {side} and then returns",
                    f"leaves to the {side} and then returns",
                )
            )
        elif scene.event == "behind" and index == 0:
            front = _noun(scene.sprites[1], rng)
            action = rng.choice(
                (
                    f"{_motion(sprite, rng)} behind {front}",
                    f"{_motion(sprite, rng)} and passes behind {front}",
                    f"passes behind {front} while it {_motion(sprite, rng)}",
                )
            )
            if rng.random() < 0.3:
                action += " that stays still"
        else:
            action = _motion(sprite, rng)
        if scene.event == "recolor" and index == 0:
            new = scene.event_color
            action += rng.choice(
                (
                    f" and turns {new} half way",
                    f" and changes from {sprite.color} to {new}",
                    f" and then becomes {new}",
                    f" and changes color to {new} half way",
                )
            )
        if scene.event == "turn" and index == 0:
            action += rng.choice((f" and then {scene.event_motion}", f" and turns {scene.event_motion} half way"))
        clauses.append(f"{noun} {action}")
    return clauses


def _background(scene: Scene, rng: random.Random) -> str:
    color = scene.background
    word = rng.choice(("background", "background", "backdrop"))
    forms = {
        "plain": (f"plain {color} {word}", f"{color} {word}", f"solid {color} {word}"),
        "gradient": (f"{color} gradient", f"{color} gradient {word}", f"smooth {color} gradient"),
        "striped": (f"striped {color} {word}", f"{color} striped {word}", f"{color} {word} with stripes"),
        "checkerboard": (
            f"{color} checkerboard",
            f"{color} checkerboard {word}",
            f"{color} checkerboard pattern",
        ),
    }
    return _a(rng.choice(forms[scene.pattern]))


def _camera(scene: Scene, rng: random.Random) -> str:
    """A clause about the camera; an unmentioned camera is static."""
    if scene.event == "pan_return":
        side = scene.event_side
        return rng.choice(
            (
                f"the camera pans {side} and returns",
                f"the camera pans away to the {side} and then comes back",
                f"the camera pans {side} and then pans back",
            )
            if side in ("left", "right")
            else (f"the camera pans {side} and returns", f"the camera pans {side} and then comes back")
        )
    if scene.camera == "static":
        if rng.random() < 0.45:
            return ""
        return rng.choice(("the camera is static", "the camera does not move", "the camera stays still"))
    side = scene.camera
    options = [f"the camera pans {side}", f"the camera pans {side}", f"the camera is panning {side}"]
    if side in ("left", "right"):
        options.append(f"the camera pans to the {side}")
    return rng.choice(options)


def describe(scene: Scene, rng: random.Random) -> str:
    """One wording of a scene, 10 to 45 words."""
    clauses, background, camera = _clauses(scene, rng), _background(scene, rng), _camera(scene, rng)
    rng.shuffle(clauses)
    joint = rng.choice((" and ", ", ", " while ", ". "))
    action = joint.join(clauses) if len(clauses) < 3 else f"{clauses[0]}, {clauses[1]}{joint}{clauses[2]}"
    over = rng.choice(("over", "over", "on", "against", "in front of", "across"))
    opening = rng.choice(("", "", "", "a video where ", "a scene in which ", "we see that "))
    form = rng.random()
    if form < 0.55:
        text = f"{opening}{action} {over} {background}"
    elif form < 0.75:
        text = f"{over} {background}, {action}"
    else:
        text = f"{opening}{action}. the background is {background}"
    if camera:
        tail = rng.random()
        text = f"{camera}. {text}" if tail < 0.15 else f"{text}{' while ' if tail < 0.3 else '. '}{camera}"
    return text


def describe_twice(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Prompts for before and from the scene's change on; where nothing changes, one and the same.

    A change half way is told by one prompt half the time.
    """
    if scene.event in SWITCHES and (scene.event_frame not in HALF_WAY or rng.random() < 0.5):
        return describe(scene.before(), rng), describe(scene.after(), rng)
    text = describe(scene, rng)
    return text, text


def normalize(text: str) -> list[str]:
    """The words the tokenizer sees."""
    return [ALIASES.get(word, word) for word in re.sub(r"[^a-z0-9]+", " ", text.lower()).split()]


def unknown_words(text: str, vocabulary: Iterable[str] = VOCABULARY) -> list[str]:
    """Words of a prompt that the model has never read."""
    known = set(vocabulary)
    return [word for word in normalize(text) if word not in known]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words, punctuation dropped, `</s>` appended; unknown words map to `<unk>`."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNK))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z0-9]+"), " "),
            *(normalizers.Replace(Regex(rf"\b{word}\b"), known) for word, known in ALIASES.items()),
            normalizers.Strip(),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=CONTEXT,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer under the class name that every transformers release knows."""
    import json

    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode_words(text: str, length: int = MAX_WORDS + 1) -> list[int]:
    """Token ids with `</s>`, padded to `length`; the same ids as the tokenizer, without its overhead."""
    ids = [*(_IDS.get(word, 2) for word in normalize(text)), 1]
    ids = ids if len(ids) <= length else [*ids[: length - 1], 1]
    return ids + [0] * (length - len(ids))


_IDS = {word: i for i, word in enumerate(VOCABULARY)}
