import threading
from dataclasses import replace

import pytest
import torch

from mixgf.config import parse, training
from mixgf.config.data import Tokens
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.storage import artifacts, files
from mixgf.training import checkpoints

ROW = training.Model(num_layers=1, dim=8, num_heads=2, ffn_dim=8, max_positions=8)


def trained(steps=2, seed=0):
    model = MaskedModel(ROW, 10, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()
    return model, optimizer


def test_weights_and_moments_come_back_bit_identical(tmp_path):
    model, optimizer = trained()
    checkpoints.save_step(str(tmp_path), 2, model, optimizer, {"identity": "a"})
    other, fresh = trained(steps=0, seed=1)
    state = checkpoints.load_step(str(tmp_path), other, fresh)
    assert state == checkpoints.State(2, {"identity": "a"})
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]), key


def test_without_a_checkpoint_there_is_no_state(tmp_path):
    assert checkpoints.load_step(str(tmp_path), *trained(0)) is None


def test_a_checkpoint_without_its_state_does_not_count(tmp_path):
    model, optimizer = trained()
    checkpoints.save_step(str(tmp_path), 2, model, optimizer, {})
    folder = checkpoints.save_step(str(tmp_path), 4, model, optimizer, {})
    files.remove(f"{folder}/state.json")
    assert checkpoints.complete_steps(str(tmp_path)) == [2]
    assert checkpoints.load_step(str(tmp_path), model, optimizer).step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_an_unreadable_checkpoint_is_an_error_and_never_a_fresh_start(tmp_path, name, damage):
    model, optimizer = trained()
    folder = checkpoints.save_step(str(tmp_path), 2, model, optimizer, {})
    data = bytearray(files.read_bytes(f"{folder}/{name}"))
    data = data[: len(data) // 2] if damage == "cut" else bytes(x ^ 1 for x in data)
    files.write_bytes(f"{folder}/{name}", bytes(data))
    with pytest.raises(UserError, match=rf"{name}: .*Restore it, or remove the folder .*/00000002"):
        checkpoints.load_step(str(tmp_path), model, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_of_a_number_is_an_error_and_never_another_number(tmp_path, name, where):
    model, optimizer = trained()
    folder = checkpoints.save_step(str(tmp_path), 2, model, optimizer, {})
    data = bytearray(files.read_bytes(f"{folder}/{name}"))
    head = 8 + int.from_bytes(data[:8], "little")
    data[{"first": head, "middle": (head + len(data)) // 2, "last": len(data) - 1}[where]] ^= 1
    files.write_bytes(f"{folder}/{name}", bytes(data))
    with pytest.raises(UserError, match=rf"{name}: .*Restore it, or remove the folder .*/00000002"):
        checkpoints.load_step(str(tmp_path), model, optimizer)
    if name == "model.safetensors":
        with pytest.raises(UserError, match=rf"{name}: .*Restore it"):
            checkpoints.load_step_weights(str(tmp_path), 2, model)


def test_training_goes_on_from_the_latest_of_several_checkpoints(tmp_path):
    for step in (9, 2, 10, 4):
        checkpoints.save_step(str(tmp_path), step, *trained(steps=step), {"of": step})
    model, optimizer = trained(steps=0)
    assert checkpoints.load_step(str(tmp_path), model, optimizer) == checkpoints.State(10, {"of": 10})
    latest = trained(steps=10)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), latest.parameters(), strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {10.0}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [({"scaling": "multiply"}, r'tokens.scaling = "multiply"'), ({"cls": True}, "tokens.cls = true")],
)
def test_sentences_of_another_scaling_or_with_cls_are_refused(make_corpus, tmp_path, tokens, said):
    found = Corpus(make_corpus([5, 6], [0, 1], [2]))
    for name, made in (("same", found.token_settings), ("other", replace(found.token_settings, **tokens))):
        uri = str(tmp_path / name)
        record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {}, {})
        artifacts.begin(uri, record)
        model = MaskedModel(ROW, found.vocabulary.size)
        done = checkpoint.publish_checkpoint(
            uri, record, model, vocabulary=found.vocabulary.hash, tokens=made, objective=training.Objective()
        )
        if name == "same":
            checkpoint.require_sentences(done, found)
            continue
        with pytest.raises(UserError, match=rf"inputs.checkpoint: trained on sentences with {said}"):
            checkpoint.require_sentences(done, found)


def test_a_missing_file_of_a_complete_checkpoint_is_an_error(tmp_path):
    model, optimizer = trained()
    folder = checkpoints.save_step(str(tmp_path), 2, model, optimizer, {})
    files.remove(f"{folder}/model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors.*Restore it"):
        checkpoints.load_step(str(tmp_path), model, optimizer)


def test_weights_of_another_model_are_refused(tmp_path):
    model, optimizer = trained()
    checkpoints.save_step(str(tmp_path), 2, model, optimizer, {})
    other = MaskedModel(ROW, 11)
    with pytest.raises(UserError, match=r"another model .*encoder.tokens \(10, 8\) instead of \(11, 8\)"):
        checkpoints.load_step(str(tmp_path), other, torch.optim.AdamW(other.parameters()))


def test_pruning_keeps_the_latest(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        checkpoints.save_step(str(tmp_path), step, model, optimizer, {})
    checkpoints.remove_old_steps(str(tmp_path), 2)
    assert files.list_dir(f"{tmp_path}/steps") == ["00000002", "00000003"]


def test_a_published_model_is_loaded_whole(tmp_path):
    uri, model = str(tmp_path / "pretrain"), trained()[0]
    record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {}, {})
    artifacts.begin(uri, record)
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.load_encoder(uri)
    checkpoint.publish_checkpoint(uri, record, model, vocabulary="abc", tokens=Tokens(), objective=training.Objective())
    encoder, found = checkpoint.load_encoder(uri)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), model.encoder.parameters(), strict=True))
    assert not encoder.training
    assert parse.from_dict(training.Model, found.details["model"]) == ROW
    checkpoint.require_vocabulary(found, "abc", "the corpus")
    with pytest.raises(UserError, match=r"inputs.checkpoint: made with vocabulary abc, but the corpus has other"):
        checkpoint.require_vocabulary(found, "other", "the corpus")


def save(saver, step, model, optimizer, *, before=lambda: None, after=lambda: None):
    saver.save(step, model, optimizer, {}, before=before, after=after)


def test_a_checkpoint_is_of_the_moment_it_was_asked_for_however_late_it_is_written(tmp_path):
    model, optimizer = trained()
    then = {name: p.detach().clone() for name, p in model.named_parameters()}
    go_on, counted = threading.Event(), []
    with checkpoints.CheckpointWriter(str(tmp_path), keep=2) as saver:
        save(saver, 2, model, optimizer, before=lambda: go_on.wait(60), after=lambda: counted.append(2))
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()  # training goes on while the checkpoint is not written yet
        assert checkpoints.complete_steps(str(tmp_path)) == counted == []
        go_on.set()
    assert checkpoints.complete_steps(str(tmp_path)) == counted == [2]
    other, fresh = trained(steps=0, seed=1)
    checkpoints.load_step(str(tmp_path), other, fresh)
    assert all(torch.equal(p, then[name]) for name, p in other.named_parameters())
    assert not torch.equal(model.encoder.tokens, then["encoder.tokens"])
    assert {float(state["step"]) for state in fresh.state.values()} == {2.0}


def test_checkpoints_appear_in_order_and_use_the_same_memory_again(tmp_path):
    model, optimizer = trained()
    with checkpoints.CheckpointWriter(str(tmp_path), keep=2) as saver:
        places = set()
        for step in range(1, 6):
            save(saver, step, model, optimizer)
            places.add(saver._taken.weights["encoder.tokens"].data_ptr())
    assert len(places) == 1
    assert files.list_dir(f"{tmp_path}/steps") == ["00000004", "00000005"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_at_the_next_one_or_at_the_end(tmp_path):
    model, optimizer = trained()
    blocked = tmp_path / "file"
    blocked.touch()
    with (
        pytest.raises(NotADirectoryError, match="file"),
        checkpoints.CheckpointWriter(f"{blocked}/run", keep=2) as saver,
    ):
        save(saver, 1, model, optimizer)
    saver = checkpoints.CheckpointWriter(f"{blocked}/run", keep=2)
    save(saver, 1, model, optimizer)
    with pytest.raises(NotADirectoryError, match="file"):
        save(saver, 2, model, optimizer)


def test_pruning_removes_what_a_killed_writer_left_before_the_kept_checkpoints_and_nothing_after_them(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3, 4):
        folder = checkpoints.save_step(str(tmp_path), step, model, optimizer, {})
        if step in (1, 4):
            files.remove(f"{folder}/state.json")
    checkpoints.remove_old_steps(str(tmp_path), 1)
    assert files.list_dir(f"{tmp_path}/steps") == ["00000003", "00000004"]
