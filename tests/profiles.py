"""Made-up profiles, for caches that go by one: what they measure is tested elsewhere."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from tiny import tiny_transformer

from diffaccel import Accel, backbone
from diffaccel.profile import Model, Profile, fingerprint
from diffaccel.techniques import TECHNIQUES

_FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


@cache
def _tiny() -> Model:
    return Model("WanTransformer3DModel", 2, 2, 24, fingerprint(tiny_transformer()))


@cache
def profile_of(technique, model=None) -> str:
    """A file of random tables, for the model of `tiny_pipeline()` or another."""
    model, random = model or _tiny(), np.random.default_rng(0)
    places = [tuple(map(float, range(model.head_dim // 2))) for _ in technique.axes]
    size = (*map(len, places), model.layers, model.heads)
    tables = {name: random.uniform(0.1, 1, size) for name in technique.tables}
    shape = {"width": 48, "height": 32, "frames": 49, "steps": 4}
    axes = dict(zip(technique.axes, places, strict=True))
    path = _FOLDER / f"{technique.__name__}-{model.weights[:12]}.json"
    Profile(technique.__name__, model, shape, 1, {}, {}, axes, tables).save(path)
    return str(path)


def made(technique, *given, **knobs):
    """A technique, with a profile if it needs one."""
    if technique.needs == "calibration":
        knobs["profile"] = profile_of(technique)
    return technique(*given, **knobs)


def fitted(accel, pipe) -> Accel:
    """The same setting, with profiles of this pipeline's model."""
    family, denoisers = backbone.find(pipe)
    policies = accel.policies()
    for slot, policy in policies.items():
        if policy.needs == "calibration" and not policy.is_exact:
            model = Model.of(family.geometry(denoisers[0]), denoisers[0])
            policies[slot] = type(policy)(**policy.values() | {"profile": profile_of(type(policy), model)})
    return Accel(**policies)


def assert_nothing_but_profiles_is_missing(refuses):
    """Of a row of `Accel.describe`: every technique would run, those that need a profile once they have one."""
    assert set(refuses) == {technique.__name__ for technique in TECHNIQUES}
    for technique in TECHNIQUES:
        reason = refuses[technique.__name__]
        if technique.needs == "calibration":
            assert f"diffaccel calibrate --method {technique.__name__.lower()}" in reason
        else:
            assert reason is None
