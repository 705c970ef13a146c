import pytest
import torch

from mixgf import artifacts, checkpoint, config, storage
from mixgf.config import UserError
from mixgf.model import MaskedModel

ROW = config.Model(num_layers=1, dim=8, num_heads=2, ffn_dim=8, max_positions=8)


def trained(steps=2, seed=0):
    model = MaskedModel(ROW, 10, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()
    return model, optimizer


def test_weights_and_moments_come_back_bit_identical(tmp_path):
    model, optimizer = trained()
    checkpoint.save_step(str(tmp_path), 2, model, optimizer, {"identity": "a"})
    other, fresh = trained(steps=0, seed=1)
    state = checkpoint.load_step(str(tmp_path), other, fresh)
    assert state == checkpoint.State(2, {"identity": "a"})
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]), key


def test_without_a_checkpoint_there_is_no_state(tmp_path):
    assert checkpoint.load_step(str(tmp_path), *trained(0)) is None


def test_a_checkpoint_without_its_state_does_not_count(tmp_path):
    model, optimizer = trained()
    checkpoint.save_step(str(tmp_path), 2, model, optimizer, {})
    folder = checkpoint.save_step(str(tmp_path), 4, model, optimizer, {})
    storage.remove(f"{folder}/state.json")
    assert checkpoint.complete_steps(str(tmp_path)) == [2]
    assert checkpoint.load_step(str(tmp_path), model, optimizer).step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_an_unreadable_checkpoint_is_an_error_and_never_a_fresh_start(tmp_path, name, damage):
    model, optimizer = trained()
    folder = checkpoint.save_step(str(tmp_path), 2, model, optimizer, {})
    data = bytearray(storage.read_bytes(f"{folder}/{name}"))
    data = data[: len(data) // 2] if damage == "cut" else bytes(x ^ 1 for x in data)
    storage.write_bytes(f"{folder}/{name}", bytes(data))
    with pytest.raises(UserError, match=rf"{name}: .*Restore it, or remove the folder .*/00000002"):
        checkpoint.load_step(str(tmp_path), model, optimizer)


def test_a_missing_file_of_a_complete_checkpoint_is_an_error(tmp_path):
    model, optimizer = trained()
    folder = checkpoint.save_step(str(tmp_path), 2, model, optimizer, {})
    storage.remove(f"{folder}/model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors.*Restore it"):
        checkpoint.load_step(str(tmp_path), model, optimizer)


def test_weights_of_another_model_are_refused(tmp_path):
    model, optimizer = trained()
    checkpoint.save_step(str(tmp_path), 2, model, optimizer, {})
    other = MaskedModel(ROW, 11)
    with pytest.raises(UserError, match=r"another model .*encoder.tokens \(10, 8\) instead of \(11, 8\)"):
        checkpoint.load_step(str(tmp_path), other, torch.optim.AdamW(other.parameters()))


def test_pruning_keeps_the_latest(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        checkpoint.save_step(str(tmp_path), step, model, optimizer, {})
    checkpoint.prune(str(tmp_path), 2)
    assert storage.list_dir(f"{tmp_path}/steps") == ["00000002", "00000003"]


def test_a_published_model_is_loaded_whole(tmp_path):
    uri, model = str(tmp_path / "pretrain"), trained()[0]
    record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {}, {})
    artifacts.begin(uri, record)
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.load_encoder(uri)
    checkpoint.publish(uri, record, model, vocabulary="abc", tokens=config.Tokens(), objective=config.Objective())
    encoder, found = checkpoint.load_encoder(uri)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), model.encoder.parameters(), strict=True))
    assert not encoder.training
    assert found.details["model"] == config.to_dict(ROW)
    checkpoint.require_vocabulary(found, "abc", "the corpus")
    with pytest.raises(UserError, match=r"inputs.checkpoint: made with vocabulary abc, but the corpus has other"):
        checkpoint.require_vocabulary(found, "other", "the corpus")
