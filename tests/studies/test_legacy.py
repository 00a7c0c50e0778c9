"""The original experiment's networks against what its own code computed with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsd.types import Observation, RsdError
from studies.command import run_study
from studies.config import LegacyConfig
from studies.legacy import (
    Autoencoder,
    LegacyDecoder,
    LegacyPolicy,
    import_legacy,
    prompt_features,
    read_autoencoder,
    read_draft,
    read_head,
)

FIXTURES = dict(np.load(Path(__file__).parent.parent / "fixtures" / "openvla" / "legacy.npz"))
PARTS = ("autoencoder", "draft", "conditioned", "head")


def weights(part: str) -> dict[str, torch.Tensor]:
    prefix = part + "/"
    return {name[len(prefix) :]: torch.from_numpy(value) for name, value in FIXTURES.items() if name.startswith(prefix)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """As the experiment saves them: under model_state_dict with settings and an optimiser; bare for the head."""
    paths = {part: tmp_path / f"{part}.pt" for part in PARTS}
    for part, path in paths.items():
        whole = {"model_state_dict": weights(part), "val_accuracy": 0.943, "optimizer_state_dict": {"state": {}}}
        torch.save(weights(part) if part == "head" else whole, path)
    return paths


def with_layernorm(path: Path, value: bool) -> Path:
    torch.save({"model_state_dict": weights("autoencoder"), "config": {"use_layernorm": value}}, path)
    return path


@torch.inference_mode()
def test_draft_and_heads_compute_what_the_original_code_does(files: dict[str, Path]) -> None:
    features = torch.from_numpy(FIXTURES["features"])
    draft = read_draft(files["draft"])(features)
    assert draft.shape == (2, 3, 128, 7)
    np.testing.assert_allclose(draft[:, :, ::8].numpy(), FIXTURES["draft_logits"], atol=1e-5)
    head = read_head(files["head"])(features)
    assert head.shape == (2, 8, 128, 7)
    np.testing.assert_allclose(head[:, :, ::8].numpy(), FIXTURES["head_logits"], atol=1e-5)
    conditioned = read_head(files["conditioned"])(features, draft.argmax(-1))
    np.testing.assert_allclose(conditioned[:, :, ::8].numpy(), FIXTURES["conditioned_logits"], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("layernorm", [True, False])
def test_the_autoencoder_quantises_as_the_original_does(files: dict[str, Path], layernorm: bool) -> None:
    model = read_autoencoder(files["autoencoder"], layernorm)
    actions = torch.from_numpy(FIXTURES["actions"])
    tokens, latent, _ = model.quantise(actions)
    codes = torch.from_numpy(FIXTURES[f"codes_{layernorm}"]).long()  # [N, H, 16, L]
    assert torch.equal(tokens, codes.flatten(1, 2).transpose(1, 2))
    np.testing.assert_allclose(model.decoder(latent).numpy(), FIXTURES[f"recon_{layernorm}"], atol=1e-5)
    if not layernorm:
        np.testing.assert_allclose(model.decode(tokens).numpy(), FIXTURES["decoded_False"], atol=1e-5)
        np.testing.assert_allclose(FIXTURES["decoded_False"], FIXTURES["recon_False"], atol=1e-5)


def test_static_scales_decode_what_the_original_could_not(files: dict[str, Path]) -> None:
    """The latent is what tokens stand for; the original decoder ignores the statistics it normalised with."""
    model = read_autoencoder(files["autoencoder"], layernorm=True)
    actions = torch.from_numpy(FIXTURES["actions"])
    tokens, latent, _ = model.quantise(actions)
    with pytest.raises(RsdError, match=r"per-sample LayerNorm.*--calibration"):
        model.decode(tokens)
    report = model.calibrate(actions)
    original = np.square(FIXTURES["decoded_True"] - FIXTURES["recon_True"]).mean()
    static = float((model.decode(tokens) - model.decoder(latent)).square().mean())
    assert static < 0.1 * original
    assert report["mse_static_scales"] == pytest.approx(float((model.decode(tokens) - actions).square().mean()))


def test_the_first_kind_of_draft_makes_no_chunk(tmp_path: Path, files: dict[str, Path]) -> None:
    made = {"input_proj": torch.nn.Linear(24, 16), "output_proj": torch.nn.Linear(16, 8 * 7)}
    torch.save({"model_state_dict": torch.nn.ModuleDict(made).state_dict()}, files["draft"])
    for head, draft in ((files["draft"], None), (files["head"], files["draft"])):
        config = LegacyConfig(files["autoencoder"], head, draft, layernorm=False, output=tmp_path / "out")
        with pytest.raises(RsdError, match=r"draft.pt: predicts one symbol for each of 8 levels.*no action"):
            import_legacy(config)
    assert not (tmp_path / "out").exists()


def test_files_of_two_experiments_do_not_make_a_decoder(files: dict[str, Path]) -> None:
    wide = weights("draft")
    wide["input_projection.weight"] = torch.nn.functional.pad(wide["input_projection.weight"], (0, 8))
    torch.save(wide, files["draft"])
    with pytest.raises(RsdError, match="features that the draft reads: expected 24, found 32"):
        LegacyDecoder(
            read_autoencoder(files["autoencoder"], False), read_head(files["head"]), read_draft(files["draft"])
        )


def test_differences_are_listed_key_by_key(files: dict[str, Path]) -> None:
    changed: dict[str, Any] = weights("head")
    changed["layer_heads.0.0.bias"] = torch.zeros(3)
    changed["surplus"] = torch.zeros(2)
    del changed["feature_proj.2.bias"]
    torch.save(changed, files["head"])
    with pytest.raises(RsdError, match="does not fit ChunkHead") as error:
        read_head(files["head"])
    for line in (
        r"layer_heads.0.0.bias: expected [8], found [3]",
        "surplus [2] is unknown",
        "feature_proj.2.bias is missing",
    ):
        assert line in str(error.value)
    torch.save({"model": object()}, files["head"])
    with pytest.raises(RsdError, match="not readable without unpickling"):
        read_head(files["head"])
    for read, what in ((read_draft, "draft"), (read_head, "head")):
        with pytest.raises(RsdError, match=f"no {what}"):
            read(files["autoencoder"])
    with pytest.raises(RsdError, match="does not say whether it was trained with LayerNorm"):
        read_autoencoder(files["autoencoder"])
    with pytest.raises(RsdError, match="says use_layernorm True, but False"):
        read_autoencoder(with_layernorm(files["autoencoder"], True), False)


def test_the_command_writes_a_checkpoint_that_decodes_the_same(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with_layernorm(files["autoencoder"], True)
    chunks, output = tmp_path / "chunks.npy", tmp_path / "imported"
    np.save(chunks, FIXTURES["actions"])
    command = ["--autoencoder", str(files["autoencoder"]), "--head", str(files["conditioned"])]
    assert run_study("legacy", [*command, "--output", str(output)]) == 2
    assert "Give --calibration" in capsys.readouterr().err
    command += ["--calibration", str(chunks), "--output", str(output)]
    assert run_study("legacy", command) == 2
    assert "a draft file is needed" in capsys.readouterr().err
    assert run_study("legacy", [*command, "--draft", str(files["draft"])]) == 0
    assert "mse_static_scales" in capsys.readouterr().out

    decoder = LegacyDecoder.from_pretrained(output)
    features = torch.from_numpy(FIXTURES["features"])
    actions, stats = decoder.decode(features)
    assert actions.shape == (2, 8, 7)
    assert stats.num_draft_tokens == [128] * 3
    autoencoder = read_autoencoder(files["autoencoder"])
    autoencoder.calibrate(torch.from_numpy(FIXTURES["actions"]))
    head, draft = read_head(files["conditioned"]), read_draft(files["draft"])
    again, _ = LegacyDecoder(autoencoder, head, draft).decode(features)
    torch.testing.assert_close(actions, again)
    with pytest.raises(RsdError, match="this code has no margins"):
        LegacyDecoder.from_pretrained(output, acceptance="margin")


@torch.inference_mode()
def test_agreement_decides_level_by_level(files: dict[str, Path]) -> None:
    autoencoder = read_autoencoder(files["autoencoder"], False)
    head, draft = read_head(files["head"]), read_draft(files["draft"])
    features = torch.from_numpy(FIXTURES["features"])
    drafted, own = draft(features).argmax(-1), head(features).argmax(-1)
    share = float((drafted[0, 0] == own[0, 0]).float().mean())
    assert 0.0 < share < 1.0
    for rule, kept in ((f"agreement({max(share - 0.01, 0.001):.4f})", 1), (f"agreement({share + 0.01:.4f})", 0)):
        decoder = LegacyDecoder(autoencoder, head, draft, rule)
        actions, stats = decoder.decode(features[:1])
        assert (stats.accepted_levels >= 1) == (kept == 1)
        tokens = own[:1].clone()
        tokens[:, : stats.accepted_levels] = drafted[:1, : stats.accepted_levels]
        torch.testing.assert_close(actions, autoencoder.decode(tokens))


def test_an_imported_head_runs_on_openvla_and_must_fit_it(tmp_path: Path, files: dict[str, Path]) -> None:
    from openvla_checkpoint import write_checkpoint
    from rsd.targets.openvla.policy import OpenVlaPolicy

    policy = OpenVlaPolicy.from_pretrained(write_checkpoint(tmp_path / "openvla"))
    autoencoder = read_autoencoder(files["autoencoder"], False)
    assert isinstance(autoencoder, Autoencoder)
    head = read_head(files["head"])
    with pytest.raises(RsdError, match="reads features of 24 numbers, this OpenVLA has 32"):
        LegacyPolicy(policy, LegacyDecoder(autoencoder, head, None))

    wide = weights("head")
    wide["feature_proj.0.weight"] = torch.nn.functional.pad(wide["feature_proj.0.weight"], (0, 8))
    torch.save(wide, files["head"])
    decoder = LegacyDecoder(autoencoder, read_head(files["head"]), None)
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    observation = Observation(images, np.zeros(8, np.float32), "pick up the bowl")
    chunk = LegacyPolicy(policy, decoder).predict(observation)
    expected, _ = decoder.decode(prompt_features(policy, observation))
    np.testing.assert_allclose(chunk.actions, expected[0].clamp(-1, 1).numpy(), atol=1e-6)
    assert (chunk.stats.decode, chunk.stats.acceptance) == ("legacy", "")
