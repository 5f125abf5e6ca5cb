"""Causal Wan as a block of modular diffusers: as `CausalWanPipeline`, beside stock blocks, saved and opened again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, SequentialPipelineBlocks
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep
from tiny import tiny_components, tiny_pipeline

from diffaccel import Accel, FlashBlock, KnobError, SinkRecent, TempCache, UnsupportedError
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.pipelines.modular import CausalWanBlocks, CausalWanDenoiseStep
from diffaccel.version import __version__

PROMPT, NEGATIVE = "a red circle moves left", "blue"
CALL = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 3}
LOSSY = Accel(cache=TempCache(0.3), reuse=FlashBlock(refresh=2))


def modular(blocks=None, **changes):
    pipe = (blocks or CausalWanBlocks()).init_pipeline()
    pipe.update_components(**{name: part for name, part in tiny_components().items() if name in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(**changes)
    return pipe


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def dense():
    return tiny_pipeline()(PROMPT, NEGATIVE, **CALL, generator=seeded(), output_type="latent").frames


def latents_of(pipe, **more):
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "generator": seeded()} | CALL | more
    return pipe(**call, output="latents")


def test_it_is_the_pipeline_bit_for_bit(dense):
    pipe = modular()
    state = pipe(prompt=PROMPT, negative_prompt=NEGATIVE, **CALL, generator=seeded())
    assert torch.equal(state.get("latents"), dense)
    assert state.get("report") is None
    frames = tiny_pipeline().decode_latents(dense, output_type="np")
    assert state.get("videos").shape == frames.shape == (1, 33, 32, 48, 3)
    assert abs(state.get("videos") - frames).max() < 1e-5  # the stock block decodes the whole video at once


@pytest.mark.parametrize("sampler", ["multistep", "few_step"])
def test_all_it_passes_on(sampler):
    more = {"sampler": sampler, "num_videos_per_prompt": 2, "frames_per_block": 2, "num_inference_steps": 2}
    stock = tiny_pipeline()(PROMPT, NEGATIVE, **CALL | more, generator=seeded(), output_type="latent").frames
    assert torch.equal(latents_of(modular(), **more), stock)
    guided = {"guidance_scale": 2.0, "image": torch.rand(3, 32, 48, generator=seeded())} | more
    stock = tiny_pipeline()(PROMPT, NEGATIVE, **CALL | guided, generator=seeded(), output_type="latent").frames
    assert torch.equal(latents_of(modular(), **guided), stock)


def test_guidance_is_the_guiders(dense):
    guider = ClassifierFreeGuidance(guidance_scale=2.0)
    stock = tiny_pipeline()(
        PROMPT, NEGATIVE, **CALL, guidance_scale=2.0, generator=seeded(), output_type="latent"
    ).frames
    assert not torch.equal(stock, dense)
    assert torch.equal(latents_of(modular(guider=guider)), stock)
    with pytest.raises(
        UnsupportedError, match=r"plain ClassifierFreeGuidance\(guidance_scale=\.\.\.\), got Classifier"
    ):
        latents_of(modular(guider=ClassifierFreeGuidance(guidance_rescale=0.5)))


def test_accelerated_by_its_input_by_a_preset_and_from_outside(dense):
    stock = tiny_pipeline()
    with LOSSY(stock):
        lossy = stock(PROMPT, NEGATIVE, **CALL, generator=seeded(), output_type="latent").frames
    assert not torch.equal(lossy, dense)

    pipe = modular()
    state = pipe(prompt=PROMPT, negative_prompt=NEGATIVE, **CALL, generator=seeded(), accel=LOSSY)
    assert torch.equal(state.get("latents"), lossy)
    assert state.get("report")["slots"]["cache"]["engaged"]
    assert torch.equal(latents_of(pipe), dense)  # it is left when the block is done

    with LOSSY(pipe) as run:
        assert torch.equal(latents_of(pipe), lossy)
    assert run.report().slots["reuse"].engaged

    named = latents_of(pipe, accel="exact")
    assert not torch.equal(named, dense)  # padding is one key, which rounds otherwise
    torch.testing.assert_close(named, dense, atol=1e-4, rtol=0)
    pipe.update_components(preset="exact")
    assert torch.equal(latents_of(pipe), named)
    assert torch.equal(latents_of(pipe, accel=Accel()), dense)
    with LOSSY(pipe):
        assert torch.equal(latents_of(pipe), lossy)
        with pytest.raises(UnsupportedError, match="is accelerated already"):
            latents_of(pipe, accel=Accel())


def test_stock_modular_wan_is_refused_what_needs_blocks():
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    pipe = WanBlocks().init_pipeline()
    pipe.update_components(transformer=tiny_components()["transformer"])
    with pytest.raises(UnsupportedError, match="generates the whole video at once"):
        LOSSY.apply(pipe)


def test_among_other_blocks_and_alone(dense):
    steps = {"text": WanTextEncoderStep(), "denoise": CausalWanDenoiseStep(), "decode": WanVaeDecoderStep()}
    nested = SequentialPipelineBlocks.from_blocks_dict(
        {"text": steps.pop("text"), "rest": SequentialPipelineBlocks.from_blocks_dict(steps)}
    )
    pipe = modular(nested)
    assert torch.equal(latents_of(pipe), dense)
    Accel(cache=SinkRecent()).apply(pipe).remove(check=False)  # it is block-causal, however deep the block

    text = modular(WanTextEncoderStep())(prompt=PROMPT, negative_prompt=NEGATIVE)
    alone = modular(CausalWanDenoiseStep())
    assert sorted(alone.component_names) == ["guider", "scheduler", "transformer"]
    embeds = {name: text.get(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert torch.equal(alone(**embeds, **CALL, generator=seeded(), output="latents"), dense)
    with pytest.raises(KnobError, match="guidance_scale=5 needs negative_prompt_embeds: take the stock block"):
        alone(prompt_embeds=embeds["prompt_embeds"], **CALL)


OPEN = """
import sys, torch
from diffusers import ModularPipeline
from diffaccel import Accel, FlashBlock, TempCache
folder, out = sys.argv[1:]
pipe = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.load_components()
pipe.set_progress_bar_config(disable=True)
call = dict(prompt="a red circle moves left", negative_prompt="blue", height=32, width=48, num_frames=33)
call |= dict(num_inference_steps=3, generator=torch.Generator().manual_seed(0))
latents = pipe(**call, output="latents")
call["generator"].manual_seed(0)
lossy = pipe(**call, accel=Accel(cache=TempCache(0.3), reuse=FlashBlock(refresh=2)), output=["latents", "report"])
assert lossy["report"]["slots"]["reuse"]["engaged"]
torch.save({"dense": latents, "lossy": lossy["latents"], "blocks": type(pipe.blocks).__name__}, out)
"""


def test_saved_it_opens_in_a_fresh_process_by_its_own_code(dense, tmp_path):
    pipe, folder = modular(), tmp_path / "published"
    pipe.update_components(frames_per_block=2)
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    pipe.blocks.save_pretrained(folder)
    config = json.loads((folder / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "modular.CausalWanBlocks"}
    assert config["requirements"] == {"diffaccel": f">={__version__}"}
    index = json.loads((folder / "modular_model_index.json").read_text())
    assert (index["frames_per_block"], index["sampler"], index["preset"]) == (2, "multistep", None)

    moved, out = tmp_path / "moved", tmp_path / "out.pt"
    folder.rename(moved)
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(moved), str(out)], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(out)
    stock = CausalWanPipeline(**tiny_components(), frames_per_block=2)
    stock.set_progress_bar_config(disable=True)
    with LOSSY(stock):
        lossy = stock(PROMPT, NEGATIVE, **CALL, generator=seeded(), output_type="latent").frames
    dense = stock(PROMPT, NEGATIVE, **CALL, generator=seeded(), output_type="latent").frames
    assert found["blocks"] == "CausalWanBlocks"
    assert torch.equal(found["dense"], dense)
    assert torch.equal(found["lossy"], lossy)
    assert list((tmp_path / "modules").rglob("modular.py"))  # the folder's own code was what ran


def test_it_opens_what_the_pipeline_saved(tmp_path):
    stock = CausalWanPipeline(**tiny_components(), frames_per_block=2, sampler="few_step")
    stock.save_pretrained(tmp_path)
    pipe = CausalWanBlocks().init_pipeline(str(tmp_path))
    pipe.load_components()
    frames = stock(PROMPT, **CALL, generator=seeded(), output_type="latent").frames
    assert torch.equal(latents_of(pipe), frames)


def test_the_block_alone_is_published_too(tmp_path):
    CausalWanDenoiseStep().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "modular.CausalWanDenoiseStep"}
    assert (tmp_path / "modular.py").is_file()
    assert "prompt_embeds" in CausalWanDenoiseStep().doc
